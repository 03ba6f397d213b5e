"""Operators that mix the tokens of a sample: places that are not live are left out, by a mask or by zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.rebuild import Rebuild, aten, merged
from vlexport.passes.tokens.values import HIDDEN, CannotFreeze, Parts, Slots, Value
from vlexport.passes.tokens.view_rules import Given, Rule, old_shape, subject

_LEAST = -math.inf
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
_MOVED = ("aten.reshape.default", "aten.expand.default", "aten.permute.default", "aten.transpose.int")
"""What may stand between a softmax and the product that it weighs for."""


def attention(build: Rebuild, node: Node, given: Given) -> Value:
    """Keys that are not live are masked; queries that are not live compute what nobody reads."""
    query, key, value, mask, drop, causal, *rest = given
    shape = old_shape(node)
    rank = len(shape)
    width, row = rank - 1, rank - 2
    if any(v.rank - 1 in v.slots for v in (query, key, value)):
        raise CannotFreeze("an attention takes the tokens for channels")
    keys = key.slots.get(key.rank - 2)
    if value.slots.get(value.rank - 2) is not keys:
        raise CannotFreeze("keys and values of an attention are tokens of two selections")
    if causal and (keys is not None or query.rank - 2 in query.slots):
        raise CannotFreeze("a causal attention orders the tokens")
    if build.exact_zeros_read and keys is not None:
        key, value = (build.filled(each, [each.rank - 2], 0.0) for each in (key, value))
    if _begin_with_one((query, key, value)):  # as exporters want it: rank 4, with the batch for the 1
        query, key, value = map(build.front, (query, key, value))
        mask = build.front(mask) if mask is not None and mask.rank == rank else mask
    nodes, batch = build.aligned([query, key, value], shape, tail=2)
    slots = merged([(query, rank - query.rank)])
    slots |= {a + rank - key.rank: s for a, s in key.slots.items() if a < key.rank - 2}
    slots.pop(width, None)
    bias = _key_mask(build, keys, mask, rank, row, batch, shape)
    made = build.call(node.target, *nodes, bias, drop, causal, *rest)
    return Value(made, shape, batch, slots)


def _begin_with_one(values: Sequence[Value]) -> bool:
    """Whether all are of rank 4 and of one sample, so that the batch can stand where that sample stood."""
    return all(v.rank == 4 and not isinstance(v.old[0], torch.SymInt) and v.old[0] == 1 for v in values)


def _key_mask(
    build: Rebuild, keys: Slots | None, mask: Value | None, rank: int, row: int, batch: int | None, shape: Given
) -> Node | None:
    """The model's own mask and which keys are live, as one mask that broadcasts against the scores."""
    own: Node | None = None
    if mask is not None:
        whole = Value(mask.node, (*shape[:row], *mask.old[-2:]), batch)  # stands for the scores' shape
        nodes, form = build.aligned([mask, whole] if batch is not None else [mask], whole.old, tail=2)
        own = nodes[0]
        if form != batch and mask.batch is not None:
            raise CannotFreeze("the mask of an attention has its batch at another axis than the keys")
    if keys is None:
        return own
    scores = Value(keys.valid, (*shape[:row], 1, None), batch, {rank - 1: keys})
    valid = build.valid_on(scores, rank - 1)
    if own is None:
        return valid
    if own.meta["val"].dtype is torch.bool:
        return build.call(aten.logical_and.default, own, valid)
    return build.call(aten.masked_fill.Scalar, own, build.call(aten.logical_not.default, valid), _LEAST)


def softmax(build: Rebuild, node: Node, given: Given) -> Value:
    """Over tokens: what is not live gets no weight, exactly."""
    value, dim = subject(given), given[1] % given[0].rank
    value = build.free_of(value, [dim])
    zero = frozenset({dim}) if dim in value.slots and dialect.plain_name(node).endswith("softmax") else frozenset()
    if dim in value.slots:
        if "log" in dialect.plain_name(node):
            raise CannotFreeze("no rule is known for a log_softmax over tokens")
        value = build.filled(value, [dim], _LEAST)
        build.exact_zeros_read |= not _only_weighs(node)
    made = build.call(node.target, value.node, value.at(dim), *given[2:])
    return value.become(made, old=old_shape(node), zero=zero)


def _only_weighs(node: Node) -> bool:
    """Whether a value does nothing but weigh tokens in products: no ``log 0`` or ``x / 0`` can come of it."""
    return all(
        dialect.op_name(user) in _PRODUCTS
        or ((dialect.is_cast(user) or dialect.op_name(user) in _MOVED) and _only_weighs(user))
        for user in node.users
    )


def matmul(build: Rebuild, node: Node, given: Given) -> Value:
    """A sum over tokens takes zeros for those that are not live."""
    left, right = given
    if min(left.rank, right.rank) < 2:
        raise CannotFreeze("no rule is known for a product with a vector")
    shape = old_shape(node)
    rank = len(shape)
    inner, other = left.slots.get(left.rank - 1), right.slots.get(right.rank - 2)
    if inner is not None or other is not None:
        if inner is not None and other is not None and inner is not other:
            raise CannotFreeze("tokens of two selections meet in a product")
        if inner is None and other is None:
            raise CannotFreeze("a product mixes the tokens with stored weights")
        if build.exact_zeros_read:
            left = build.filled(left, [left.rank - 1] if inner is not None else [], 0.0)
            right = build.filled(right, [right.rank - 2] if other is not None else [], 0.0)
        elif left.rank - 1 not in left.zero and right.rank - 2 not in right.zero:
            left = build.filled(left, [left.rank - 1], 0.0) if inner is not None else left
            right = right if inner is not None else build.filled(right, [right.rank - 2], 0.0)
    nodes, batch = build.aligned([left, right], shape, tail=2)
    outer = merged(
        [
            (
                left.become(left.node, slots={a: s for a, s in left.slots.items() if a != left.rank - 1}),
                rank - left.rank,
            ),
            (
                right.become(right.node, slots={a: s for a, s in right.slots.items() if a != right.rank - 2}),
                rank - right.rank,
            ),
        ]
    )
    target = aten.matmul.default if batch == HIDDEN else node.target
    return Value(build.call(target, *nodes), shape, batch, outer)


