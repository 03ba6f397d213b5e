"""Views: where batch and slots stand after a value was moved, cut, joined or shaped anew."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.rebuild import Rebuild, aten
from vlexport.passes.tokens.values import HIDDEN, CannotFreeze, Flat, Parts, Slots, Value

_END = 1 << 62
"""Ends from here on mean the end of the axis."""
Given = tuple[Any, ...]
Rule = Callable[[Rebuild, Node, Given], Any]


def old_shape(node: Node) -> tuple[Any, ...]:
    """The recorded shape of a call of the old Program."""
    return tuple(node.meta["val"].shape)


def subject(given: Given) -> Value:
    """The first operand."""
    value = given[0]
    if not isinstance(value, Value):
        raise CannotFreeze("it takes what a selection left in a row, without its axes")
    return value


def _product(sizes: Sequence[Any]) -> Any:
    """Of sizes, as an expression where the data decides one."""
    found = math.prod(size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in sizes)
    return found.expand() if hasattr(found, "expand") else found


def _same(a: Any, b: Any) -> bool:
    return bool(_product([a]) == _product([b]))


def reshape(build: Rebuild, node: Node, given: Given) -> Value:
    """Any call that only gives its operand another shape."""
    if isinstance(given[0], Flat):
        return _unflattened(build, node, given[0])
    value, shape = subject(given), old_shape(node)
    moved: dict[int, Slots] = {}
    places: dict[int, int] = {}
    for axis, slots in value.slots.items():
        before = _product(value.old[:axis])
        place = next(
            (b for b, size in enumerate(shape) if _same(size, value.old[axis]) and _product(shape[:b]) == before), None
        )
        if place is None:
            raise CannotFreeze("a reshape merges the tokens with another axis")
        moved[place], places[axis] = slots, place
        build.know(shape[place], slots)
    sizes = [moved[a].size if a in moved else int(build.number(size)) for a, size in enumerate(shape)]
    done = value.become(value.node, old=shape, slots=moved, zero=frozenset(places[a] for a in value.zero))
    if value.batch is None:
        return done.become(build.call(aten.reshape.default, value.node, sizes))
    if value.batch > 0:
        value = build.hidden(value)
    if shape and sizes[0] == 1 and 0 not in moved:
        return done.become(build.reshaped(value.node, sizes[1:]), batch=0)
    return done.become(build.reshaped(value.node, sizes), batch=HIDDEN)


def _unflattened(build: Rebuild, node: Node, flat: Flat) -> Value:
    """What ``masked_select`` kept gets its token axis back: the sizes behind it must be those that it had."""
    shape, picked = old_shape(node), build.hidden(flat.picked)
    behind = picked.sizes[flat.axis + 1 :]
    axis = len(shape) - len(behind) - 1
    ones = shape[:axis] if axis >= 0 else ()
    fits = axis >= 0 and all(not isinstance(s, torch.SymInt) for s in shape[axis + 1 :])
    if not fits or [*map(int, shape[axis + 1 :])] != behind or any(isinstance(s, torch.SymInt) or s != 1 for s in ones):
        raise CannotFreeze("what masked_select keeps is not reshaped to whole tokens")
    slots = picked.slots[flat.axis]
    build.know(shape[axis], slots)
    sizes = [*(1 for _ in ones[1:]), slots.size, *behind]
    moved = {axis: slots}
    if ones:
        return Value(build.reshaped(picked.node, sizes), shape, 0, moved)
    return Value(build.reshaped(picked.node, sizes), shape, HIDDEN, moved)


def permute(build: Rebuild, node: Node, given: Given) -> Value:
    """Axes in another order."""
    value, dims = subject(given), [d % given[0].rank for d in given[1]]
    moved = {dims.index(a): slots for a, slots in value.slots.items()}
    done = value.become(value.node, old=old_shape(node), slots=moved, zero=frozenset(dims.index(a) for a in value.zero))
    if value.batch == HIDDEN:
        return done.become(build.call(aten.permute.default, value.node, [0, *(d + 1 for d in dims)]))
    batch = None if value.batch is None else dims.index(value.batch)
    return done.become(build.call(aten.permute.default, value.node, dims), batch=batch)


def transpose(build: Rebuild, node: Node, given: Given) -> Value:
    """Two axes change places."""
    dims = list(range(given[0].rank))
    a, b = (given[1] % len(dims), given[2] % len(dims)) if len(given) > 2 else (-1, -2)
    dims[a], dims[b] = dims[b], dims[a]
    return permute(build, node, (given[0], dims))


def unsqueeze(build: Rebuild, node: Node, given: Given) -> Value:
    """A new axis; a hidden batch in front of everything takes it."""
    value, dim = subject(given), given[1] % (given[0].rank + 1)
    moved = {a + (a >= dim): slots for a, slots in value.slots.items()}
    done = value.become(
        value.node, old=old_shape(node), slots=moved, zero=frozenset(a + (a >= dim) for a in value.zero)
    )
    if value.batch == HIDDEN:
        if dim == 0:
            return done.become(value.node, batch=0)
        return done.become(build.call(aten.unsqueeze.default, value.node, dim + 1))
    batch = None if value.batch is None else value.batch + (value.batch >= dim)
    return done.become(build.call(aten.unsqueeze.default, value.node, dim), batch=batch)


def expand(build: Rebuild, node: Node, given: Given) -> Value:
    """Axes of size 1 are repeated."""
    value, shape = subject(given), old_shape(node)
    shift = len(shape) - value.rank
    kept = {a + shift: slots for a, slots in value.slots.items()}
    grown = {a: size for a, size in enumerate(shape) if a not in kept}
    kept |= {a: s for a, s in build.slots_of([grown.get(a, 1) for a in range(len(shape))]).items() if a in grown}
    sizes: list[Any] = [kept[a].size if a in kept else int(size) for a, size in enumerate(shape)]
    done = value.become(value.node, old=shape, slots=kept, zero=frozenset(a + shift for a in value.zero))
    if value.batch is None:
        return done.become(build.call(aten.expand.default, value.node, sizes))
    if value.batch != HIDDEN and sizes[value.batch + shift] == 1:
        sizes[value.batch + shift] = -1
        return done.become(build.call(aten.expand.default, value.node, sizes), batch=value.batch + shift)
    value = build.hidden(value)
    wide = build.reshaped(value.node, [*[1] * shift, *value.sizes]) if shift else value.node
    return done.become(build.call(aten.expand.default, wide, [-1, *sizes]), batch=HIDDEN)


def select(build: Rebuild, node: Node, given: Given) -> Value:
    """One place of an axis, which goes."""
    value, dim, index = subject(given), given[1] % given[0].rank, given[2]
    moved = {a - (a > dim): slots for a, slots in value.slots.items() if a != dim}
    zero = frozenset(a - (a > dim) for a in value.zero if a != dim)
    done = value.become(value.node, old=old_shape(node), slots=moved, zero=zero)
    if dim in value.slots and not 0 <= index < value.slots[dim].lead:
        raise CannotFreeze(f"it reads token {index}, which is not there in every sample at the same place")
    if value.batch == dim:
        order = [dim, *(a for a in range(value.rank) if a != dim)]
        moved_front = build.call(aten.permute.default, value.node, order) if dim else value.node
        return done.become(moved_front, batch=HIDDEN)
    batch = value.batch if value.batch in (None, HIDDEN) else int(value.batch or 0) - (int(value.batch or 0) > dim)
    return done.become(build.call(aten.select.int, value.node, value.at(dim), index), batch=batch)


def slices(build: Rebuild, node: Node, given: Given) -> Value:
    """A range of an axis."""
    value, dim = subject(given), given[1] % given[0].rank
    start, step, shape = given[2] or 0, given[4], old_shape(node)
    end = given[3]
    if dim in value.slots:
        return _slice_of_slots(build, value, dim, (start, end, step), shape)
    if isinstance(shape[dim], torch.SymInt):  # as many places of a made or stored value as there are tokens
        kept = build.slots_of(shape)
        value = build.free_of(value, [dim])
        if start < 0 or step != 1 or start + kept[dim].size > value.size(dim):
            raise CannotFreeze("it cuts as many places as there are tokens, but not from the front")
        piece = build.call(aten.slice.Tensor, value.node, value.at(dim), start, start + kept[dim].size, 1)
        return value.become(piece, old=shape, slots={**value.slots, dim: kept[dim]})
    value = build.free_of(value, [dim])
    end = _END * 2 - 1 if end is None else build.number(end)
    piece = build.call(aten.slice.Tensor, value.node, value.at(dim), start, end, step)
    return value.become(piece, old=shape)


def _slice_of_slots(build: Rebuild, value: Value, dim: int, cut: tuple[Any, Any, Any], shape: Given) -> Value:
    start, end, step = cut
    slots = value.slots[dim]
    whole = (
        end is None
        or (not isinstance(end, torch.SymInt) and end >= _END)
        or (isinstance(end, torch.SymInt) and _same(end, value.old[dim]))
    )
    if step != 1 or start < 0 or start > slots.lead:
        raise CannotFreeze("it cuts tokens out of a row of which only the number of the first ones is known")
    if whole and start == 0:
        return value.become(value.node, old=shape)
    if whole:
        key = ("slice", slots, start)
        if key not in build.joined:
            valid = build.call(aten.slice.Tensor, slots.valid, 1, start, slots.size, 1)
            if slots.lead == start:  # a sample of which nothing is left: its first token stands in
                first = build.stored("first_place", torch.arange(slots.size - start) == 0)
                valid = build.call(aten.logical_or.default, valid, first)
            build.joined[key] = Slots(slots.size - start, valid, slots.lead - start, slots.compact)
        rest = build.joined[key]
        build.know(shape[dim], rest)
        piece = build.call(aten.slice.Tensor, value.node, value.at(dim), start, slots.size, 1)
        return value.become(piece, old=shape, slots={**value.slots, dim: rest})
    if isinstance(end, torch.SymInt) or end < 0 or end > slots.lead:
        raise CannotFreeze("it cuts tokens out of a row of which only the number of the first ones is known")
    piece = build.call(aten.slice.Tensor, value.node, value.at(dim), start, end, 1)
    return value.become(
        piece, old=shape, slots={a: s for a, s in value.slots.items() if a != dim}, zero=value.zero - {dim}
    )


def cat(build: Rebuild, node: Node, given: Given) -> Value:
    """Pieces one behind the other; slots of the whole are those of the pieces."""
    pieces: list[Value] = list(given[0])
    shape, dim = old_shape(node), given[1] % given[0][0].rank
    if any(piece.batch is not None for piece in pieces):
        pieces = [build.with_batch(piece) for piece in pieces]
        if any(p.batch != pieces[0].batch for p in pieces) or pieces[0].batch == dim:
            fits = dim != 0 and all(not isinstance(p.old[0], torch.SymInt) and p.old[0] == 1 for p in pieces)
            pieces = [build.front(p) if fits else build.hidden(p) for p in pieces]
    slots = {a: s for piece in pieces for a, s in piece.slots.items() if a != dim}
    if any(piece.slots.get(a, s) is not s for piece in pieces for a, s in slots.items()):
        raise CannotFreeze("tokens of two selections meet on one axis")
    joined = build.call(aten.cat.default, [p.node for p in pieces], pieces[0].at(dim))
    if any(dim in p.slots for p in pieces):
        slots[dim] = _joined_slots(build, pieces, dim)
        build.know(shape[dim], slots[dim])
    index = all(p.index for p in pieces)
    return Value(joined, shape, pieces[0].batch, slots, index=index)


def _joined_slots(build: Rebuild, pieces: Sequence[Value], dim: int) -> Slots:
    key = ("cat", *(p.slots.get(dim, p.size(dim)) for p in pieces))
    if key in build.joined:
        return build.joined[key]
    valids = []
    lead = size = 0
    ordered = compact = True
    for piece in pieces:
        slots = piece.slots.get(dim)
        count = piece.size(dim)
        if slots is None:
            ones = build.call(aten.full.default, [build.batch_size(), count], True, torch.bool, None, None, None)
            valids.append(ones)
            lead += count if ordered else 0
            compact = compact and ordered
        else:
            valids.append(slots.valid)
            lead += slots.lead if ordered else 0
            compact = compact and slots.compact and ordered
            ordered = False
        size += count
    build.joined[key] = Slots(size, build.call(aten.cat.default, valids, 1), lead, compact)
    return build.joined[key]


def stack(build: Rebuild, node: Node, given: Given) -> Value:
    """A cat of pieces with a new axis each."""
    shape = old_shape(node)
    dim = given[1] % len(shape)
    values: list[Value] = list(given[0])
    if any(v.batch is not None for v in values):
        values = [build.hidden(build.with_batch(v)) for v in values]
    slots = {a + (a >= dim): s for v in values for a, s in v.slots.items()}
    if any(v.slots.get(a - (a > dim), s) is not s for v in values for a, s in slots.items()):
        raise CannotFreeze("tokens of two selections meet on one axis")
    made = build.call(aten.stack.default, [v.node for v in values], dim + (values[0].batch == HIDDEN))
    return Value(made, shape, values[0].batch, slots, index=all(v.index for v in values))


def split(build: Rebuild, node: Node, given: Given) -> Parts:
    """split, chunk, unbind: an axis without slots goes to pieces."""
    names = dialect.operand_names(node)
    place = names.index("dim")
    dim = given[place] % given[0].rank
    value = build.free_of(given[0], [dim])
    if dim in value.slots:
        raise CannotFreeze("it cuts the tokens into pieces of a fixed length")
    made = build.call(node.target, value.node, *given[1:place], value.at(dim), *given[place + 1 :])
    each = []
    for part in node.meta["val"]:
        old = tuple(part.shape)
        gone = len(old) < value.rank
        slots = {a - (gone and a > dim): s for a, s in value.slots.items()}
        zero = frozenset(a - (gone and a > dim) for a in value.zero)
        batch = (
            value.batch
            if value.batch in (None, HIDDEN)
            else int(value.batch or 0) - (gone and int(value.batch or 0) > dim)
        )
        each.append(value.become(made, old=old, slots=slots, zero=zero, batch=batch))
    return Parts(made, tuple(each))


def take(build: Rebuild, node: Node, given: Given) -> Any:
    """One of several values of a call."""
    parts, place = given[0], given[1]
    if not isinstance(parts, Parts):
        raise CannotFreeze("it takes a part of a value that has none")
    each = parts.each[place]
    return each if each.node is not parts.node else replace(each, node=build.call(operator.getitem, parts.node, place))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int",
            "aten._unsafe_view.default", "aten.view_as.default", "aten.reshape_as.default", "aten.ravel.default",
            "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default",
        ),
        reshape,
    ),
    "aten.permute.default": permute,
    **dict.fromkeys(("aten.transpose.int", "aten.swapaxes.default", "aten.t.default", "aten.mT.default"), transpose),
    "aten.unsqueeze.default": unsqueeze,
    **dict.fromkeys(("aten.expand.default", "aten.expand_as.default"), expand),
    "aten.select.int": select,
    "aten.slice.Tensor": slices,
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    **dict.fromkeys(
        ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int"), split
    ),
    "operator.getitem": take,
}  # fmt: skip
"""``aten.NAME.OVERLOAD`` → its rule."""
