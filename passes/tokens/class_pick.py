"""cls: of what an encoder gives out, the patches that the class token attends to most over several layers.

Equation: with aˡ the class token's mean attention at layer l, ``T = top-k of mean_l aˡ`` over the patches, in their
order; ``x' = [protected, x_T]`` behind the last block. Nothing in the encoder changes: what reads its tokens (a
language model) reads fewer.

Source: Wang et al., VTC-CLS (visual token compression by the class token), 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.bipartite import in_order
from vlexport.passes.tokens.blocks import Block
from vlexport.passes.tokens.class_attention import class_row
from vlexport.passes.tokens.emit import aten, size
from vlexport.passes.tokens.sweep import Reduced, Reduction, State


@dataclass(frozen=True)
class ClassPick(Reduction):
    """Behind the encoder.

    Attributes:
        block: The last one.
        end: The stream behind it.
        read: Blocks whose attention is averaged.
        keep: How many patches are given out.
    """

    block: Block
    end: Node
    read: tuple[Block, ...]
    keep: int

    @property
    def place(self) -> Node:
        """The stream behind the last block."""
        return self.end

    def apply(self, state: State) -> Reduced:
        """See the module."""
        emit, front = state.emit, state.protected
        total: Node | None = None
        for block in self.read:
            query, key, _, _, _, _, scale, _ = dialect.operands(block.attention)
            scale = size(query, 3) ** -0.5 if scale is None else float(scale)
            row = class_row(emit, query, key, scale, None)
            total = row if total is None else emit(aten.add.Tensor, total, row, 1)
        assert total is not None
        patches = state.tokens - front
        best = emit.item(emit(aten.topk.default, emit.cut(total, 1, front), self.keep, 1, True, True), 1)
        index = in_order(emit, best, patches, like=state.stream)
        rest = emit.rows(emit.cut(state.stream, 1, front), index)
        head = [emit.cut(state.stream, 1, 0, front)]
        return Reduced(emit.joined([*head, rest], 1), f"cls: {self.keep} of {patches} patch tokens are given out")
