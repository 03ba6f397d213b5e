"""emit_quant: quantization spelled as TensorRT's parser and fusions want it.

int8 is symmetric on both sides: no zero point but 0 is taken, and no int32 bias, so a bias stays float. Only what feeds
a product is rounded: a rounded result would keep TensorRT from adding the bias, or an activation, in the same kernel.
float8 has the same form. Every ``dequantize`` has one product behind it.

Measured with the compiler of TensorRT for RTX 1.7.1, whose log lists the layers of an engine: such linears and
convolutions become layers that read INT8 or FP8 on both sides. Some linears with int8 weights alone become layers that
unpack them inside; the others, and convolutions, have them unpacked into half by a kernel of its own, at every run.
Source: TensorRT documentation, Working with Quantized Types, Q/DQ Layer-Placement Recommendations.
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
