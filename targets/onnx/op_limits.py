"""What torch's ONNX exporter refuses, told before it is asked. A test asks it, and the two agree.

Source: torch 2.13's exporter, whose registry has no function for these and no decomposition that ends in one; and its
``aten_scaled_dot_product_attention``, which takes queries, keys and values of four dims.
"""

from __future__ import annotations

from torch.fx import Node

from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program

_NO_FUNCTION = frozenset({"aten.sort.stable", "aten.argsort.stable", "aten.masked_select.default"})
_ATTENTION = "aten.scaled_dot_product_attention.default"
_ATTENTION_RANK = 4


def refused(program: Program) -> list[VlexportError]:
    """Every call that the exporter is known to stop at."""
    return [
        CapabilityError(
            "VLX0503", f"ONNX cannot express {dialect.op_name(node)}: {reason}", where=provenance.describe(node),
            hint="rewrite that line with other operators",
        )
        for node in program.calls()
        if (reason := _reason(node))
    ]  # fmt: skip


def _reason(node: Node) -> str:
    name = dialect.op_name(node)
    if name in _NO_FUNCTION:
        return "torch's exporter has no function for it"
    if name == _ATTENTION:
        ranks = [operand.meta["val"].ndim for operand in node.args[:3] if isinstance(operand, Node)]
        if any(rank != _ATTENTION_RANK for rank in ranks):
            return f"torch's exporter takes attention over 4 dims, not {max(ranks)}"
    return ""
