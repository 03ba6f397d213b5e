"""What is known of the whole numbers that a selection is made of: the range they lie in, and whether they are distinct.

Both are read off the calls that made a value, upwards: places given by a top-k over 64 scores lie in 0 to 63 and are
distinct along its axis, and still are after a slice, a reshape that adds axes of size 1, or an addition of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

Range = tuple[int, int]
DEEPEST = 40
"""Calls that are followed upwards."""

PLACES = {
    "aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable",
    "aten.max.dim", "aten.min.dim", "aten.argmax.default", "aten.argmin.default",
}  # fmt: skip
"""Operators that give places along an axis."""
_ORDERS = ("aten.topk.default", "aten.sort.default", "aten.sort.stable")
_SINGLE = ("aten.argsort.default", "aten.argsort.stable", "aten.argmax.default", "aten.argmin.default")
_SAME_VALUES = {
    "aten.reshape.default", "aten.permute.default", "aten.expand.default", "aten.slice.Tensor",
    "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.default", "aten.squeeze.dims", "aten.select.int",
    "aten.repeat.default", "aten.flip.default", "aten.roll.default", "aten.gather.default",
    "aten.index_select.default", "aten.index.Tensor", "aten.amax.default", "aten.amin.default", "aten.narrow.default",
}  # fmt: skip


def axis_of(node: Node) -> int | None:
    """The axis, ≥ 0, along which an operator that gives places looks; None where it looks at everything at once."""
    given = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=False))
    operand, dim = given["self"], given.get("dim")
    return None if dim is None else int(dim) % max(operand.meta["val"].ndim, 1)


def places_along(node: Any) -> tuple[Node, int, bool] | None:
    """What ``node`` picks places of, along which axis, and whether each place comes once at most; None if no places."""
    source = node
    if isinstance(node, Node) and dialect.op_name(node) == "operator.getitem" and node.args[1] == 1:
        source = node.args[0]
    elif not (isinstance(node, Node) and dialect.op_name(node) in _SINGLE):
        return None
    name = dialect.op_name(source)
    if name not in PLACES:
        return None
    axis = axis_of(source)
    return None if axis is None else (source.args[0], axis, "max" not in name and "min" not in name)


def bounds(ir: Program, node: Any, depth: int = 0) -> Range | None:
    """The smallest and the largest that a whole number of ``node`` can be, or None where that is not known."""
    if isinstance(node, int) and not isinstance(node, bool):
        return node, node
    if not isinstance(node, Node) or depth > DEEPEST:
        return None
    tensor = ir.tensor_of(node)
    if tensor is not None:
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel() > 0
        return (int(tensor.min()), int(tensor.max())) if whole else None
    picked = places_along(node)
    if picked is not None:
        size = picked[0].meta["val"].shape[picked[1]]
        return (0, size - 1) if isinstance(size, int) else None
    name = dialect.op_name(node)
    if name == "operator.getitem":  # the values of a sort or top-k
        source: Any = node.args[0]
        return bounds(ir, source.args[0], depth + 1) if dialect.op_name(source) in _ORDERS else None
    if name in _SAME_VALUES:
        return bounds(ir, node.args[0], depth + 1)
    rule = _RULES.get(name)
    return rule(ir, node, depth + 1) if rule is not None else None


def _hull(ir: Program, node: Node, depth: int) -> Range | None:
    parts: Any = node.args[0] if dialect.op_name(node) == "aten.cat.default" else node.args[1:3]
    found = [bounds(ir, part, depth) for part in parts]
    known = [each for each in found if each is not None]
    return (min(a for a, _ in known), max(b for _, b in known)) if len(known) == len(found) else None


def _two(ir: Program, node: Node, depth: int) -> tuple[Range, Range] | None:
    a, b = (bounds(ir, each, depth) for each in dialect.operands(node)[:2])
    return (a, b) if a is not None and b is not None else None


def _add(ir: Program, node: Node, depth: int) -> Range | None:
    found = _two(ir, node, depth)
    if found is None or dialect.operands(node)[2] != 1:
        return None
    return found[0][0] + found[1][0], found[0][1] + found[1][1]


def _sub(ir: Program, node: Node, depth: int) -> Range | None:
    found = _two(ir, node, depth)
    if found is None or dialect.operands(node)[2] != 1:
        return None
    return found[0][0] - found[1][1], found[0][1] - found[1][0]


def _mul(ir: Program, node: Node, depth: int) -> Range | None:
    found = _two(ir, node, depth)
    corners = [a * b for a in found[0] for b in found[1]] if found is not None else []
    return (min(corners), max(corners)) if corners else None


def _floor_divide(ir: Program, node: Node, depth: int) -> Range | None:
    by: Any = node.args[1]
    found = bounds(ir, node.args[0], depth) if isinstance(by, int) and by > 0 else None
    return (found[0] // by, found[1] // by) if found is not None else None


def _remainder(ir: Program, node: Node, depth: int) -> Range | None:
    by: Any = node.args[1]
    return (0, by - 1) if isinstance(by, int) and by > 0 else None


def _zeros(ir: Program, node: Node, depth: int) -> Range | None:
    return 0, 0


def _ones(ir: Program, node: Node, depth: int) -> Range | None:
    return 1, 1


_RULES: dict[str, Callable[[Program, Node, int], Range | None]] = {
    "aten.cat.default": _hull,
    "aten.where.self": _hull,
    "aten.add.Tensor": _add,
    "aten.sub.Tensor": _sub,
    "aten.mul.Tensor": _mul,
    "aten.floor_divide.default": _floor_divide,
    "aten.remainder.Scalar": _remainder,
    "aten.zeros_like.default": _zeros,
    "aten.zeros.default": _zeros,
    "aten.new_zeros.default": _zeros,
    "aten.ones_like.default": _ones,
}


def distinct(ir: Program, node: Any, axis: int, depth: int = 0) -> bool:
    """Whether the numbers of ``node`` along ``axis`` certainly differ from one another."""
    if not isinstance(node, Node) or depth > DEEPEST:
        return False
    if node.meta["val"].shape[axis] == 1:
        return True
    tensor = ir.tensor_of(node)
    if tensor is not None:
        ordered = tensor.sort(axis).values
        return bool((ordered.diff(dim=axis) != 0).all())
    picked = places_along(node)
    if picked is not None:
        return picked[2] and picked[1] == axis
    name = dialect.op_name(node)
    if name == "operator.getitem":  # an order of distinct values holds distinct values
        source: Any = node.args[0]
        ordered_here = dialect.op_name(source) in _ORDERS and axis_of(source) == axis
        return ordered_here and distinct(ir, source.args[0], axis, depth + 1)
    if name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor"):
        first, second = dialect.operands(node)[:2]
        number = isinstance(second, int) and (second != 0 or name != "aten.mul.Tensor")
        return number and distinct(ir, first, axis, depth + 1)
    if name == "aten.gather.default":
        operand, dim, index = dialect.operands(node)[:3]
        along = int(dim) % node.meta["val"].ndim == axis
        return along and distinct(ir, operand, axis, depth + 1) and distinct(ir, index, axis, depth + 1)
    above = _axis_above(node, axis)
    return above is not None and distinct(ir, node.args[0], above, depth + 1)


def _axis_above(node: Node, axis: int) -> int | None:
    """The axis of a layout call's operand that its ``axis`` is, or a part of; None where it is no whole axis."""
    name = dialect.op_name(node)
    if name == "aten.slice.Tensor":
        return axis
    if name not in ("aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.expand.default"):
        return None
    before, after = list(node.args[0].meta["val"].shape), list(node.meta["val"].shape)  # type: ignore[union-attr]
    if name == "aten.expand.default":
        above = axis - (len(after) - len(before))
        return above if above >= 0 and str(before[above]) == str(after[axis]) else None
    wide_before = [i for i, size in enumerate(before) if size != 1]
    wide_after = [i for i, size in enumerate(after) if size != 1]
    same = [str(before[i]) for i in wide_before] == [str(after[i]) for i in wide_after]
    return wide_before[wide_after.index(axis)] if same and axis in wide_after else None
