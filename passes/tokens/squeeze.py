"""EViT, squeezed: of the tokens that the class token looks away from, each joins the kept one that it is most like.

A single token for all the rest is their mean, which is like none of them. Here, with T the patches that stay, as in
``passes/tokens/evit``, ``j(i) = argmax_{j∈T} cos(x_i, x_j)`` for every other patch i, and ``x'_j = Σ w·x / Σ w`` over j
and what joins it, w how many tokens each stands for. Later attentions count a token as many, as merged ones do:
``softmax(q·kᵀ + log w)``. Likeness costs k · (patches − k) · channels multiply-accumulates.

Source: Wei et al., Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision Transformers, CVPR
2023. They weigh what joins by its likeness; here it is weighed by how many it stands for, as in Bolya et al. (ToMe).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.passes.tokens import bipartite
from vlexport.passes.tokens.emit import Emit, aten, size
from vlexport.passes.tokens.sweep import Reduced, State


def squeezed(state: State, best: Node, what: str) -> Squeezed:
    """Patches at ``best`` [batch, k] stay, and take in the others.

    Args:
        state: Of the block.
        best: Places among the patches.
        what: In words, what stays.
    """
    emit, front = state.emit, state.protected
    patches, kept = state.tokens - front, size(best, 1)
    gone = bipartite.others(emit, best, patches, like=state.stream)
    rest = emit.cut(state.stream, 1, front)
    unit = bipartite.unit(emit, rest)
    likeness = emit(aten.matmul.default, emit.rows(unit, gone), _turned(emit, emit.rows(unit, best)))
    into = emit(aten.argmax.default, likeness, -1, False)
    way = bipartite.OneWay(best, gone, into, emit.one_hot(into, kept, state.stream), patches, kept)
    weights = state.weights or bipartite.ones(emit, state.stream)
    sizes = emit.cut(weights, 1, front)
    total = _met(emit, way, sizes)
    stream = emit(aten.div.Tensor, _met(emit, way, emit(aten.mul.Tensor, rest, sizes)), total)
    ahead = (emit.cut(each, 1, 0, front) for each in (state.stream, weights))
    joined = [emit.joined([first, then], 1) for first, then in zip(ahead, (stream, total), strict=True)]
    return Squeezed(joined[0], f"{what}, the others join the most alike", joined[1], way=way, protected=front)


def _met(emit: Emit, way: bipartite.OneWay, value: Node) -> Node:
    """Sums [batch, k, channels] over each that stays and what joins it, of a value [batch, patches, channels]."""
    added = emit(aten.matmul.default, _turned(emit, way.hot), emit.rows(value, way.merged))
    return emit(aten.add.Tensor, emit.rows(value, way.stays), added, 1)


def _turned(emit: Emit, value: Node) -> Node:
    return emit(aten.permute.default, value, [0, 2, 1])


@dataclass(frozen=True)
class Squeezed(Reduced):
    """Some patches took in the others.

    Attributes:
        way: Which went where.
        protected: Tokens at the front that stay.
    """

    way: bipartite.OneWay | None = None
    protected: int = 0

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Each former token is the one that it joined."""
        assert self.way is not None
        stays = emit.cut(tokens, 1, self.protected)
        rest = bipartite.unmerge(emit, self.way, stays, stays)
        return emit.joined([emit.cut(tokens, 1, 0, self.protected), rest], 1)
