"""MCTF: tokens that are similar, uninformative and small merge, both ways, by the attention of the block they enter.

Equation: with a the attention that tokens receive, averaged over heads and queries, and w how many tokens each stands
for, an edge scores ``((cos + 1) / 2)^(1/1) · (ā_even·ā_odd)^(1/20) · (w̄_even·w̄_odd)^(1/40)``, where ``ā = 1/a`` and
``w̄ = 1/w`` are divided by their largest. Half of r merge from even to odd tokens, the rest from odd to even ones;
``x' = Σ a·w·x / Σ a·w``. The block attends one step ahead: its attention matrix, computed before, is merged as the
tokens are, so values alone are computed anew.

The block's attention is therefore written out: product, softmax, product. Protected tokens stay.

Source: Lee et al., Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers, CVPR
2024; temperatures are the authors' for DeiT.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.passes.tokens import bipartite
from vlexport.passes.tokens.blocks import Block
from vlexport.passes.tokens.emit import Emit, aten
from vlexport.passes.tokens.sweep import Reduced, Reduction, State

_SIMILARITY, _INFORMATION, _SIZE = 1.0, 20.0, 40.0
_BELOW_SCORES = -1.0
LEAST = 10
"""Tokens that a block leaves at least."""


@dataclass(frozen=True)
class Mctf(Reduction):
    """At one block.

    Attributes:
        block: Where.
        count: How many tokens merge.
    """

    block: Block
    count: int
    before_attention = True

    def apply(self, state: State) -> Reduced:
        """See the module."""
        emit = state.emit
        scores = emit(aten.matmul.default, state.query, emit(aten.permute.default, state.key, [0, 1, 3, 2]))
        scores = emit(aten.mul.Tensor, scores, state.scale)
        if state.weights is not None:
            logs = emit(aten.permute.default, emit(aten.log.default, state.weights), [0, 2, 1])
            scores = emit(aten.add.Tensor, scores, emit(aten.unsqueeze.default, logs, 1), 1)
        attention = emit(aten.softmax.int, scores, -1, None)
        received = emit(aten.unsqueeze.default, emit(aten.mean.dim, attention, [1, 2], False, None), -1)
        ways = self._ways(state, received)
        sizes = state.weights or bipartite.ones(emit, state.stream)
        largest = emit(aten.amax.default, sizes, [1], True)
        weight = emit(aten.mul.Tensor, received, emit(aten.div.Tensor, sizes, largest))
        total = ways.merged(emit, weight, -2)
        stream = ways.merged(emit, emit(aten.mul.Tensor, state.stream, weight), -2)
        keys = ways.merged(emit, attention, -1)
        rows = emit(aten.mul.Tensor, keys, emit(aten.unsqueeze.default, weight, 1))
        rows = ways.merged(emit, rows, -2)
        return Ahead(
            emit(aten.div.Tensor, stream, total), f"mctf: {self.count} of {state.tokens} tokens merge",
            ways.merged(emit, sizes, -2), ways=ways,
            attention=emit(aten.div.Tensor, rows, emit(aten.unsqueeze.default, total, 1)),
        )  # fmt: skip

    def _ways(self, state: State, received: Node) -> BothWays:
        emit, first = state.emit, self.count // 2
        even, odd = bipartite.even_and_odd(emit, bipartite.unit(emit, state.stream), 1)
        cosines = emit(aten.matmul.default, even, emit(aten.permute.default, odd, [0, 2, 1]))
        scores = emit(aten.div.Tensor, emit(aten.add.Tensor, cosines, 1.0, 1), 2.0)
        if _SIMILARITY != 1.0:
            scores = emit(aten.pow.Tensor_Scalar, scores, 1 / _SIMILARITY)
        scores = emit(aten.mul.Tensor, scores, _of_both(emit, received, 1 / _INFORMATION))
        if state.weights is not None:
            scores = emit(aten.mul.Tensor, scores, _of_both(emit, state.weights, 1 / _SIZE))
        scores = bipartite.shielded(emit, scores, state.protected, _BELOW_SCORES)
        there = bipartite.one_way(emit, scores, first, ordered=True) if first else None
        if there is not None:
            scores = bipartite.take(emit, scores, there.stays, -2)
        scores = emit(aten.permute.default, scores, [0, 2, 1])
        back = bipartite.one_way(emit, scores, self.count - first, ordered=state.protected > 1)
        return BothWays(there, back, state.protected)


def _of_both(emit: Emit, value: Node, exponent: float) -> Node:
    """``(v̄_even · v̄_odd)^exponent`` [batch, even, odd] of a value [batch, n, 1], where ``v̄ = 1/v`` over its largest."""
    inverse = emit(aten.reciprocal.default, value)
    inverse = emit(aten.div.Tensor, inverse, emit(aten.amax.default, inverse, [1], True))
    even, odd = bipartite.even_and_odd(emit, inverse, 1)
    product = emit(aten.mul.Tensor, even, emit(aten.permute.default, odd, [0, 2, 1]))
    return emit(aten.pow.Tensor_Scalar, product, exponent)


@dataclass(frozen=True)
class Ahead(Reduced):
    """Tokens merged both ways.

    Attributes:
        ways: Which.
    """

    ways: BothWays | None = None

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Each former token is the one that it went into."""
        assert self.ways is not None
        return self.ways.unmerged(emit, tokens)


@dataclass(frozen=True)
class BothWays:
    """Even tokens into odd ones, then odd ones into the even ones that are left.

    Attributes:
        there: The first; None where a single token merges.
        back: The second.
        protected: Tokens at the front that stay.
    """

    there: bipartite.OneWay | None
    back: bipartite.OneWay
    protected: int

    def merged(self, emit: Emit, value: Node, axis: int) -> Node:
        """Sums along an axis, −2 or −1, of what falls together."""
        place = value.meta["val"].ndim + axis
        even, odd = bipartite.even_and_odd(emit, value, place)
        if self.there is not None:
            even, odd = bipartite.merge(emit, self.there, even, odd, axis)
        stays, even = bipartite.merge(emit, self.back, odd, even, axis)
        return bipartite.put_together(emit, even, stays, self.protected, place)

    def unmerged(self, emit: Emit, tokens: Node) -> Node:
        """Each former token is the one that it went into."""
        even, odd = bipartite.taken_apart(emit, tokens, self.protected, self.back.targets)
        odd = bipartite.unmerge(emit, self.back, odd, even)
        if self.there is not None:
            even = bipartite.unmerge(emit, self.there, even, odd)
        return bipartite.interleaved(emit, even, odd)
