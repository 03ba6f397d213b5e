"""Selections: masks and ``nonzero`` become K chosen places, and an index by positions a gather for every sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.rebuild import Rebuild, aten
from vlexport.passes.tokens.survivors import coordinates, root_of, selection
from vlexport.passes.tokens.values import HIDDEN, CannotFreeze, Flat, Parts, Slots, Value
from vlexport.passes.tokens.view_rules import Given, Rule, old_shape, subject

_NONZERO = ("aten.nonzero.default", "aten.argwhere.default", "aten.nonzero_numpy.default", "aten.where.default")
_MASKED = ("aten.masked_select.default",)
_REPEATED = ("aten.repeat_interleave.self_Tensor",)


def masks_of(node: Node) -> list[Node]:
    """The masks by which a call selects; their number of true elements decides its length."""
    name = dialect.op_name(node)
    if name in _NONZERO:
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    if name in (*_MASKED, *_REPEATED):
        mask: Any = dialect.operands(node)[1]
        if name in _REPEATED and root_of(mask).meta["val"].dtype is not torch.bool:
            return []
        return [mask]
    if name == "aten.index.Tensor":
        indices: Any = node.args[1]
        return [each for each in indices if isinstance(each, Node) and each.meta["val"].dtype is torch.bool]
    return []


def is_counted(node: Node) -> bool:
    """Whether the length of a call's value is decided by the data, there and not before."""
    values = node.meta.get("val")
    found = [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, torch.Tensor)]
    theirs = {symbol for operand in node.all_input_nodes for symbol in _symbols(operand.meta["val"])}
    return any(symbol not in theirs for symbol in _symbols(found))


def _symbols(value: Any) -> set[Any]:
    """Of the sizes of a value that are no numbers."""
    if isinstance(value, (tuple, list)):
        return {symbol for each in value for symbol in _symbols(each)}
    sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else [value]
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def picked(build: Rebuild, value: Value, axis: int, index: Node, slots: Slots | None) -> Value:
    """The places ``index`` (``[B, K]``) of an axis, for every sample its own.

    Args:
        build: The rebuild.
        value: Of which.
        axis: Of its old shape.
        index: Positions, none negative.
        slots: Those of the axis afterwards; None where their number is fixed.
    """
    value = build.free_of(build.with_batch(value), [axis])
    batch, place = (0 if value.batch == HIDDEN else int(value.batch or 0)), value.at(axis)
    sizes = value.sizes
    shape: list[Any] = [1] * (value.rank + (value.batch == HIDDEN))
    count = int(index.meta["val"].shape[1])
    if batch > place:
        index = build.call(aten.permute.default, index, [1, 0])
    front = value.node.meta["val"].shape[batch]
    shape[batch] = -1 if isinstance(front, torch.SymInt) else int(front)
    shape[place] = count
    whole = [0, *sizes] if value.batch == HIDDEN else sizes
    wide = [-1 if a in (batch, place) else size for a, size in enumerate(whole)]
    spread = build.call(aten.expand.default, build.call(aten.reshape.default, index, shape), wide)
    made = build.call(aten.gather.default, value.node, place, spread, False)
    kept = {a: s for a, s in value.slots.items() if a != axis}
    if slots is not None:
        kept[axis] = slots
    size: Any = count if slots is None else None
    old = tuple(size if a == axis else s for a, s in enumerate(value.old))
    return value.become(made, old=old, slots=kept, zero=frozenset(a for a in value.zero if a != axis))


