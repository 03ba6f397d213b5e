"""What operators do to axes: how each may work on a value whose axes lie otherwise.

An operator works on a value in one layout; a map of ``passes/layout/axis_maps`` leads from another layout to it.
A rule says whether the operator can work on that other layout as well, how it is called then, and which map leads from
its result there to its result here::

    softmax(x, -1) on [batch, 196, 64]      dim -1 is axis 1 of [batch, 64, 14, 14]      softmax(x', 1)
    linear(x, W)   on [batch, 196, 64]      last there, too: [batch, 14, 14, 64]         linear(x', W)

An axis that an operator works along must be a whole axis in both layouts; one that it needs at a place must be there in
both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.layout.axis_maps import AxisMap, Size
from vlexport.passes.layout.views import shape_of

MOST_AXES = 4
"""Axes of the other layout, unless there are as many already: runtimes are slow above, or refuse more than five."""


@dataclass(frozen=True)
class Moved:
    """An operator on another layout.

    Attributes:
        result: From its result there to its result here; one for each of several results.
        operands: Operand → the map from what it must read instead; operands that stay as they are have none.
        arguments: Places among the operands of the call → what stands there on the other layout.
    """

    result: AxisMap | tuple[AxisMap, ...]
    operands: dict[Node, AxisMap]
    arguments: dict[int, Any]


def whole_axis(axes: AxisMap, dim: int) -> int | None:
    """The axis before that is axis ``dim`` after; None where that one is of size 1, torn or joined."""
    group = axes.target[dim % len(axes.target)]
    start = 0
    for axis, atoms in enumerate(axes.source):
        if group and group == tuple(range(start, start + len(atoms))):
            return axis
        start += len(atoms)
    return None


def restricted(axes: AxisMap, kept: Sequence[bool]) -> AxisMap | None:
    """The map of an operand that is broadcast along the axes not ``kept``; None where an axis would be torn."""
    gone = {atom for group, keep in zip(axes.target, kept, strict=True) if not keep for atom in group}
    return _without(axes, gone, dims=())


def resized(axes: AxisMap, dim: int, size: Size) -> AxisMap | None:
    """The map with another size along a whole axis."""
    axis = whole_axis(axes, dim)
    if axis is None:
        return None
    atom = axes.target[dim][0]
    if size == 1:
        return _without(axes, {atom}, dims=())
    source = tuple((size,) if place == axis else group for place, group in enumerate(axes.source))
    return AxisMap(source, axes.target)


def removed(axes: AxisMap, dims: Iterable[int]) -> AxisMap | None:
    """The map without some axes after, and the axes before that they are made of."""
    gone = {atom for dim in dims for atom in axes.target[dim]}
    return _without(axes, gone, dims=tuple(dims))


def _without(axes: AxisMap, gone: set[int], dims: tuple[int, ...]) -> AxisMap | None:
    number: dict[int, int] = {}
    source: list[tuple[Size, ...]] = []
    at = 0
    for group in axes.source:
        places = range(at, at + len(group))
        at += len(group)
        lost = [p for p in places if p in gone]
        if lost and len(lost) != len(group):
            return None
        if lost and dims:
            continue
        source.append(() if lost else group)
        number.update((p, len(number)) for p in places if not lost)
    target = [
        tuple(number[i] for i in group if i in number) for dim, group in enumerate(axes.target) if dim not in dims
    ]
    return AxisMap(tuple(source), tuple(target))


def moved(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    """How ``node`` works when ``operand`` lies otherwise.

    Args:
        node: A call with one result or several.
        operand: One of its tensor operands.
        axes: From the other layout to the operand's.

    Returns:
        The call there, or why it cannot be moved.
    """
    rule = _rule_of(node)
    if len(axes.source) > max(len(axes.target), MOST_AXES):
        return f"the {dialect.plain_name(node)} would work on {len(axes.source)} axes"
    return (
        f"the {dialect.plain_name(node)} needs its axes where they are" if rule is None else rule(node, operand, axes)
    )


def keeps_shape(node: Node) -> bool:
    """Whether the map of the result is that of the first operand, so that a move may start from the result."""
    return _rule_of(node) in (_elementwise, _softmax, _norm)


_Rule = Callable[[Node, Node, AxisMap], "Moved | str"]


def _rule_of(node: Node) -> _Rule | None:
    name = dialect.op_name(node)
    if name in _RULES:
        return _RULES[name]
    row = dialect.info(node)
    return _elementwise if row is not None and row.category == "elementwise" and name not in _ALONG_AXES else None


def _elementwise(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    shape = shape_of(node)
    if axes.after != shape:
        return f"the {dialect.plain_name(node)} broadcasts what was moved"
    operands = {}
    for each in node.all_input_nodes:
        if not isinstance(each.meta["val"], torch.Tensor):  # a size that is computed with
            continue
        kept = broadcast_axes(shape_of(each), shape)
        own = restricted(axes, kept)
        if own is None:
            return f"an operand of the {dialect.plain_name(node)} is broadcast along a part of an axis"
        operands[each] = own
    return Moved(axes, operands, {})


def broadcast_axes(own: tuple[Size, ...], shape: tuple[Size, ...]) -> list[bool]:
    """For every axis of ``shape``: whether an operand of sizes ``own`` has it, or is repeated along it."""
    padded = (sympy.Integer(1),) * (len(shape) - len(own)) + own
    return [size != 1 or whole == 1 for size, whole in zip(padded, shape, strict=True)]


def _along(node: Node, dim: int) -> str:
    return f"the {dialect.plain_name(node)} works along axis {dim}, which is no whole axis in the other layout"


def _softmax(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    dim = cast("int", dialect.operands(node)[1])
    axis = whole_axis(axes, dim)
    return _along(node, dim) if axis is None else Moved(axes, {operand: axes}, {1: axis})


def _is_last(axes: AxisMap) -> bool:
    return whole_axis(axes, -1) == len(axes.source) - 1


def _norm(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    sizes = cast("Sequence[int]", dialect.operands(node)[1])
    if operand is not node.args[0] or len(sizes) != 1 or not _is_last(axes):
        return f"the {dialect.plain_name(node)} needs its axis last"
    return Moved(axes, {operand: axes}, {})


def _linear(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    if operand is not node.args[0] or not _is_last(axes):
        return "the linear needs its axis last"
    result = resized(axes, len(axes.target) - 1, shape_of(node)[-1])
    return _along(node, -1) if result is None else Moved(result, {operand: axes}, {})


def _batch_norm(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    if operand is not node.args[0] or whole_axis(axes, 1) != 1:
        return "the batch_norm needs its channels at axis 1"
    return Moved(axes, {operand: axes}, {})


def _reduction(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    given = dialect.operands(node)
    dims = sorted(d % len(axes.target) for d in given[1] or ())
    atoms = {atom for d in dims for atom in axes.target[d]}
    own, at = [], 0
    for axis, group in enumerate(axes.source):
        if group and set(range(at, at + len(group))) <= atoms:
            own.append(axis)
        at += len(group)
    kept = [d not in dims for d in range(len(axes.target))]
    result = restricted(axes, kept) if given[2] else removed(axes, dims)
    if not dims or result is None or any(not axes.target[d] for d in dims):
        return f"the {dialect.plain_name(node)} reduces axes that are no whole axes in the other layout"
    return Moved(result, {operand: axes}, {1: own})


def _cat(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    pieces, dim = cast("tuple[list[Node], int]", dialect.operands(node)[:2])
    if any(len(shape_of(each)) != len(axes.target) for each in pieces):
        return "the cat is given a tensor without elements"
    dim %= len(axes.target)
    axis = whole_axis(axes, dim)
    operands = {each: resized(axes, dim, shape_of(each)[dim]) for each in pieces}
    result = resized(axes, dim, shape_of(node)[dim])
    if axis is None or result is None:
        return _along(node, dim)
    return Moved(result, {each: own for each, own in operands.items() if own is not None}, {1: axis})


def _slice(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    dim = cast("int", dialect.operands(node)[1]) % len(axes.target)
    axis, result = whole_axis(axes, dim), resized(axes, dim, shape_of(node)[dim])
    if axis is None or result is None or any(isinstance(a, Node) for a in node.args[1:]):
        return _along(node, dim)
    return Moved(result, {operand: axes}, {1: axis})


def _select(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    dim = cast("int", dialect.operands(node)[1]) % len(axes.target)
    axis, result = whole_axis(axes, dim), removed(axes, (dim,))
    if axis is None or result is None or isinstance(node.args[2], Node):
        return _along(node, dim)
    return Moved(result, {operand: axes}, {1: axis})


def _split(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    dim = cast("int", dialect.operands(node)[2]) % len(axes.target)
    axis = whole_axis(axes, dim)
    pieces = [resized(axes, dim, sympy.Integer(int(v.shape[dim]))) for v in node.meta["val"]]
    if axis is None or any(p is None for p in pieces):
        return _along(node, dim)
    return Moved(tuple(cast("list[AxisMap]", pieces)), {operand: axes}, {2: axis})


def _item(node: Node, operand: Node, axes: AxisMap) -> Moved | str:
    return Moved(axes, {operand: axes}, {})


_ALONG_AXES = ("aten.glu.default", "aten.prelu.default", "aten.type_as.default")
_RULES: dict[str, _Rule] = {
    "aten.softmax.int": _softmax,
    "aten.log_softmax.int": _softmax,
    "aten._softmax.default": _softmax,
    "aten.layer_norm.default": _norm,
    "aten.rms_norm.default": _norm,
    "aten.linear.default": _linear,
    "aten.batch_norm.default": _batch_norm,
    "aten.mean.dim": _reduction,
    "aten.sum.dim_IntList": _reduction,
    "aten.amax.default": _reduction,
    "aten.amin.default": _reduction,
    "aten.cat.default": _cat,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _slice,
    "aten.select.int": _select,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
}
