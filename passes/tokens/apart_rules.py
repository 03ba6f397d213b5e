"""Operators that treat every token apart, and those that know nothing of tokens: slots stay, or there must be none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.rebuild import Rebuild, merged
from vlexport.passes.tokens.values import CannotFreeze, Value
from vlexport.passes.tokens.view_rules import Given, Rule, old_shape, subject

_CHANNELS_FIRST = ("aten.prelu.default", "aten.glu.default")


def elementwise(build: Rebuild, node: Node, given: Given) -> Value:
    """Operands are aligned as they broadcast."""
    shape = old_shape(node)
    values = [each for each in given if isinstance(each, Value)]
    if dialect.op_name(node) in _CHANNELS_FIRST:
        return imagewise(build, node, given)
    nodes, batch = build.aligned(values, shape)
    found = iter(nodes)
    made = build.call(node.target, *(next(found) if isinstance(each, Value) else each for each in given))
    slots = merged([(v, len(shape) - v.rank) for v in values])
    zero: frozenset[int] = frozenset()
    if dialect.is_cast(node):
        zero = values[0].zero
    return Value(made, shape, batch, slots, zero, index=dialect.is_cast(node) and values[0].index)


def like(build: Rebuild, node: Node, given: Given) -> Value:
    """``zeros_like`` and its kin: the shape of their operand."""
    value = subject(given)
    return value.become(build.call(node.target, value.node, *given[1:]), old=old_shape(node), zero=frozenset())


def made(build: Rebuild, node: Node, given: Given) -> Value:
    """``arange``, ``full``: a constant, whose length may be a number of tokens."""
    shape = old_shape(node)
    slots = build.slots_of(shape)
    may_grow = "end" if dialect.plain_name(node) == "arange" else "size"
    for name, each in zip(dialect.operand_names(node), given, strict=True):
        if isinstance(each, torch.SymInt) and name != may_grow:
            raise CannotFreeze(f"the values of {dialect.plain_name(node)} depend on the number of tokens")
    index = dialect.plain_name(node) == "arange" and min([0, *(g for g in given[:1] if isinstance(g, int))]) == 0
    values = [v.node if isinstance(v, Value) else v for v in given]
    return Value(build.call(node.target, *values), shape, None, slots, index=index)


def linear(build: Rebuild, node: Node, given: Given) -> Value:
    """The last axis is mixed, all others are treated apart."""
    value, weight, bias = given
    if any(isinstance(each, Value) and each.batch is not None for each in (weight, bias)):
        raise CannotFreeze("the weight of the linear is computed from the input")
    value = build.free_of(value, [value.rank - 1])
    if value.rank - 1 in value.slots:
        raise CannotFreeze("a linear mixes the tokens")
    operands = (value.node, weight.node, bias.node if bias is not None else None)
    return value.become(build.call(node.target, *operands), old=old_shape(node), zero=frozenset(), index=False)


def norm(build: Rebuild, node: Node, given: Given) -> Value:
    """layer_norm and rms_norm: the last axes are mixed."""
    value = subject(given)
    axes = range(value.rank - len(given[1]), value.rank)
    value = build.free_of(value, axes)
    if any(axis in value.slots for axis in axes):
        raise CannotFreeze("a norm mixes the tokens")
    rest = [each.node if isinstance(each, Value) else each for each in given[2:]]
    return value.become(
        build.call(node.target, value.node, list(given[1]), *rest), old=old_shape(node), zero=frozenset()
    )


def batch_norm(build: Rebuild, node: Node, given: Given) -> Value:
    """At inference a scale and shift per channel, at axis 1."""
    value = build.front(given[0])
    if given[5]:
        raise CannotFreeze("it is in train mode, and so computes over the batch")
    if 1 in value.slots:
        raise CannotFreeze("a batch norm takes the tokens for channels")
    rest = [each.node if isinstance(each, Value) else each for each in given[1:]]
    return value.become(build.call(node.target, value.node, *rest), old=old_shape(node), zero=frozenset())


def imagewise(build: Rebuild, node: Node, given: Given) -> Value:
    """Convolutions, poolings, resizing: each sample apart, with the batch in front, and no axis of tokens."""
    values = [each for each in given if isinstance(each, Value)]
    first = build.front(values[0])
    if any(v.slots for v in values):
        raise CannotFreeze(f"{dialect.plain_name(node)} mixes the tokens with their neighbours, or orders them")
    if first.batch is None or any(v.batch is not None for v in values[1:]):
        raise CannotFreeze(f"{dialect.plain_name(node)} takes several values that are computed from the input")
    rest = iter([first, *values[1:]])
    call = build.call(node.target, *(next(rest).node if isinstance(each, Value) else each for each in given))
    shape = old_shape(node)
    if not shape or shape[0] != 1:
        raise CannotFreeze(f"{dialect.plain_name(node)} gives a value without a batch axis")
    return Value(call, shape, 0)


def constant(build: Rebuild, node: Node, given: Given) -> Any:
    """Any call of which no operand depends on the inputs: it stays as it is."""
    values = [v for each in given for v in (each if isinstance(each, (list, tuple)) else [each])]
    if any(isinstance(v, Value) and v.slots for v in values):
        raise CannotFreeze(f"no rule is known for {dialect.plain_name(node)} on values as long as there are tokens")

    def plain(each: Any) -> Any:
        if isinstance(each, (list, tuple)):
            return [plain(e) for e in each]
        return each.node if isinstance(each, Value) else each

    return Value(build.call(node.target, *map(plain, given)), old_shape(node))


_IMAGEWISE = (
    *dialect.CONVOLUTIONS, *dialect.TRANSPOSED_CONVOLUTIONS,
    "aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool1d.default",
    "aten.adaptive_avg_pool2d.default", "aten.max_pool1d.default", "aten.max_pool2d.default",
    "aten.adaptive_max_pool2d.default", "aten.group_norm.default", "aten.instance_norm.default",
    "aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_bicubic2d.vec",
    "aten.pixel_shuffle.default", "aten.pixel_unshuffle.default", "aten.prelu.default", "aten.im2col.default",
)  # fmt: skip
_LIKE = ("zeros_like", "ones_like", "full_like")
RULES: Mapping[str, Rule] = {
    **{name: elementwise for name, row in dialect.OPS.items() if row.category == "elementwise"},
    **{name: made for name, row in dialect.OPS.items() if row.category == "make"},
    **{f"aten.{name}.default": like for name in _LIKE},
    "aten.linear.default": linear,
    "aten.layer_norm.default": norm,
    "aten.rms_norm.default": norm,
    "aten.batch_norm.default": batch_norm,
    **dict.fromkeys(_IMAGEWISE, imagewise),
}
"""``aten.NAME.OVERLOAD`` → its rule."""
