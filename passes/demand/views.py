"""What operators that move elements must read for a part of their value: permute, reshape, cat, pad and their like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vlexport.passes.demand.box import Box, box_of
from vlexport.passes.demand.site import Narrowing, Read, Site, is_one, shape_of

aten = torch.ops.aten
_PRIMES = (1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099, 1_000_117, 1_000_121)
"""Sizes that stand for dynamic dims while axes are told apart: no product of others equals one."""


def _permute(site: Site, asked: Box) -> Narrowing:
    return site.moved(asked, {axis: dim % site.rank for axis, dim in enumerate(site.operand(1))})


def _unsqueeze(site: Site, asked: Box) -> Narrowing:
    new = site.operand(1) % site.rank
    return site.moved(
        asked, dict(zip((axis for axis in range(site.rank) if axis != new), itertools.count(), strict=False))
    )


def _squeeze(site: Site, asked: Box) -> Narrowing:
    """Only what has size 1 before anything is narrowed may go."""
    sizes = shape_of(site.operand(0))
    given = site.operand(1) if len(site.operands) > 1 else [axis for axis, size in enumerate(sizes) if is_one(size)]
    gone = {dim % len(sizes) for dim in (given if isinstance(given, (list, tuple)) else [given])}
    if any(not is_one(sizes[axis]) for axis in gone):
        return site.whole(asked, "it squeezes an axis whose size is not 1")
    left = [axis for axis in range(len(sizes)) if axis not in gone]
    found = site.moved(asked, dict(enumerate(left)))
    return Narrowing(found.gives, aten.squeeze.dims, (found.operands[0], sorted(gone)), found.reason)


def _expand(site: Site, asked: Box) -> Narrowing:
    sizes: list[Any] = list(site.operand(1))
    for axis, rows in asked.axes:
        sizes[axis] = len(rows)
    return site.kept(asked, {0: site.broadcast(asked, 0)}, {1: sizes})


def _repeat(site: Site, asked: Box) -> Narrowing:
    before = site.rank - len(shape_of(site.operand(0)))
    once = {axis: axis - before for axis, times in enumerate(site.operand(1)) if axis >= before and is_one(times)}
    return site.moved(asked, once)


def _reshape(site: Site, asked: Box) -> Narrowing:
    """An axis that survives is narrowed as it is; of axes that are merged or split, what is a box on both sides."""
    groups = _groups(site)
    if groups is None:
        return site.whole(asked, "which axes a reshape merges or splits cannot be told")
    read: dict[int, Sequence[int]] = {}
    given: set[int] = set()
    source = shape_of(site.operand(0))
    for own, made in groups:
        wanted = asked.on(made)
        if wanted.is_whole:
            continue
        if len(own) == len(made) == 1:
            found: Mapping[int, Sequence[int]] | None = {own[0]: dict(wanted.axes)[made[0]]}
            axes: Sequence[int] = made
        else:
            axes, found = _through(wanted, own, made, source, site.shape)
        if found is not None:
            read.update(found)
            given.update(axes)
    drawn = None
    alone = {made[0]: own[0] for own, made in groups if len(own) == len(made) == 1}
    if asked.drawn is not None and {asked.drawn.axis, asked.drawn.batch} <= alone.keys():
        drawn = asked.drawn.moved(alone[asked.drawn.axis], alone[asked.drawn.batch])
    gives = Box(asked.on(given).axes, asked.drawn if drawn is not None else None)
    sizes: list[Any] = list(site.operand(1))
    for axis, size in enumerate(gives.sizes(sizes)):
        sizes[axis] = size
    return site.kept(
        gives, {0: Box(box_of(read, source).axes, drawn)}, {1: sizes}, asked=asked,
        reason="a reshape merges the axis of which a part is read with another",
    )  # fmt: skip


def _through(
    wanted: Box, own: Sequence[int], made: Sequence[int], source: Sequence[Any], shape: Sequence[Any]
) -> tuple[Sequence[int], Mapping[int, Sequence[int]] | None]:
    """The largest part of ``wanted`` that is a box of the axes ``own`` as well: its axes, and rows of the operand."""
    if not all(isinstance(size, int) for size in (*(source[a] for a in own), *(shape[a] for a in made))):
        return (), None
    have, want = [int(source[axis]) for axis in own], [int(shape[axis]) for axis in made]
    named = [axis for axis, _ in wanted.axes]
    for axes in (each for count in range(len(named), 0, -1) for each in itertools.combinations(named, count)):
        part = wanted.on(axes)
        index = np.ix_(*(np.asarray(part.rows(a) or range(s)) for a, s in zip(made, want, strict=True)))
        flat = np.ravel_multi_index(np.broadcast_arrays(*index), want).reshape(-1)
        rows = [sorted({int(i) for i in found}) for found in np.unravel_index(flat, have)]
        if math.prod(map(len, rows)) == flat.size:
            return axes, dict(zip(own, rows, strict=True))
    return (), None


def _groups(site: Site) -> list[tuple[list[int], list[int]]] | None:
    """Axes of the operand and of the value that hold the same elements, in order; None where that is not certain."""
    dims = dict(zip(site.program.signature.dims, _PRIMES, strict=False))
    source, shape = shape_of(site.operand(0)), site.shape
    if len(dims) < len(site.program.signature.dims) or 0 in (*source, *shape):
        return None
    have, want = site.program.sizes(source, dims), site.program.sizes(shape, dims)
    groups: list[tuple[list[int], list[int]]] = []
    own: list[int] = []
    made: list[int] = []
    left, right = iter(range(len(have))), iter(range(len(want)))
    while True:
        mine, theirs = math.prod(have[a] for a in own), math.prod(want[a] for a in made)
        if own and made and mine == theirs:
            if _product(source, own) != _product(shape, made):
                return None
            groups.append((own, made))
            own, made = [], []
            continue
        axis = next(left if mine <= theirs and not (own and not made) else right, None)
        if axis is not None:
            (own if mine <= theirs and not (own and not made) else made).append(axis)
            continue
        return _with_ones(groups, own, made, [*left], [*right], have, want)


def _with_ones(
    groups: list[tuple[list[int], list[int]]], own: list[int], made: list[int], left: list[int], right: list[int],
    have: Sequence[int], want: Sequence[int],
) -> list[tuple[list[int], list[int]]] | None:  # fmt: skip
    """The groups, if what is left over at the end are axes of size 1."""
    over = [*(have[axis] for axis in (*own, *left)), *(want[axis] for axis in (*made, *right))]
    return groups if math.prod(over) == 1 else None


def _product(shape: Sequence[Any], axes: Sequence[int]) -> Any:
    sizes = [shape[axis] for axis in axes]
    return math.prod(size if isinstance(size, int) else size.node.expr for size in sizes)


def _cat(site: Site, asked: Box) -> Narrowing:
    """Of each piece what is asked of its place; a piece of which nothing is asked goes."""
    tensors: Any = site.operand(0)
    axis = site.operand(1) % site.rank
    rows = asked.rows(axis)
    others = asked.on(a for a in range(site.rank) if a != axis)
    if any(len(shape_of(each)) != site.rank for each in tensors):
        return site.whole(asked, "cat is given a tensor without elements")
    reads: list[Any] = []
    first: Any = 0
    for place, tensor in enumerate(tensors):
        size = shape_of(tensor)[axis]
        if rows is None:
            reads.append(Read((0, place), others))
            continue
        if not isinstance(size, int) and any(row >= first for row in rows):
            return site.kept(
                others, {}, {0: [Read((0, i), others) for i in range(len(tensors))]}, asked=asked,
                reason="it lies behind a piece whose size the input decides",
            )  # fmt: skip
        mine = [row - first for row in rows if isinstance(size, int) and first <= row < first + size]
        if mine:
            along = box_of({axis: mine}, shape_of(tensor))
            reads.append(Read((0, place), Box(tuple(sorted((*others.axes, *along.axes))))))
        if not isinstance(size, int):
            break
        first += size
    return Narrowing(asked, None, (reads[0],)) if len(reads) == 1 else site.kept(asked, {}, {0: reads})


def _stack(site: Site, asked: Box) -> Narrowing:
    tensors: Any = site.operand(0)
    axis = site.operand(1) % site.rank
    rows = asked.rows(axis) or range(len(tensors))
    part = Box(tuple((a - (a > axis), named) for a, named in asked.axes if a != axis))
    return site.kept(asked, {}, {0: [Read((0, row), part) for row in rows]})


def _pad(site: Site, asked: Box) -> Narrowing:
    """The padding of an axis goes where none of it is asked for."""
    given = list(site.operand(1))
    constant = site.argument("mode") in (None, "constant")
    if not all(isinstance(width, int) for width in given) or min(given, default=0) < 0:
        return site.whole(asked, "the padding is decided by the input, or cuts")
    found: dict[int, Sequence[int]] = {}
    gives = set()
    for axis, rows in asked.axes:
        place = 2 * (site.rank - 1 - axis)
        before, after = given[place : place + 2] or (0, 0)
        size = shape_of(site.operand(0))[axis]
        if (before, after) == (0, 0):
            found[axis] = rows
        elif constant and isinstance(size, int) and before <= rows[0] and rows[-1] < before + size:
            found[axis] = [row - before for row in rows]
            given[place : place + 2] = [0, 0]
        else:
            continue
        gives.add(axis)
    read = box_of(found, shape_of(site.operand(0)))
    reason = "part of what is read is padding"
    if not any(given):
        short = asked.on(gives) != asked
        return Narrowing(asked.on(gives), None, (Read((0,), read),), reason if short else "")
    return site.kept(asked.on(gives), {0: read}, {1: given}, asked=asked, reason=reason)


RULES: Mapping[str, Callable[[Site, Box], Narrowing]] = {
    "aten.permute.default": _permute,
    "aten.unsqueeze.default": _unsqueeze,
    **dict.fromkeys(("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"), _squeeze),
    "aten.expand.default": _expand,
    "aten.repeat.default": _repeat,
    "aten.reshape.default": _reshape,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    **dict.fromkeys(("aten.pad.default", "aten.constant_pad_nd.default"), _pad),
}
"""``aten.NAME.OVERLOAD`` → its rule."""
