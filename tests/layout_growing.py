"""Builders of operators that only move numbers: reshapes, transposes, slices, joins, and chains of them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch.fx import Node

from tests.growing import Grower

aten = torch.ops.aten


def _flatten(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) < 2:
        return None
    if g.pick(True, False):
        return g.call(aten.flatten.using_ints, x, g.pick(1, len(g.shape(x)) - 1))
    return g.call(aten.reshape.default, x, [g.call(aten.sym_size.int, x, 0), -1])


def _split_axis(g: Grower, x: Node) -> Node | None:
    sizes = g.shape(x)
    if len(sizes) > 2 or sizes[-1] % 2 or sizes[-1] < 4:
        return None
    batch = g.call(aten.sym_size.int, x, 0)
    halves = [*sizes[:-1], 2, sizes[-1] // 2]
    spelling = g.pick("reshape", "view", "unflatten")
    if spelling == "unflatten":
        return g.call(aten.unflatten.int, x, -1, halves[-2:])
    if spelling == "view" and x.meta["val"].is_contiguous():
        return g.call(aten.view.default, x, [batch, *halves])
    return g.call(aten.reshape.default, x, [batch, *halves])


def _permute(g: Grower, x: Node) -> Node | None:
    rank = len(g.shape(x)) + 1
    if rank < 3:
        return None
    spelling = g.pick("transpose", "permute", "mT", "movedim", "swapaxes")
    if spelling == "transpose":
        return g.call(aten.transpose.int, x, -1, g.pick(-2, -1, 1))
    if spelling == "mT":
        return g.call(aten.mT.default, x)
    if spelling == "movedim":
        return g.call(aten.movedim.int, x, 1, -1)
    if spelling == "swapaxes":
        return g.call(aten.swapaxes.default, x, 1, rank - 1)
    order = g.draw(st.permutations(list(range(1, rank))))
    return g.call(aten.permute.default, x, [0, *(d - rank if g.pick(True, False) else d for d in order)])


def _cat(g: Grower, x: Node) -> Node | None:
    if not g.small(x):
        return None
    return g.call(aten.cat.default, [x, g.call(aten.abs.default, x)], g.pick(1, -1))


def _split(g: Grower, x: Node) -> Node | None:
    size = g.shape(x)[-1]
    if size < 2:
        return None
    if g.pick(True, False):
        pieces = g.call(aten.chunk.default, x, 2, -1)
    else:
        pieces = g.call(aten.split.Tensor, x, (size + 1) // 2, -1)
    parts = [g.call(operator.getitem, pieces, i) for i in range(2)]
    return g.call(aten.cat.default, parts[::-1], -1)


def _slice(g: Grower, x: Node) -> Node | None:
    size = g.shape(x)[-1]
    return g.call(aten.slice.Tensor, x, -1, g.pick(0, 1), size, g.pick(1, 2)) if size > 2 else None


def _select(g: Grower, x: Node) -> Node | None:
    return g.call(aten.select.int, x, g.pick(1, -1), g.pick(0, -1)) if len(g.shape(x)) > 1 else None


def _unsqueeze(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) > 2:
        return None
    wide = g.call(aten.unsqueeze.default, x, g.pick(1, -1))
    return g.call(aten.relu.default, wide) if g.pick(True, False) else wide


def _squeeze(g: Grower, x: Node) -> Node | None:
    return g.call(aten.squeeze.dim, x, g.pick(1, -1)) if len(g.shape(x)) > 1 else None


def _expand(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) > 2 or not g.small(x):
        return None
    wide = g.call(aten.unsqueeze.default, x, 1)
    if g.pick(True, False):
        return g.call(aten.expand.default, wide, [-1, 2, *g.shape(x)])
    return g.call(aten.expand_as.default, wide, g.call(aten.cat.default, [wide, wide], 1))


def _layout_chain(g: Grower, x: Node) -> Node | None:
    """Reshapes and permutes in a row, some of which undo others; now and then one is read twice."""
    start, value = x, x
    for _ in range(g.pick(2, 3, 4, 5)):
        value = _layout_step(g, value, start) or value
        if value is not x and g.pick(False, False, False, True):
            g.seen.append(value)
    if g.seen and g.pick(False, True):
        other = g.call(aten.reshape.default, g.seen[-1], [g.call(aten.sym_size.int, value, 0), *g.shape(value)])
        value = g.call(aten.add.Tensor, value, other)
    g.seen.clear()
    return value


def _layout_step(g: Grower, x: Node, start: Node) -> Node | None:
    sizes = g.shape(x)
    kind = g.pick("permute", "permute", "back", "split", "join", "unsqueeze", "squeeze", "whole", "batch")
    if kind == "permute" and len(sizes) > 1:
        return g.call(aten.permute.default, x, [0, *g.draw(st.permutations(list(range(1, len(sizes) + 1))))])
    if kind == "back":
        return g.call(aten.reshape.default, x, [g.call(aten.sym_size.int, start, 0), *g.shape(start)])
    axis = g.draw(st.integers(0, len(sizes) - 1)) if sizes else 0
    if kind == "split" and len(sizes) < 4 and sizes and sizes[axis] > 1:
        factor = next(f for f in range(2, sizes[axis] + 1) if sizes[axis] % f == 0)
        cut = g.pick((factor, sizes[axis] // factor), (sizes[axis] // factor, factor))
        return g.call(aten.reshape.default, x, [-1, *sizes[:axis], *cut, *sizes[axis + 1 :]])
    if kind == "join" and axis + 1 < len(sizes):
        return g.call(aten.reshape.default, x, [-1, *sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]])
    if kind == "unsqueeze" and len(sizes) < 4:
        return g.call(aten.unsqueeze.default, x, axis + 1)
    if kind == "squeeze" and 1 in sizes:
        return g.call(aten.squeeze.dim, x, sizes.index(1) + 1)
    if kind == "whole":
        whole = [-1] * (len(sizes) + 1)
        return g.call(aten.expand.default, x, whole) if g.pick(False, True) else g.call(aten.slice.Tensor, x)
    return None


def _pieces(g: Grower, x: Node) -> Node | None:
    """Cut along an axis, cut again, joined again: in order, out of order, or in part."""
    size = g.shape(x)[-1]
    if size < 4:
        return None
    kind = g.pick("slices", "split and cat", "cat and split", "cat of cats", "unbind and stack")
    if kind == "slices":
        inner = g.call(aten.slice.Tensor, x, -1, g.pick(0, 1), g.pick(size, size - 1, 2**63 - 1), g.pick(1, 1, 2))
        outer = g.call(aten.slice.Tensor, inner, -1, 0, 2, g.pick(1, 2))
        return (
            g.call(aten.select.int, inner, -1, g.pick(0, -1)) if g.pick(False, True) and len(g.shape(x)) > 1 else outer
        )
    if kind == "split and cat":
        pieces = g.call(aten.split_with_sizes.default, x, [1, size - 2, 1], -1)
        parts = [g.call(operator.getitem, pieces, i) for i in range(3)]
        return g.call(aten.cat.default, g.pick(parts, parts, parts[::-1], parts[:2], [parts[1], *parts[:2]]), -1)
    other = g.call(aten.tanh.default, x)
    if kind == "unbind and stack":
        pieces = g.call(aten.unbind.int, x, -1)
        parts = [g.call(operator.getitem, pieces, i) for i in range(size)]
        return g.call(aten.stack.default, parts if g.pick(False, True) else parts[::-1], -1)
    joined = g.call(aten.cat.default, [x, other], -1)
    if kind == "cat of cats":
        return g.call(aten.cat.default, [other, joined], -1) if g.small(x) else None
    first = g.pick(size, size, size - 1)
    pieces = g.call(aten.split_with_sizes.default, joined, [first, 2 * size - first], -1)
    parts = [g.call(operator.getitem, pieces, i) for i in range(2)]
    return g.call(aten.mul.Tensor, *parts) if first == size else g.call(aten.cat.default, parts[::-1], -1)


LAYOUT: dict[str, Callable[[Grower, Node], Node | None]] = {
    "flatten": _flatten,
    "split axis": _split_axis,
    "permute": _permute,
    "cat": _cat,
    "split": _split,
    "slice": _slice,
    "select": _select,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "layout chain": _layout_chain,
    "pieces": _pieces,
}
"""Name → builder."""
