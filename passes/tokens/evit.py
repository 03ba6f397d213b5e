"""EViT: the patch tokens that the class token attends to most stay; the rest becomes one token, or goes.

Equation: with a the class token's mean attention and T its k largest patches,
``x' = [protected, x_T, Σ_{i∉T} a_i·x_i]``, behind the attention's residual sum and in front of the MLP. The weights of
the rest are a with T's entries masked: a total from which the kept ones are subtracted would cancel.

Source: Liang et al., Not All Patches are What You Need, ICLR 2022. The authors' code leaves the fused token out unless
told otherwise; the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.passes.tokens.blocks import Block
from vlexport.passes.tokens.class_attention import class_row
from vlexport.passes.tokens.emit import Emit, aten, size
from vlexport.passes.tokens.sweep import Reduced, Reduction, State, refused


@dataclass(frozen=True)
class Evit(Reduction):
    """At one block.

    Attributes:
        block: Where.
        keep: How many patch tokens stay.
        fuse: The rest becomes one token.
    """

    block: Block
    keep: int
    fuse: bool

    def apply(self, state: State) -> Reduced:
        """See the module."""
        emit, front = state.emit, state.protected
        patches = state.tokens - front
        shares = emit.cut(class_row(emit, state.query, state.key, state.scale, state.weights), 1, front)
        best = emit.item(emit(aten.topk.default, shares, self.keep, 1, True, True), 1)
        rest = emit.cut(state.stream, 1, front)
        parts = [emit.cut(state.stream, 1, 0, front), emit.rows(rest, best)]
        what = f"evit: {self.keep} of {patches} patch tokens stay"
        if not self.fuse:
            return Chosen(emit.joined(parts, 1), what, best=best, patches=patches, attention=self.block.attention)
        places = emit.one_hot(best, patches, state.stream)
        others = emit(aten.rsub.Scalar, emit(aten.sum.dim_IntList, places, [1], False), 1)
        left = emit(aten.unsqueeze.default, emit(aten.mul.Tensor, shares, others), 1)
        parts.append(emit(aten.matmul.default, left, rest))
        stream = emit.joined(parts, 1)
        return Chosen(
            stream, f"{what}, the others become one", best=best, patches=patches, attention=self.block.attention,
            places=places, others=others,
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen(Reduced):
    """Some tokens stayed, in the order of ``best``; with ``others`` there is one behind them for all that did not.

    Attributes:
        best: Which stayed, [batch, k].
        patches: Of how many.
        attention: Of the block, for messages.
        places: One row for each that stayed, 1 where it was, [batch, k, patches].
        others: 1 for those that did not stay, [batch, patches].
    """

    best: Node | None = None
    patches: int = 0
    attention: Node | None = None
    places: Node | None = None
    others: Node | None = None

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Those that stayed return to their places, all others are the fused token."""
        if self.places is None or self.others is None or self.attention is None:
            assert self.attention is not None
            raise refused(self.attention, "dropped tokens went nowhere, so they cannot be given back (fuse=true keeps one)")
        front = size(tokens, 1) - size(self.places, 1) - 1
        columns = emit(aten.permute.default, self.places, [0, 2, 1])
        last = emit(aten.unsqueeze.default, self.others, -1)
        whole = emit.joined([columns, last], -1)
        rest = emit(aten.matmul.default, whole, emit.cut(tokens, 1, front))
        return emit.joined([emit.cut(tokens, 1, 0, front), rest], 1)