def selecting(*, by_score: bool) -> Mapping[str, Rule]:
    """The rules, for a key by the model's score or by order alone."""

    def by_mask(build: Rebuild, value: Value, first: int, mask: Node) -> Value:
        """Tokens of the axes from ``first`` on that a mask keeps."""
        chosen = selection(build, mask, by_score=by_score)
        rank = mask.meta["val"].ndim
        if rank > 1:
            value = build.hidden(build.with_batch(value))
            covered = value.sizes[first : first + rank]
            counted = [a for a in range(first, first + rank) if a in value.slots]
            if counted and [s for s in covered if s != 1] != [value.slots[counted[0]].size]:
                raise CannotFreeze("its mask lies over more than the axis of the tokens")
            sizes = [*value.sizes[:first], chosen.tokens, *value.sizes[first + rank :]]
            old = (*value.old[:first], chosen.tokens, *value.old[first + rank :])
            slots = {a - (rank - 1) * (a > first): s for a, s in value.slots.items() if not first <= a < first + rank}
            value = Value(build.reshaped(value.node, sizes), old, HIDDEN, slots, index=value.index)
        return picked(build, value, first, chosen.index, chosen.slots)

    def index(build: Rebuild, node: Node, given: Given) -> Value:
        value, indices = given
        operands: Any = node.args[1]
        places = [i for i, each in enumerate(indices) if each is not None]
        masks = [i for i in places if operands[i].meta["val"].dtype is torch.bool]
        shape = old_shape(node)
        if masks and len(places) == 1:
            done = by_mask(build, value, places[0], operands[places[0]])
            axis = places[0]
        elif masks:
            raise CannotFreeze("it indexes by a mask and by something else at once")
        else:
            done, axis = by_positions(build, value, places, indices)
        if axis in done.slots:
            build.know(shape[axis], done.slots[axis])
        return done.become(done.node, old=shape)

    def by_positions(build: Rebuild, value: Value, places: Sequence[int], indices: Sequence[Any]) -> tuple[Value, int]:
        """An index by whole numbers on one axis; on axes of size 1 beside it there is nothing to choose."""
        first = places[0]
        if list(places) != list(range(first, first + len(places))):
            raise CannotFreeze("it indexes axes that do not lie side by side")
        real = [p for p in places if isinstance(value.old[p], torch.SymInt) or value.old[p] != 1] or [places[-1]]
        if len(real) != 1:
            raise CannotFreeze("it indexes several axes at once")
        for place in [p for p in reversed(places) if p != real[0]]:
            value = _without(build, value, place)
        return by_row(build, value, first, indices[real[0]]), first

    def select(build: Rebuild, node: Node, given: Given) -> Value:
        value, axis = subject(given), given[1] % given[0].rank
        done = by_row(build, value, axis, given[2])
        if axis in done.slots:
            build.know(old_shape(node)[axis], done.slots[axis])
        return done.become(done.node, old=old_shape(node))

    def by_row(build: Rebuild, value: Value, axis: int, row: Value) -> Value:
        """Positions in a row, one axis; a constant row is the same for every sample."""
        if row.rank != 1:
            raise CannotFreeze("it indexes by positions of several axes")
        if axis in value.slots and not value.slots[axis].compact:
            raise CannotFreeze("it reads tokens by their place in a row that is not in order")
        if row.batch is None:
            value = build.free_of(value, [axis])
            made = build.call(aten.index_select.default, value.node, value.at(axis), row.node)
            if axis in value.slots:
                raise CannotFreeze("it reads tokens at fixed places, which are not there in every sample")
            slots = {**value.slots, **({axis: row.slots[0]} if row.slots else {})}
            old = tuple(row.old[0] if a == axis else s for a, s in enumerate(value.old))
            return value.become(made, old=old, slots=slots)
        row = build.hidden(row)
        node = row.node
        if not row.index:
            if axis in value.slots:  # from the last live token on
                size = build.call(aten.sum.dim_IntList, value.slots[axis].valid, [1], True, node.meta["val"].dtype)
                wrapped = build.call(aten.add.Tensor, node, size)
            else:
                wrapped = build.call(aten.add.Scalar, node, value.size(axis))
            node = build.call(aten.where.self, build.call(aten.lt.Scalar, node, 0), wrapped, node)
        return picked(build, value, axis, node, row.slots.get(0))

    def nonzero(build: Rebuild, node: Node, given: Given) -> Any:
        mask: Any = node.args[0]
        found = coordinates(build, mask, by_score=by_score)
        many = isinstance(node.meta["val"], (tuple, list))
        size = (node.meta["val"][0] if many else node.meta["val"]).shape[0]
        build.know(size, found.slots[0])
        found = found.become(found.node, old=(size, found.old[1]))
        if not many:
            return found
        columns = [
            found.become(build.call(aten.select.int, found.node, 2, i), old=(size,)) for i in range(found.old[1])
        ]
        return Parts(found.node, tuple(columns))

    def masked(build: Rebuild, node: Node, given: Given) -> Flat:
        value, mask = subject(given), dialect.operands(node)[1]
        root: Any = root_of(mask)
        narrow = mask.meta["val"].shape
        lead = value.rank - len(narrow)
        if lead < 0 or _whole(root) != _whole(mask):
            raise CannotFreeze("its mask is no mask of whole tokens")
        wide = [a for a, s in enumerate(narrow) if isinstance(s, torch.SymInt) or s != 1] or [len(narrow) - 1]
        axis = lead + wide[-1]
        ahead = [s for a, s in enumerate(value.old) if a < axis and a not in [lead + w for w in wide]]
        if len(wide) != 1 or any(isinstance(s, torch.SymInt) or s != 1 for s in ahead):
            raise CannotFreeze("its mask lies over more than the axis of the tokens")
        chosen = selection(build, mask, by_score=by_score)
        return Flat(picked(build, value, axis, chosen.index, chosen.slots), axis)

    def repeated(build: Rebuild, node: Node, given: Given) -> Value:
        value, axis = subject(given), given[2]
        mask: Any = dialect.operands(node)[1]
        if axis is None or not masks_of(node):
            raise CannotFreeze("it repeats tokens by counts that are not just 0 and 1")
        chosen = selection(build, mask, by_score=by_score)
        done = picked(build, value, axis % value.rank, chosen.index, chosen.slots)
        build.know(old_shape(node)[axis % value.rank], chosen.slots)
        return done.become(done.node, old=old_shape(node))

    return {
        "aten.index.Tensor": index,
        "aten.index_select.default": select,
        **dict.fromkeys(_NONZERO, nonzero),
        **dict.fromkeys(_MASKED, masked),
        **dict.fromkeys(_REPEATED, repeated),
        "aten.gather.default": gather,
        "aten.take_along_dim.default": gather,
        "aten.embedding.default": embedding,
        **dict.fromkeys(("aten.topk.default", "aten.sort.default", "aten.argsort.default", "aten.sort.stable",
                         "aten.argsort.stable", "aten.argmax.default", "aten.argmin.default"), ranked),
    }  # fmt: skip


