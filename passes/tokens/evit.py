"""EViT: the patch tokens that the class token attends to most stay; the rest becomes one token, or goes.

Equation: with a the class token's mean attention and T its k largest patches,
``x' = [protected, x_T, Σ_{i∉T} a_i·x_i]``, behind the attention's residual sum and in front of the MLP. The weights of
the rest are a with T's entries masked: a total from which the kept ones are subtracted would cancel.

That sum is small where the class token looks away, and it takes part in softmax as a single token: what the model was
trained to spread over many goes elsewhere. With ``count`` it is their mean, counted as many as it stands for, as merged
tokens are: ``Σ w·x / Σ w`` over the rest, ``softmax(q·kᵀ + log w)`` from there on, and T is chosen by ``a / w``.

Source: Liang et al., Not All Patches are What You Need, ICLR 2022. The authors' code leaves the fused token out unless
told otherwise; the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from vlexport.passes.tokens.bipartite import ones
from vlexport.passes.tokens.blocks import Block
from vlexport.passes.tokens.class_attention import class_row
from vlexport.passes.tokens.emit import Emit, aten, size
from vlexport.passes.tokens.squeeze import squeezed
from vlexport.passes.tokens.sweep import Reduced, Reduction, State, refused


@dataclass(frozen=True)
class Evit(Reduction):
    """At one block.

    Attributes:
        block: Where.
        keep: How many patch tokens stay.
        fuse: The rest becomes one token.
        count: That token is the mean of the rest, and counts as many.
        squeeze: The rest joins those that stay instead: see ``passes/tokens/squeeze``.
    """

    block: Block
    keep: int
    fuse: bool
    count: bool
    squeeze: bool

    def apply(self, state: State) -> Reduced:
        """See the module."""
        emit, front = state.emit, state.protected
        patches = state.tokens - front
        shares = emit.cut(class_row(emit, state.query, state.key, state.scale, state.weights), 1, front)
        rest = emit.cut(state.stream, 1, front)
        sizes = emit.cut(state.weights, 1, front) if state.weights is not None else None
        scores = shares
        if sizes is not None:
            scores = emit(aten.div.Tensor, shares, emit(aten.squeeze.dim, sizes, -1))
        best = emit.item(emit(aten.topk.default, scores, self.keep, 1, True, True), 1)
        parts = [emit.cut(state.stream, 1, 0, front), emit.rows(rest, best)]
        what = f"evit: {self.keep} of {patches} patch tokens stay"
        if self.squeeze:
            return squeezed(state, best, what)
        made = Chosen(parts[0], what, attention=self.block.attention)
        if not self.fuse:
            return replace(made, stream=emit.joined(parts, 1))
        places = emit.one_hot(best, patches, state.stream)
        others = emit(aten.rsub.Scalar, emit(aten.sum.dim_IntList, places, [1], False), 1)
        made = replace(made, what=f"{what}, the others become one", places=places, others=others)
        column = emit(aten.unsqueeze.default, others, -1)
        if not self.count:
            left = emit(aten.mul.Tensor, column, emit(aten.unsqueeze.default, shares, -1))
            parts.append(_total(emit, emit(aten.mul.Tensor, rest, left)))
            return replace(made, stream=emit.joined(parts, 1))
        left = column if sizes is None else emit(aten.mul.Tensor, column, sizes)
        total = _total(emit, left)
        parts.append(emit(aten.div.Tensor, _total(emit, emit(aten.mul.Tensor, rest, left)), total))
        weights = state.weights or ones(emit, state.stream)
        counted = [emit.cut(weights, 1, 0, front), emit.rows(emit.cut(weights, 1, front), best), total]
        return replace(
            made, what=f"{made.what} that counts as they do", stream=emit.joined(parts, 1),
            weights=emit.joined(counted, 1),
        )  # fmt: skip


def _total(emit: Emit, value: Node) -> Node:
    """The sum over tokens, [batch, 1, channels]."""
    return emit(aten.sum.dim_IntList, value, [1], True)


@dataclass(frozen=True)
class Chosen(Reduced):
    """Some tokens stayed, in their order of attention; with ``others`` one behind them is all that did not.

    Attributes:
        attention: Of the block, for messages.
        places: One row for each that stayed, 1 where it was, [batch, k, patches].
        others: 1 for those that did not stay, [batch, patches].
    """

    attention: Node | None = None
    places: Node | None = None
    others: Node | None = None

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Those that stayed return to their places, all others are the fused token."""
        assert self.attention is not None
        if self.places is None or self.others is None:
            raise refused(
                self.attention, "dropped tokens went nowhere, so they cannot be given back (fuse=true keeps one)"
            )
        front = size(tokens, 1) - size(self.places, 1) - 1
        columns = emit(aten.permute.default, self.places, [0, 2, 1])
        whole = emit.joined([columns, emit(aten.unsqueeze.default, self.others, -1)], -1)
        rest = emit(aten.matmul.default, whole, emit.cut(tokens, 1, front))
        return emit.joined([emit.cut(tokens, 1, 0, front), rest], 1)
