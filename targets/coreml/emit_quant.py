"""emit_quant: quantization spelled as coremltools converts it.

Inputs of linears and convolutions pass through MIL's ``quantize`` and ``dequantize``; weights are constants that unpack
on load or tile by tile (``constexpr_affine_dequantize``, from iOS 18 on ``constexpr_blockwise_shift_scale``); a bias
stays float, and ``linear`` stays one operator. Source: coremltools guide, Quantization Overview.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from vlexport.core.bundle_schema import Change
from vlexport.ir.program import Program
from vlexport.passes.quantization.decisions import Decisions, LayerDecision
from vlexport.passes.quantization.spell import spell


def emit_quant(program: Program, decisions: Decisions, nodes: Mapping[str, Node], layer: LayerDecision) -> Change:
    """Spell one quantized call.

    Args:
        program: Changed in place.
        decisions: All of them.
        nodes: Key → node, of the Program before any was spelled.
        layer: The call.
    """
    return spell(program, decisions, nodes[layer.call], layer)