def _whole(node: Node) -> Any:
    size = node.meta["val"].numel()
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _without(build: Rebuild, value: Value, axis: int) -> Value:
    """An axis of size 1 goes."""
    old = tuple(s for a, s in enumerate(value.old) if a != axis)
    slots = {a - (a > axis): s for a, s in value.slots.items()}
    zero = frozenset(a - (a > axis) for a in value.zero)
    if value.batch == axis:
        order = [axis, *(a for a in range(value.rank) if a != axis)]
        node = build.call(aten.permute.default, value.node, order) if axis else value.node
        return value.become(node, old=old, slots=slots, zero=zero, batch=HIDDEN)
    batch = value.batch if value.batch in (None, HIDDEN) else int(value.batch or 0) - (int(value.batch or 0) > axis)
    node = build.call(aten.squeeze.dim, value.node, value.at(axis))
    return value.become(node, old=old, slots=slots, zero=zero, batch=batch)


def gather(build: Rebuild, node: Node, given: Given) -> Value:
    """gather and take_along_dim: positions beside every element."""
    along = dialect.plain_name(node) == "take_along_dim"
    value, axis, index = (given[0], given[2], given[1]) if along else given[:3]
    axis %= value.rank
    shape = old_shape(node)
    if axis in value.slots and not value.slots[axis].compact:
        raise CannotFreeze("it reads tokens by their place in a row that is not in order")
    if any(a in v.slots for v in (value, index) for a in range(value.rank) if a != axis):
        raise CannotFreeze("no rule is known for a gather beside tokens")
    pair = [build.with_batch(each) for each in (value, index)]
    if any(p.batch != pair[0].batch for p in pair) or pair[0].batch == axis:
        pair = [build.hidden(p) for p in pair]
    value, index = pair
    node_index = index.node
    if along:
        want = [max(a, b) if x != axis else b for x, (a, b) in enumerate(zip(value.sizes, index.sizes, strict=True))]
        wide: list[Any] = (
            list(want) if index.batch == HIDDEN else [-1 if a == index.batch else s for a, s in enumerate(want)]
        )
        node_index = build.call(aten.expand.default, node_index, [-1, *wide] if index.batch == HIDDEN else wide)
    made = build.call(aten.gather.default, value.node, value.at(axis), node_index, False)
    slots = {axis: index.slots[axis]} if axis in index.slots else {}
    if slots:
        build.know(shape[axis], slots[axis])
    return value.become(made, old=shape, slots=slots, zero=frozenset())


def embedding(build: Rebuild, node: Node, given: Given) -> Value:
    """Rows of a stored table."""
    table, index = subject(given), subject(given[1:])
    if table.batch is not None:
        raise CannotFreeze("it looks up rows of a table that is computed from the input")
    made = build.call(node.target, table.node, index.node, *given[2:])
    return index.become(made, old=old_shape(node), zero=frozenset(), index=False)


def ranked(build: Rebuild, node: Node, given: Given) -> Any:
    """top-k, sort, argmax: of an axis without slots."""
    names = dialect.operand_names(node)
    place = names.index("dim")
    dim = given[place]
    value = subject(given)
    axes = list(range(value.rank)) if dim is None else [dim % value.rank]
    value = build.free_of(value, axes)
    if any(a in value.slots for a in axes):
        raise CannotFreeze(f"no rule is known for {dialect.plain_name(node)} over tokens")
    if dim is None:
        raise CannotFreeze(f"no rule is known for {dialect.plain_name(node)} over everything")
    made = build.call(node.target, value.node, *given[1:place], value.at(axes[0]), *given[place + 1 :])
    gone = "keepdim" in names and not given[names.index("keepdim")]
    slots = {a - (gone and a > axes[0]): s for a, s in value.slots.items()}
    batch = (
        value.batch
        if value.batch in (None, HIDDEN)
        else int(value.batch or 0) - (gone and int(value.batch or 0) > axes[0])
    )
    values: Any = node.meta["val"]
    if isinstance(values, (tuple, list)):
        each = value.become(made, slots=slots, batch=batch, zero=frozenset(), index=False)
        return Parts(
            made,
            (each.become(made, old=tuple(values[0].shape)), each.become(made, old=tuple(values[1].shape), index=True)),
        )
    return value.become(made, old=tuple(values.shape), slots=slots, batch=batch, zero=frozenset(), index=True)
