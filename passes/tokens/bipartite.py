"""Merging along the strongest edges between the even and the odd tokens of a sequence, as static operators.

Each even token has one edge, to the odd token that scores highest. Of these edges the strongest ``count`` merge: the
even token goes into the odd one, all others stay. What the authors' code does by sorting and by a scatter that adds is
a top-k here, a gather of the merged rows, and their product with a one-hot matrix, ``odd + Hᵀ · even[merged]``.

Which tokens stay is wanted in their order, for the next layer's even and odd tokens follow from it: a top-k of
``stays · n − place``, whose keys are whole numbers that all differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from vlexport.passes.tokens.emit import Emit, aten, size


@dataclass(frozen=True)
class OneWay:
    """Sources that merge into targets.

    Attributes:
        stays: Sources that do not, [batch, sources − count].
        merged: Sources that do, [batch, count].
        into: Their targets, likewise.
        hot: The same as a matrix, 1 where a merged source meets its target, [batch, count, targets].
        sources: How many there are.
        targets: How many there are.
    """

    stays: Node
    merged: Node
    into: Node
    hot: Node
    sources: int
    targets: int


def one_way(emit: Emit, scores: Node, count: int, *, ordered: bool) -> OneWay:
    """The strongest edges.

    Args:
        emit: Writes the calls.
        scores: [batch, sources, targets].
        count: How many merge.
        ordered: Sources that stay keep their order; else the strongest come first, as where authors do not sort them.
    """
    sources, targets = size(scores, 1), size(scores, 2)
    best = emit(aten.amax.default, scores, [-1], False)
    target = emit(aten.argmax.default, scores, -1, False)
    if ordered:
        merged = emit.item(emit(aten.topk.default, best, count, 1, True, True), 1)
        stays = others(emit, merged, sources, like=scores)
    else:
        ranked = emit.item(emit(aten.topk.default, best, sources, 1, True, True), 1)
        merged, stays = emit.cut(ranked, 1, 0, count), emit.cut(ranked, 1, count)
    into = emit(aten.gather.default, target, 1, merged)
    return OneWay(stays, merged, into, emit.one_hot(into, targets, scores), sources, targets)


def others(emit: Emit, chosen: Node, count: int, like: Node) -> Node:
    """The places of ``count`` that are not among ``chosen``, [batch, count − k], ascending."""
    return _ascending(emit, chosen, count, count - size(chosen, 1), like)


def in_order(emit: Emit, chosen: Node, count: int, like: Node) -> Node:
    """The places of ``count`` that are among ``chosen``, [batch, k], ascending."""
    return _ascending(emit, chosen, -count, size(chosen, 1), like)


def _ascending(emit: Emit, chosen: Node, weight: int, wanted: int, like: Node) -> Node:
    """The places with the smallest ``weight · chosen + place``: whole numbers that all differ."""
    hits = emit(aten.sum.dim_IntList, emit.one_hot(chosen, abs(weight), like), [1], False)
    places = emit.cast(emit.numbers(abs(weight)), like)
    keys = emit(aten.add.Tensor, emit(aten.mul.Tensor, hits, float(weight)), places, 1)
    return emit.item(emit(aten.topk.default, keys, wanted, 1, False, True), 1)


def merge(emit: Emit, way: OneWay, even: Node, odd: Node, axis: int) -> tuple[Node, Node]:
    """Values of the sources that stay, and of the targets with what merged into them added.

    Args:
        emit: Writes the calls.
        way: Which merge.
        even: Values of the sources along ``axis``, −2 or −1 of 3 or 4 axes.
        odd: Values of the targets.
        axis: Where they lie.
    """
    moved = take(emit, even, way.merged, axis)
    hot, rank = way.hot, even.meta["val"].ndim
    if axis == -2:
        hot = emit(aten.permute.default, hot, [0, 2, 1])
    hot = emit(aten.unsqueeze.default, hot, 1) if rank == 4 else hot
    added = emit(aten.matmul.default, *((hot, moved) if axis == -2 else (moved, hot)))
    return take(emit, even, way.stays, axis), emit(aten.add.Tensor, odd, added, 1)


def unmerge(emit: Emit, way: OneWay, stays: Node, odd: Node) -> Node:
    """Values [batch, sources, channels] of the sources: those that stay, and for the others their targets'."""
    kept = emit(aten.permute.default, emit.one_hot(way.stays, way.sources, stays), [0, 2, 1])
    moved = emit(aten.permute.default, emit.one_hot(way.merged, way.sources, stays), [0, 2, 1])
    back = emit(aten.matmul.default, moved, emit.rows(odd, way.into))
    return emit(aten.add.Tensor, emit(aten.matmul.default, kept, stays), back, 1)


