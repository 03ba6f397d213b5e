"""ToMe: in every block, r tokens merge into the ones that their keys are most like.

Equation: with k the keys' mean over heads, rows of length 1, ``s = k_even · k_oddᵀ``; of the even tokens' best edges
the r strongest merge, ``x' = Σ w·x / Σ w`` over what falls together, w how many tokens each stands for. Later
attentions count a token as many: ``softmax(q·kᵀ + log w)``. Behind the attention's residual sum, in front of the MLP.
Protected tokens stay, first and in their order, where the authors know a class and a distillation token.

Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.passes.tokens import bipartite
from vlexport.passes.tokens.blocks import Block
from vlexport.passes.tokens.emit import Emit, aten, size
from vlexport.passes.tokens.sweep import Reduced, Reduction, State

_BELOW_COSINES = -4.0


@dataclass(frozen=True)
class Tome(Reduction):
    """At one block.

    Attributes:
        block: Where.
        count: How many tokens merge.
    """

    block: Block
    count: int

    def apply(self, state: State) -> Reduced:
        """See the module."""
        emit = state.emit
        metric = bipartite.unit(emit, emit(aten.mean.dim, state.key, [1], False, None))
        even, odd = bipartite.even_and_odd(emit, metric, 1)
        scores = emit(aten.matmul.default, even, emit(aten.permute.default, odd, [0, 2, 1]))
        scores = bipartite.shielded(emit, scores, state.protected, _BELOW_COSINES)
        way = bipartite.one_way(emit, scores, self.count, ordered=True)
        weights = state.weights or bipartite.ones(emit, state.stream)
        total = self._merged(emit, way, weights, state.protected)
        weighed = self._merged(emit, way, emit(aten.mul.Tensor, state.stream, weights), state.protected)
        stream = emit(aten.div.Tensor, weighed, total)
        what = f"tome: {self.count} of {state.tokens} tokens merge"
        return Merged(stream, what, total, way=way, protected=state.protected)

    def _merged(self, emit: Emit, way: bipartite.OneWay, value: Node, protected: int) -> Node:
        left, right = bipartite.merge(emit, way, *bipartite.even_and_odd(emit, value, 1), axis=-2)
        return bipartite.put_together(emit, left, right, protected)


@dataclass(frozen=True)
class Merged(Reduced):
    """Even tokens went into odd ones.

    Attributes:
        way: Which.
        protected: Tokens at the front that stay.
    """

    way: bipartite.OneWay | None = None
    protected: int = 0

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Each former token is the one that it went into."""
        assert self.way is not None
        left, right = bipartite.taken_apart(emit, tokens, self.protected, size(self.way.stays, 1))
        return bipartite.interleaved(emit, bipartite.unmerge(emit, self.way, left, right), right)