def _axes(value: Value, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(value.rank))
    return [d % value.rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _reduced(value: Value, axes: Sequence[int], shape: Given, *, keep: bool) -> dict[str, Any]:
    """Slots and batch behind a reduction."""

    def place(axis: int) -> int:
        return axis if keep else axis - sum(a < axis for a in axes)

    slots = {place(a): s for a, s in value.slots.items() if a not in axes}
    batch = value.batch if value.batch in (None, HIDDEN) else place(int(value.batch or 0))
    return {"old": shape, "slots": slots, "batch": batch, "zero": frozenset(), "index": False}


def total(build: Rebuild, node: Node, given: Given) -> Value:
    """sum and mean: zeros for what is not live, and a mean divides by how many are."""
    is_mean = dialect.plain_name(node) == "mean"
    value = subject(given)
    named = "dim" in dialect.operand_names(node)
    axes = _axes(value, given[1] if named else None)
    keep = bool(given[2]) if named else False
    dtype = given[3] if named else given[1]
    value = build.free_of(value, axes)
    counted = [a for a in axes if a in value.slots]
    value = build.filled(value, counted, 0.0)
    at = [value.at(a) for a in axes]
    changes = _reduced(value, axes, old_shape(node), keep=keep)
    if not counted or not is_mean:
        target = aten.mean.dim if is_mean else aten.sum.dim_IntList
        return value.become(build.call(target, value.node, at, keep, dtype), **changes)
    sums = build.call(aten.sum.dim_IntList, value.node, at, keep, dtype)
    for axis in counted:
        live = build.call(aten._to_copy.default, build.valid_on(value, axis), sums.meta["val"].dtype)
        sums = build.call(aten.div.Tensor, sums, build.call(aten.sum.dim_IntList, live, at, keep, None))
    others = math.prod(value.size(a) for a in axes if a not in counted)
    if others != 1:
        sums = build.call(aten.div.Scalar, sums, others)
    return value.become(sums, **changes)


def extreme(build: Rebuild, node: Node, given: Given) -> Any:
    """amax, amin, max and min along axes: what is not live is never the largest, nor the smallest."""
    name = dialect.plain_name(node)
    value = subject(given)
    named = len(given) > 1
    axes = _axes(value, given[1] if named else None)
    value = build.free_of(value, axes)
    counted = [a for a in axes if a in value.slots]
    if counted and not value.node.meta["val"].is_floating_point():
        raise CannotFreeze("no rule is known for the largest of whole numbers over tokens")
    value = build.filled(value, counted, _LEAST if "max" in name else math.inf)
    keep = bool(given[2]) if named else False
    changes = _reduced(value, axes, _first_shape(node), keep=keep)
    pair = isinstance(node.meta["val"], (tuple, list))
    if pair:
        if any(not s.compact for a, s in value.slots.items() if a in axes):
            raise CannotFreeze("it names the place of a token in a row that is not in order")
        made = build.call(node.target, value.node, value.at(axes[0]), keep)
        each = value.become(made, **changes)
        return Parts(made, (each, each.become(made, index=True)))
    target = aten.amax.default if "max" in name else aten.amin.default
    return value.become(build.call(target, value.node, [value.at(a) for a in axes], keep), **changes)


def _first_shape(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)


def along(build: Rebuild, node: Node, given: Given) -> Any:
    """cumsum and spread along an axis; over tokens only what runs from the first to the last."""
    names = dialect.operand_names(node)
    place = names.index("dim")
    value = subject(given)
    axes = _axes(value, given[place])
    value = build.free_of(value, axes)
    running = dialect.plain_name(node) == "cumsum"
    for axis in axes:
        if axis in value.slots and not (running and value.slots[axis].compact):
            raise CannotFreeze(f"no rule is known for {dialect.plain_name(node)} over tokens")
    dims = [value.at(a) for a in axes]
    dim = dims if isinstance(given[place], (list, tuple)) or given[place] is None else dims[0]
    made = build.call(node.target, value.node, *given[1:place], dim, *given[place + 1 :])
    if running:
        return value.become(made, old=old_shape(node), zero=frozenset())
    keep = bool(given[names.index("keepdim")]) if "keepdim" in names else False
    return value.become(made, **_reduced(value, axes, old_shape(node), keep=keep))


RULES: Mapping[str, Rule] = {
    "aten.scaled_dot_product_attention.default": attention,
    **dict.fromkeys(("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int"), softmax),
    **dict.fromkeys(_PRODUCTS, matmul),
    **dict.fromkeys(
        ("aten.mean.dim", "aten.mean.default", "aten.sum.dim_IntList", "aten.sum.default"), total
    ),
    **dict.fromkeys(
        (
            "aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim", "aten.max.default",
            "aten.min.default",
        ),
        extreme,
    ),
    **dict.fromkeys(
        ("aten.cumsum.default", "aten.var.correction", "aten.std.correction", "aten.linalg_vector_norm.default",
         "aten.any.dim", "aten.all.dim"),
        along,
    ),
}  # fmt: skip
"""``aten.NAME.OVERLOAD`` → its rule."""