def take(emit: Emit, value: Node, index: Node, axis: int) -> Node:
    """Rows at an index [batch, k] along axis −2 or −1 of a value with 3 or 4 axes."""
    rank = value.meta["val"].ndim
    index = emit(aten.unsqueeze.default, index, -1 if axis == -2 else 1)
    if rank == 4:
        index = emit(aten.unsqueeze.default, index, 1)
    sizes = [-1, *(size(value, i) for i in range(1, rank))]
    sizes[axis] = -1
    return emit(aten.gather.default, value, rank + axis, emit(aten.expand.default, index, sizes, False))


def even_and_odd(emit: Emit, value: Node, axis: int) -> tuple[Node, Node]:
    """Every second one from the first, and from the second."""
    return emit.every(value, axis, 0, 2), emit.every(value, axis, 1, 2)


def interleaved(emit: Emit, even: Node, odd: Node) -> Node:
    """The sequence [batch, n, channels] of which they were every second one."""
    pairs = size(odd, 1)
    stacked = emit(aten.stack.default, [emit.cut(even, 1, 0, pairs), odd], 2)
    made = emit(aten.reshape.default, stacked, [-1, 2 * pairs, size(odd, 2)])
    return emit.joined([made, emit.cut(even, 1, pairs)], 1) if size(even, 1) > pairs else made


def shielded(emit: Emit, scores: Node, protected: int, floor: float) -> Node:
    """Scores in which protected tokens, which stand first, are below all others: they neither merge nor are merged to.

    Args:
        emit: Writes the calls.
        scores: [batch, even, odd].
        protected: Tokens at the front of the sequence.
        floor: Below every score.
    """
    if not protected:
        return scores
    rows, columns = size(scores, 1), size(scores, 2)
    even, odd = (protected + 1) // 2, protected // 2
    mask = torch.arange(rows)[:, None] < even
    if odd:
        mask = mask | (torch.arange(columns)[None] < odd)
    return emit(aten.masked_fill.Scalar, scores, emit.stored(f"tokens_shield_{rows}_{columns}", mask), floor)


def put_together(emit: Emit, left: Node, right: Node, protected: int, axis: int = 1) -> Node:
    """One sequence of what stays of the even tokens and of the odd ones, protected tokens first and in their order."""
    if protected <= 1:
        return emit.joined([left, right], axis)
    pieces = []
    for place in range(protected):
        side = right if place % 2 else left
        pieces.append(emit.cut(side, axis, place // 2, place // 2 + 1))
    even, odd = (protected + 1) // 2, protected // 2
    return emit.joined([*pieces, emit.cut(left, axis, even), emit.cut(right, axis, odd)], axis)


def taken_apart(emit: Emit, tokens: Node, protected: int, left: int) -> tuple[Node, Node]:
    """The two parts of :func:`put_together`, of which the first has ``left`` tokens."""
    if protected <= 1:
        return emit.cut(tokens, 1, 0, left), emit.cut(tokens, 1, left)
    even, odd = (protected + 1) // 2, protected // 2
    front = emit.cut(tokens, 1, 0, protected)
    first, second = even_and_odd(emit, front, 1)
    middle = protected + left - even
    return (
        emit.joined([first, emit.cut(tokens, 1, protected, middle)], 1),
        emit.joined([second, emit.cut(tokens, 1, middle)], 1) if odd else emit.cut(tokens, 1, middle),
    )


def unit(emit: Emit, value: Node) -> Node:
    """Rows of length 1."""
    squares = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, value, value), [-1], True)
    return emit(aten.div.Tensor, value, emit(aten.sqrt.default, squares))


def ones(emit: Emit, stream: Node) -> Node:
    """Each token counts as one: [batch, tokens, 1]."""
    return emit(aten.ones_like.default, emit.cut(stream, 2, 0, 1))
