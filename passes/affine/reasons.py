"""Why a batch norm or a sum of branches stays, where no rule of the affine domain has said so already."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.affine.analysis import Analysis, Miss
from vlexport.passes.affine.expression import is_identity
from vlexport.passes.affine.reading import BATCH_NORM, Added

_PRODUCERS = (*dialect.CONVOLUTIONS, *dialect.TRANSPOSED_CONVOLUTIONS, "aten.linear.default")
_NORM, _SUM = "conv → batch_norm", "sum of branches"


def reason_for(analysis: Analysis, node: Node) -> Miss | None:
    """Why ``node`` is left as it is, or None where nobody would expect anything else."""
    if dialect.op_name(node) == BATCH_NORM:
        return Miss(_NORM, _of_norm(analysis, node))
    reading = analysis.readings.get(node)
    return _of_sum(analysis, reading) if isinstance(reading, Added) else None


def _of_norm(analysis: Analysis, node: Node) -> str:
    if node in analysis.refused:
        return analysis.refused[node]
    producer: Any = node.args[0]
    if producer in analysis.refused:
        return analysis.refused[producer]
    name = dialect.op_name(producer)
    if name not in _PRODUCERS:
        return f"its operand is made by {name.removeprefix('aten.')}, not by a convolution or linear"
    if name == "aten.linear.default" and producer.meta["val"].ndim != 2:
        return "the linear's output has a token axis where batch norm expects channels"
    return f"the {dialect.plain_name(producer)}'s output is used by {len(producer.users) - 1} other(s)"


def _of_sum(analysis: Analysis, reading: Added) -> Miss | None:
    """Branches of one value, but for one operator between."""
    for one, other in ((reading.first, reading.second), (reading.second, reading.first)):
        if one in analysis.refused:
            return Miss(_SUM, analysis.refused[one])
        if one in analysis.readings or one.op != "call_function" or len(one.all_input_nodes) != 1:
            continue
        inside = {
            form.root for form in analysis.forms.get(one.all_input_nodes[0], ()) if not is_identity(form.expression)
        }
        outside = {other, *(form.root for form in analysis.forms.get(other, ()))}
        if inside & outside:
            return Miss(_SUM, f"a {dialect.plain_name(one)} stands between")
    return None
