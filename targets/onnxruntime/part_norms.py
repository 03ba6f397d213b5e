"""part-norms: a sum that only a norm reads is written so that ONNX Runtime does not make one slow operator of both.

Before → after::

    %1 = Add(x, y)                                 %1 = Sum(x, y)
    %2 = LayerNormalization(%1, w, b)        →     %2 = LayerNormalization(%1, w, b)

Equation: ``Sum(x, y) = Add(x, y)`` where both have one shape. ONNX Runtime joins an Add with the norm behind it, where
nobody else reads it, as SkipLayerNormalization, whose CPU kernel takes longer than both (``fusion_costs.json`` has a
text tower with and without). It knows no Sum there. Transformers that put the norm behind the sum, as BERT does, have
two a block, others one at the end.

Does not apply when: others read the sum, or operands are not of three dims and one shape, as far as is known: ONNX
Runtime joins none of these.
Numerical effect: none but that the norm itself is computed by another kernel.
Source: ONNX, Sum-13; ONNX Runtime, SkipLayerNormFusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir

from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import put

_PATTERN = "sum and norm → apart"
_RANK = 3


class PartNorms(Pass[OnnxModel]):
    """A sum that only a norm reads is written so that ONNX Runtime does not make one slow operator of both."""

    name: ClassVar[str] = "part-norms"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every sum of two that only a norm reads."""
        for norm in ir.nodes("LayerNormalization"):
            total = norm.inputs[0].producer() if norm.inputs[0] is not None else None
            if total is None or total.op_type != "Add" or total.domain or not _only_reader(total, norm):
                continue
            reason = _unlike(total)
            yield NearMiss(_PATTERN, total, reason) if reason else Match(total, (total, norm), None)

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """The same operands, another operator."""
        put(ir, match.node.outputs[0], "Sum", list(match.node.inputs), origin=match.node)
        return Change(what="sum in front of a norm", where=(module_path(match.node),))


def _only_reader(total: onnx_ir.Node, norm: onnx_ir.Node) -> bool:
    made = total.outputs[0]
    return not made.is_graph_output() and [user for user, _ in made.uses()] == [norm]


def _unlike(total: onnx_ir.Node) -> str:
    """Why ONNX Runtime leaves a sum and its norm apart; nothing where it joins them."""
    first, second = (each.shape if each is not None else None for each in total.inputs)
    if first is None or second is None or any(_nameless(dim) for dim in (*first, *second)):
        return "sizes are not known"
    if len(first) != _RANK or list(first) != list(second):
        return "it does not add two of three dims and one shape"
    return ""


def _nameless(dim: int | onnx_ir.SymbolicDim) -> bool:
    return isinstance(dim, onnx_ir.SymbolicDim) and dim.value is None
