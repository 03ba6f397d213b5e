"""What the class token attends to, read beside an attention that stays one operator.

Equation: ``mean over heads of softmax(q₀·Kᵀ · scale + log w)``, with q₀ the class token's query and w how many tokens
each key stands for. It costs ``tokens · channels`` multiply-accumulates, a thousandth of the block.
"""

from __future__ import annotations

from torch.fx import Node

from vlexport.passes.tokens.emit import Emit, aten


def class_row(emit: Emit, query: Node, key: Node, scale: float, weights: Node | None) -> Node:
    """How much the class token attends to each token, [batch, tokens], summing to 1 a sample.

    Args:
        emit: Writes the calls.
        query: [batch, heads, tokens, width].
        key: Likewise.
        scale: Of the scores.
        weights: [batch, tokens, 1]; None while each token counts as one.
    """
    row = emit.cut(query, 2, 0, 1)
    scores = emit(aten.matmul.default, row, emit(aten.permute.default, key, [0, 1, 3, 2]))
    scores = emit(aten.mul.Tensor, scores, scale)
    if weights is not None:
        logs = emit(aten.permute.default, emit(aten.log.default, weights), [0, 2, 1])
        scores = emit(aten.add.Tensor, scores, emit(aten.unsqueeze.default, logs, 1), 1)
    shares = emit(aten.softmax.int, scores, -1, None)
    return emit(aten.mean.dim, shares, [1, 2], False, None)
