"""fuse-attention: projections, products, softmax and the moving of heads become one operator of ONNX Runtime.

Before → after::

    %0 = MatMul(x, @w: f32[8,24])                  %0 = com.microsoft.Attention(x, @w', @b') num_heads=2 scale=…
    %1 = Add(%0, @b: f32[24])                      return %0
    … reshape, transpose, slice, squeeze …
    %q, %k, %v                               →
    %9 = Softmax(scale · %q · %kᵀ)
    … %9 · %v, transpose, reshape …

Equation: ``Attention(x, [Wq Wk Wv], [bq bk bv]) = softmax(scale · q kᵀ) v`` for every head, heads joined. Columns of
the weights are put in the order of heads, whatever order the model keeps them in; three projections of one value
become one.

Does not apply when: a mask or bias is added to the scores (see fuse-biased-attention), the query is not of all
positions (as where the last block computes one token alone), the heads of key and value are fewer, one of the parts is
not a stored linear of the same value, or others read of the projections what the operator does not give: all but keys,
values, and the query of one position (see ``attention_operator``).
Numerical effect: rounding; products are added up in another order.
Source: ONNX Runtime, contributed operators, com.microsoft.Attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir

from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.attention_site import Site, plain_site, sites
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnxruntime.attention_operator import become, require_servable
from vlexport.targets.onnxruntime.projections import Projection, packed, projections, query_of

_PATTERN = "projections → attention"


class FuseAttention(Pass[OnnxModel]):
    """Projections, products, softmax and the moving of heads become one operator of ONNX Runtime."""

    name: ClassVar[str] = "fuse-attention"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every softmax that a product reads."""
        return sites(ir, _PATTERN, _read)

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of all."""
        found: Site = match.data[0]
        before, where = len(ir.nodes()), module_path(match.node)
        operands = packed(ir, found, match.data[1])
        become(ir, found, "Attention", operands, project=query_of(ir, found, operands))
        return Change(what="attention as one operator", where=(where,), saved_nodes=before - len(ir.nodes()))


def _read(softmax: onnx_ir.Node) -> tuple[Site, list[Projection]]:
    found = plain_site(softmax)
    linears = projections(found)
    require_servable(found, linears[0].value)
    return found, linears
