"""fuse-biased-attention: as fuse-attention, where a mask or bias is added to the scores.

Before → after::

    %0 = MatMul(x, @w) + @b                        %0 = Expand(bias, batch, heads, length, length)
    … %q, %k, %v                             →     %1 = com.microsoft.Attention(x, @w', @b', , , %0) num_heads=2
    %9 = Softmax(scale · %q · %kᵀ + bias)          return %1
    … %9 · %v, transpose, reshape …

Equation: ``Attention(x, w, b, bias) = softmax(scale · q kᵀ + bias) v``. A stored causal mask becomes
``unidirectional=1``. Where a row that is masked as a whole gave zeros, rows of the result are set to zeros: which they
are is told by the mask, once for all layers that share it.

Does not apply when: nothing is added (that is fuse-attention's), what fuse-attention tells, several masks are added one
after the other, the mask has dims of its own, or each head is masked in its own way and may be masked as a whole.
Numerical effect: rounding; products are added up in another order. Scores that overflow are no longer set to zeros.
Source: ONNX Runtime, contributed operators, com.microsoft.Attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir

from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.attention_site import NoSite, Site, site, sites
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import Attributes, put, stored
from vlexport.targets.onnxruntime.attention_operator import become, in_order, require_servable, written
from vlexport.targets.onnxruntime.projections import Projection, packed, projections, query_of
from vlexport.targets.onnxruntime.score_bias import (
    content,
    dead_rows,
    expanded,
    is_causal,
    is_same_for_all_heads,
    may_mask_whole_rows,
)

_PATTERN = "projections → attention with a mask"
_NO_MASK = "no mask tells which rows become zeros"


class FuseBiasedAttention(Pass[OnnxModel]):
    """As fuse-attention, where a mask or bias is added to the scores."""

    name: ClassVar[str] = "fuse-biased-attention"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every softmax that a product reads."""
        return sites(ir, _PATTERN, _read)

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of all, behind what it needs of the mask."""
        found: Site = match.data[0]
        before, where = len(ir.nodes()), module_path(match.node)
        bias, last = found.bias, found.made.producer()
        assert bias is not None
        assert last is not None
        operands = packed(ir, found, match.data[1])
        attributes: Attributes = found.attributes()
        known = content(bias)
        if known is not None and is_causal(known):
            attributes = {**attributes, "unidirectional": 1}
        else:
            value = operands[0]
            assert value is not None
            operands = [*operands, None, None, expanded(ir, found, value, value, last)]
        project = query_of(ir, found, operands)
        if found.guarded and may_mask_whole_rows(bias):
            made = written(ir, found, "Attention", operands, project=project, attributes=attributes)
            made.outputs[0].type = found.made.type
            zero = stored(ir, f"{where or 'main'}.zero", np.zeros((), np.float32))
            choice = [dead_rows(ir, found, last), zero, made.outputs[0]]
            put(ir, found.made, "Where", choice, origin=match.node, rows=found.rows)
            in_order(ir, found)
        else:
            become(ir, found, "Attention", operands, project=project, attributes=attributes)
        return Change(what="attention with its mask as one operator", where=(where,),
                      saved_nodes=before - len(ir.nodes()))  # fmt: skip


def _read(softmax: onnx_ir.Node) -> tuple[Site, list[Projection]]:
    found = site(softmax)
    linears = projections(found)
    require_servable(found, linears[0].value)
    if found.bias is None:
        raise NoSite(_NO_MASK if found.guarded else "nothing is added to the scores")
    if found.guarded and may_mask_whole_rows(found.bias) and not is_same_for_all_heads(found.bias):
        raise NoSite("each head has a mask of its own, and a row of it may be masked as a whole")
    return found, linears
