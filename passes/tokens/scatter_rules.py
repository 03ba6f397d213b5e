"""Scatters to places that the data decides, as products with one-hot matrices.

Before → after, for tokens merged into others (ToMe)::

    %1 = expand(index [b,r,1], [−1,−1,c])              %1 = eq(index [b,1,r], 0 … n−1 [n,1])  [b,n,r]
    %2 = scatter_reduce(x, −2, %1, y, 'sum')      →    %2 = x + matmul(%1 as numbers, y)
    … 'mean'                                      →    (x + matmul(%1, y)) / (1 + sum(%1, −1))
    … 'amax'                                      →    maximum(x, amax(where(%1, y, −inf), over r))
    scatter(x, −2, %1, y), of distinct places     →    where(any(%1, −1), gather(y, −2, which(%1)), x)
    scatter(x, −1, index, 3.0)                    →    where(any(%1), 3.0, x)

The same along the last axis, where the matrix stands on the right; other axes are moved there first. What is summed
has to be finite: 0 · inf is no number.

Equation: ``out_j = x_j + Σ_i [index_i = j] y_i``.
Source: Bolya et al. 2023, ToMe, arXiv 2210.09461, appendix D (merging as a scatter).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.scattered import Scattered, scattered_at
from vlexport.passes.tokens.writer import Writer, shape_of

aten = torch.ops.aten


def find(ir: Program, node: Node) -> tuple[Node, ...] | str | None:
    """The call of a scatter, why it stays, or None."""
    found = scattered_at(ir, node)
    return (node,) if isinstance(found, Scattered) else found


def write(ir: Program, node: Node) -> str:
    """Put products with a one-hot matrix in place of a scatter."""
    found = scattered_at(ir, node)
    assert isinstance(found, Scattered)
    writer = Writer(ir, node)
    target, source, index, back = _moved(writer, found)
    new = _Form(writer, found, target, source, index, rows=back is None).written()
    if back == "squeezed":
        new = writer(aten.unsqueeze.default, new, -1)
    elif isinstance(back, list):
        new = writer(aten.permute.default, new, back)
    ir.replace(node, new)
    return f"{dialect.plain_name(node)} written with a one-hot matrix"


def _moved(writer: Writer, found: Scattered) -> tuple[Node, Node | None, Node, list[int] | str | None]:
    """Target, source and index with the axis last, and what undoes that; None as the last where they stay rows."""
    index = found.index
    for at, times in enumerate(found.as_rows or ()):
        for _ in range(times):
            index = writer(aten.unsqueeze.default, index, -1 if at else 0)
    rank, axis, behind = len(shape_of(found.target)), found.axis, found.index_shape[found.axis + 1 :]
    if axis == rank - 1:
        return found.target, found.source, index, ""
    if axis == rank - 2 and behind == (1,) and shape_of(found.target)[-1] != 1:
        return found.target, found.source, index, None
    if axis == rank - 2 and shape_of(found.target)[-1] == 1:
        thin = [writer(aten.squeeze.dim, n, -1) if n is not None else None for n in (found.target, found.source, index)]
        assert thin[0] is not None
        assert thin[2] is not None
        return thin[0], thin[1], thin[2], "squeezed"
    order = [a for a in range(rank) if a != axis] + [axis]
    moved = [
        writer(aten.permute.default, n, order) if n is not None else None for n in (found.target, found.source, index)
    ]
    assert moved[0] is not None
    assert moved[2] is not None
    return moved[0], moved[1], moved[2], [order.index(a) for a in range(rank)]


@dataclass(frozen=True)
class _Form:
    """A scatter whose axis is in its place.

    Attributes:
        writer: Where it is written.
        found: What it does.
        target: ``[…, n, c]`` with rows, else ``[…, n]``.
        source: Likewise, with ``r``; None for ``fill``.
        index: Likewise, with ``r``, and 1 in place of ``c``.
        rows: Whether whole rows are written.
    """

    writer: Writer
    found: Scattered
    target: Node
    source: Node | None
    index: Node
    rows: bool

    @property
    def over(self) -> int:
        """Which axis of the one-hot matrix ``r`` is: it is ``[…, n, r]`` with rows, else ``[…, r, n]``."""
        return -1 if self.rows else -2

    def written(self) -> Node:
        """The value of the scatter."""
        w, how, target, source = self.writer, self.found.how, self.target, self.source
        hot = self.one_hot()
        dtype = target.meta["val"].dtype if target.meta["val"].is_floating_point() else torch.float32
        numbers = w(aten._to_copy.default, hot, dtype=dtype)
        if source is None:
            met = w.stored("filled", torch.tensor(self.found.value, dtype=target.meta["val"].dtype))
        elif how == "assign":
            met = self.picked(hot, source)
        elif how in ("amax", "amin"):
            met = self.extreme(hot, source)
            if self.found.keeps:
                return w(aten.maximum.default if how == "amax" else aten.minimum.default, target, met)
        else:
            met = self.product(numbers, source)
            if self.found.keeps:
                total = w(aten.add.Tensor, target, met)
                return total if how == "sum" else w(aten.div.Tensor, total, w(aten.add.Tensor, self.counts(numbers), 1))
        counts = self.counts(numbers)
        if how == "mean":
            met = w(aten.div.Tensor, met, w(aten.clamp_min.default, counts, 1))
        return w(aten.where.self, w(aten.gt.Scalar, counts, 0), met, target)

    def counts(self, numbers: Node) -> Node:
        """How many values meet in each place."""
        return self.writer(aten.sum.dim_IntList, numbers, [self.over], self.rows)

    def one_hot(self) -> Node:
        """Which of the ``r`` goes to which of the ``n``, true or false."""
        w = self.writer
        if self.rows:
            index = w(aten.unsqueeze.default, w(aten.squeeze.dim, self.index, -1), -2)
            return w(aten.eq.Tensor, index, w.places(self.found.size, behind=1))
        return w(aten.eq.Tensor, w(aten.unsqueeze.default, self.index, -1), w.places(self.found.size))

    def product(self, numbers: Node, source: Node) -> Node:
        """Sums of the values that meet in each place."""
        w, rank = self.writer, len(shape_of(self.target))
        if self.rows:
            return w(aten.matmul.default, numbers, source)
        if rank > 1 and shape_of(self.index)[-2] == 1:  # one matrix for all rows
            return w(aten.matmul.default, source, w(aten.squeeze.dim, numbers, -3))
        return w(aten.squeeze.dim, w(aten.matmul.default, w(aten.unsqueeze.default, source, -2), numbers), -2)

    def picked(self, hot: Node, source: Node) -> Node:
        """The value written to each place, of any where none is."""
        w = self.writer
        order = w.places(self.found.count, behind=-1 - self.over)
        chosen = w(aten.mul.Tensor, w(aten._to_copy.default, hot, dtype=torch.int64), order)
        which = w(aten.sum.dim_IntList, chosen, [self.over], self.rows)
        sizes = [
            -1 if str(have) == str(want) else want if isinstance(want, int) else w(aten.sym_size.int, self.target, axis)
            for axis, (have, want) in enumerate(zip(shape_of(which), shape_of(self.target), strict=True))
        ]
        return w(aten.gather.default, source, -2 if self.rows else -1, w(aten.expand.default, which, sizes))

    def extreme(self, hot: Node, source: Node) -> Node:
        """The largest, or smallest, of the values that meet in each place."""
        w, largest = self.writer, self.found.how == "amax"
        if self.rows:
            hot, source = w(aten.unsqueeze.default, hot, -1), w(aten.unsqueeze.default, source, -3)
        else:
            source = w(aten.unsqueeze.default, source, -1)
        nothing = w.stored("nothing", torch.tensor(-math.inf if largest else math.inf, dtype=source.meta["val"].dtype))
        reduce = aten.amax.default if largest else aten.amin.default
        return w(reduce, w(aten.where.self, hot, source, nothing), [-2])
