"""Scatters in one form: what is written where, and how values that meet are put together.

``scatter_reduce``, ``scatter_add``, ``scatter``, ``index_add``, ``index_fill`` and ``index_put`` are read into a
:class:`Scattered`, or a reason is given why they stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.index_range import bounds, distinct
from vlexport.passes.tokens.sample_rows import each_sample
from vlexport.passes.tokens.writer import shape_of

How = Literal["sum", "mean", "amax", "amin", "assign", "fill"]
LARGEST_ONE_HOT = 2**22
"""Elements for one sample of the largest value that is made: of a one-hot matrix, or of what amax looks at."""


@dataclass(frozen=True)
class Scattered:
    """``target`` with ``source`` put in at ``index`` along ``axis``.

    Attributes:
        target: ``[…, n, …]``.
        axis: Which axis ``n`` is, ≥ 0.
        index: Whole numbers below ``n``, as many axes as ``target``: ``r`` along ``axis``; along each other axis 1
            where they are the same for all of it, else the size of ``target``. With ``as_rows`` it is ``[r]`` or
            ``[B, r]`` yet, and is to be given axes of size 1.
        source: ``[…, r, …]``; None for ``fill``.
        how: How values are put together.
        keeps: Whether the target's own values count among them.
        value: Of ``fill``.
        as_rows: How many axes of size 1 go before, and behind, the index; None where it has all its axes.
    """

    target: Node
    axis: int
    index: Node
    source: Node | None
    how: How
    keeps: bool = True
    value: float = 0.0
    as_rows: tuple[int, int] | None = None

    @property
    def index_shape(self) -> tuple[Any, ...]:
        """Sizes of the index with all its axes."""
        before, behind = self.as_rows or (0, 0)
        return (*(1 for _ in range(before)), *shape_of(self.index), *(1 for _ in range(behind)))

    @property
    def size(self) -> int:
        """``n``."""
        return int(shape_of(self.target)[self.axis])

    @property
    def count(self) -> int:
        """``r``."""
        return int(self.index_shape[self.axis])


def scattered_at(ir: Program, node: Node) -> Scattered | str | None:
    """A scatter in one form, why it stays as it is, or None if it is none or its places are constants."""
    reader = _READERS.get(dialect.op_name(node))
    found = reader(ir, node) if reader is not None else None
    return found if found is None or isinstance(found, str) else _why_not(ir, found) or found


def _why_not(ir: Program, found: Scattered) -> str:
    shape, index = shape_of(found.target), found.index_shape
    dtype = found.target.meta["val"].dtype
    if not isinstance(shape[found.axis], int) or not isinstance(index[found.axis], int):
        return "the length of the axis depends on the input"
    for axis, (size, have) in enumerate(zip(shape, index, strict=True)):
        if axis != found.axis and have != 1 and str(have) != str(size):
            return "its index covers a part of the target"
    if found.source is not None:
        if len(shape_of(found.source)) != len(shape):
            return "its source is not as large as its index"
        for axis, (size, have) in enumerate(zip(shape, shape_of(found.source), strict=True)):
            if str(have) != str(found.count if axis == found.axis else size):
                return "its source is not as large as its index"
        if found.source.meta["val"].dtype != dtype:
            return "source and target differ in type"
    if found.how in ("sum", "mean", "amax", "amin") and not dtype.is_floating_point:
        return "it puts whole numbers together"
    if found.how == "assign" and not distinct(ir, found.index, found.axis - (found.as_rows or (0, 0))[0]):
        return "two values may be written to one place"
    rows = math.prod(s for axis, s in enumerate(index) if axis != found.axis and isinstance(s, int))
    elements = found.size * found.count * rows
    if found.how in ("amax", "amin"):
        others = (s for axis, s in enumerate(shape) if axis != found.axis and isinstance(s, int))
        elements = found.size * found.count * math.prod(others)
    if elements > LARGEST_ONE_HOT:
        return f"{elements} elements for one sample to compare, more than {LARGEST_ONE_HOT}"
    return ""


def _base(index: Node) -> Node:
    """The index before it was repeated along axes."""
    while dialect.op_name(index) in ("aten.expand.default", "aten.repeat.default"):
        above: Any = index.args[0]
        sizes = list(zip(shape_of(above), shape_of(index), strict=False))
        if len(shape_of(above)) != len(sizes) or any(a != 1 and str(a) != str(b) for a, b in sizes):
            break
        index = above
    return index


def _along(ir: Program, node: Node, how: How, *, keeps: bool = True) -> Scattered | None:
    target, dim, index, given = dialect.operands(node)[:4]
    if ir.tensor_of(index) is not None or not shape_of(target):
        return None
    axis = int(dim) % len(shape_of(target))
    source, value = (given, 0.0) if isinstance(given, Node) else (None, float(given))
    full = shape_of(index)
    base = _base(index)
    if any(str(a) != str(b) for i, (a, b) in enumerate(zip(full, shape_of(target), strict=True)) if i != axis):
        base = index  # it covers a part, which sizes of 1 would hide
    return Scattered(target, axis, base, source, how, keeps, value)


def _reduce(ir: Program, node: Node) -> Scattered | str | None:
    how, keeps = dialect.operands(node)[4:6]
    if how not in ("sum", "mean", "amax", "amin"):
        return f"values are put together by {how}"
    return _along(ir, node, how, keeps=keeps)


def _add(ir: Program, node: Node) -> Scattered | None:
    return _along(ir, node, "sum")


def _assign(ir: Program, node: Node) -> Scattered | None:
    return _along(ir, node, "assign")


def _fill(ir: Program, node: Node) -> Scattered | None:
    return _along(ir, node, "fill")


def _index_add(ir: Program, node: Node) -> Scattered | str | None:
    target, dim, index, source, alpha = dialect.operands(node)
    if ir.tensor_of(index) is not None:
        return None
    if alpha != 1:
        return f"what is added is multiplied by {alpha}"
    return _whole_rows(target, int(dim) % len(shape_of(target)), index, source, "sum")


def _whole_rows(target: Node, axis: int, index: Node, source: Node | None, how: How) -> Scattered:
    return Scattered(target, axis, index, source, how, as_rows=(axis, len(shape_of(target)) - axis - 1))


def _index_put(ir: Program, node: Node) -> Scattered | str | None:
    target, indices, values, accumulate = dialect.operands(node)
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if all(ir.tensor_of(index) is not None for _, index in given):
        return None
    if any(index.meta["val"].dtype == torch.bool for _, index in given):
        return "it writes where a mask says, to a number of places that depends on the data"
    how: How = "sum" if accumulate else "assign"
    number = ir.tensor_of(values)
    if number is not None and number.numel() == 1 and not accumulate:  # y[rows, places] = 0.0
        how, values = "fill", None
    rank = len(shape_of(target))
    if len(given) == 1 and len(shape_of(given[0][1])) == 1:
        axis, index = given[0]
        found = _whole_rows(target, axis, index, values, how)
    elif [axis for axis, _ in given] == [0, 1] and each_sample(ir, given[0][1], target) == 1:
        index = given[1][1]
        found = Scattered(target, 1, index, values, how, as_rows=(0, rank - 2))
        if len(shape_of(index)) != 2:
            return "its index is not one row of places for each sample"
    else:
        return "it writes to places along several axes"
    limits = bounds(ir, found.index)
    if limits is None or limits[0] < 0:
        return "its places may be negative"
    return found if how != "fill" or number is None else replace(found, value=float(number))


_READERS: dict[str, Callable[[Program, Node], Scattered | str | None]] = {
    "aten.scatter_reduce.two": _reduce,
    "aten.scatter_add.default": _add,
    "aten.scatter.src": _assign,
    "aten.scatter.value": _fill,
    "aten.index_add.default": _index_add,
    "aten.index_put.default": _index_put,
}
