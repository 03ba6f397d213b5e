"""What operators that pick elements must read: select, slice, an index that is stored, a part that a split makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlexport.ir import dialect
from vlexport.passes.demand.box import WHOLE, Box, Drawn, box_of
from vlexport.passes.demand.drawn import is_one_a_sample
from vlexport.passes.demand.site import SPLITS, Narrowing, Read, Site, shape_of

aten = torch.ops.aten
_DECIDED = "which part is read is decided by the input"


def _select(site: Site, asked: Box) -> Narrowing:
    sizes = shape_of(site.operand(0))
    axis = site.operand(1) % len(sizes)
    row = _plain(site.operand(2), sizes[axis])
    if row is None:
        return site.kept(asked, {0: Box(tuple((a + (a >= axis), rows) for a, rows in asked.axes))})
    return _selected(site, asked, axis, row)


def _selected(site: Site, asked: Box, axis: int, row: int) -> Narrowing:
    part = {**{a + (a >= axis): rows for a, rows in asked.axes}, axis: (row,)}
    drawn = asked.drawn
    if drawn is not None:
        drawn = drawn.moved(drawn.axis + (drawn.axis >= axis), drawn.batch + (drawn.batch >= axis))
    read = Read((0,), Box(box_of(part, shape_of(site.operand(0))).axes, drawn))
    return Narrowing(asked, aten.select.int, (read, axis, 0))


def _slice(site: Site, asked: Box) -> Narrowing:
    axis = site.operand(1) % site.rank
    _, _, start, end, step = site.operands
    size = shape_of(site.operand(0))[axis]
    if isinstance(size, int) and all(value is None or isinstance(value, int) for value in (start, end)):
        start, end, step = slice(start, end, step).indices(size)
    elif start is None:
        start = 0
    return _strided(site, asked, axis, start, step)


def _narrow(site: Site, asked: Box) -> Narrowing:
    axis = site.operand(1) % site.rank
    return _strided(site, asked, axis, _plain(site.operand(2), shape_of(site.operand(0))[axis]), 1)


def _strided(site: Site, asked: Box, axis: int, start: Any, step: int) -> Narrowing:
    """Row ``i`` along ``axis`` of the value is row ``start + i * step`` of the operand."""
    size = site.shape[axis]
    rows = asked.rows(axis)
    if rows is None and isinstance(size, int):
        rows = tuple(range(size))
    if not rows or not isinstance(start, int) or start < 0:
        gives = asked.on(a for a in range(site.rank) if a != axis)
        return site.kept(gives, {0: gives}, asked=asked, reason=_DECIDED)
    return _picked(site, asked, axis, [start + row * step for row in rows])


def _index_select(site: Site, asked: Box) -> Narrowing:
    return _indexed(site, asked, site.operand(1) % max(site.rank, 1), site.operand(2))


def _index(site: Site, asked: Box) -> Narrowing:
    """An index along one axis, or one row a sample; other indices, or a mask, are not looked into."""
    indices: list[Any] = list(site.operand(1))
    given = [axis for axis, index in enumerate(indices) if index is not None]
    if given == [0, 1] and is_one_a_sample(site.program, site.operand(0), *indices[:2]):
        part = tuple((axis + 1, rows) for axis, rows in asked.axes if axis > 0)
        read = Read((0,), Box(part, Drawn(1, 0, indices[0], indices[1])))
        gives = asked.on(range(1, site.rank))
        return Narrowing(
            gives, aten.select.int, (read, 1, 0), "" if gives == asked else _DECIDED, (Read((1, 0)), Read((1, 1)))
        )
    if len(given) != 1:
        return replace(site.whole(asked), reason=_DECIDED)
    return _indexed(site, asked, given[0], indices[given[0]])


def _indexed(site: Site, asked: Box, axis: int, index: Any) -> Narrowing:
    tensor = site.program.tensor_of(index)
    size = shape_of(site.operand(0))[axis]
    if tensor is None or tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64) or tensor.numel() == 0:
        return replace(site.whole(asked), reason=_DECIDED)
    named = [_plain(int(row), size) for row in tensor.tolist()]
    wanted = asked.rows(axis)
    rows = [named[place] for place in wanted] if wanted is not None else named
    if any(row is None for row in rows):
        return site.whole(asked, _DECIDED)
    return _picked(site, asked, axis, [row for row in rows if row is not None])


def _picked(site: Site, asked: Box, axis: int, rows: Sequence[int]) -> Narrowing:
    """The rows ``rows`` of ``axis``, in this order; nothing is left to do where that is ascending and each once."""
    part = {**dict(asked.axes), axis: rows}
    read = Read((0,), Box(box_of(part, shape_of(site.operand(0))).axes, asked.drawn))
    among = sorted(set(rows))
    if list(rows) == among:
        return Narrowing(asked, None, (read,))
    return Narrowing(asked, aten.index_select.default, (read, axis, torch.tensor([among.index(row) for row in rows])))


def _gather(site: Site, asked: Box) -> Narrowing:
    """Row ``i`` of the value is gathered from row ``i`` on every axis but one, which is read whole."""
    axis = site.operand(1) % site.rank
    others = asked.on(a for a in range(site.rank) if a != axis)
    return site.kept(asked, {0: others, 2: asked})


def _embedding(site: Site, asked: Box) -> Narrowing:
    last = site.rank - 1
    columns = asked.rows(last)
    return site.kept(asked, {0: Box(((1, columns),)) if columns else WHOLE, 1: asked.on(range(last))})


def _part(site: Site, asked: Box) -> Narrowing:
    """A part that a split makes is a slice; one that unbind makes is a row."""
    name = dialect.op_name(site.reader)
    sizes = shape_of(site.operand(0))
    place: Any = site.node.args[1]
    axis = (site.argument("dim") or 0) % len(sizes)
    if name == "aten.unbind.int":
        return _selected(site, asked, axis, place)
    lengths = [shape[axis] for shape in (tuple(part.shape) for part in site.reader.meta["val"])]
    if not all(isinstance(length, int) for length in lengths[: place + 1]) or lengths[place] == 0:
        return site.whole(asked, _DECIDED)
    return _strided(site, asked, axis, sum(lengths[:place]), 1)


def _plain(row: Any, size: Any) -> int | None:
    """An index as a plain number from the front; None where the input decides it."""
    if not isinstance(row, int) or isinstance(row, bool):
        return None
    if row >= 0:
        return row
    return row + size if isinstance(size, int) else None


RULES: Mapping[str, Callable[[Site, Box], Narrowing]] = {
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.index_select.default": _index_select,
    "aten.index.Tensor": _index,
    "aten.gather.default": _gather,
    "aten.embedding.default": _embedding,
    **dict.fromkeys(SPLITS, _part),
}
"""``aten.NAME.OVERLOAD`` → its rule."""
