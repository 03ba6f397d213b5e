"""gather-rows: a gather of values one by one, where whole rows are wanted, becomes a gather of rows.

Before → after::

    %0 = Unsqueeze(%index, -1)                     %0 = Unsqueeze(%index, -1)
    %1 = Expand(%0, [batch, kept, width])    →     %1 = GatherND(x, %0) batch_dims=1
    %2 = GatherElements(x, %1) axis=1              return %1
    return %2

Equation: ``x[b, index[b, k, w], w]`` where ``index[b, k, w]`` is the same for all w is row ``x[b, index[b, k]]``. It is
how PyTorch writes a selection of tokens for each sample; rows are copied as a whole, and no index is stored ``width``
times.

Does not apply when: the index differs within a row, the axis is not the last but one, or dims in front of it are
broadcast or cut.
Numerical effect: none.
Source: ONNX, GatherElements-13, Expand-13 and GatherND-13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir

from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import put

_PATTERN = "gather of equal positions → gather of rows"


class GatherRows(Pass[OnnxModel]):
    """A gather of values one by one, where whole rows are wanted, becomes a gather of rows."""

    name: ClassVar[str] = "gather-rows"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every gather of values whose index is one of rows."""
        for node in ir.nodes("GatherElements"):
            rows = _rows(node)
            if isinstance(rows, str):
                yield NearMiss(_PATTERN, node, rows)
            else:
                yield Match(node, (node,), rows)

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of the gather; the index that was stored for each value goes with it."""
        rows: onnx_ir.Value = match.data
        before, values = len(ir.nodes()), match.node.inputs[0]
        assert rows.shape is not None
        attributes = {"batch_dims": len(rows.shape) - 2}
        put(ir, match.node.outputs[0], "GatherND", [values, rows], attributes=attributes, origin=match.node)
        where = (module_path(match.node),)
        return Change(what="gather of rows", where=where, saved_nodes=before - len(ir.nodes()))


def _rows(node: onnx_ir.Node) -> onnx_ir.Value | str:
    """The index of rows ``(batch…, kept, 1)``, or why there is none."""
    values, index = node.inputs
    assert values is not None
    assert index is not None
    source = index.producer()
    stretched = source is not None and source.op_type == "Expand" and not source.domain
    rows = source.inputs[0] if source is not None and stretched else index
    if rows is None or values.shape is None or index.shape is None or rows.shape is None:
        return "shapes are not known"
    of_values, of_index, of_rows = (tuple(each.shape or ()) for each in (values, index, rows))
    if any(isinstance(size, onnx_ir.SymbolicDim) and size.value is None for size in (*of_values, *of_index, *of_rows)):
        return "shapes are not known"  # two dims without a name may differ
    axis = node.attributes.get_int("axis", 0)
    if len(of_values) < 2 or axis % len(of_values) != len(of_values) - 2:
        return "it gathers along another axis than the last but one"
    if len(of_rows) != len(of_values) or of_rows[-1] != 1:
        return "the index differs within a row"
    if of_index[-1] != of_values[-1]:
        return "it takes a part of each row"
    if not of_values[:-2] == of_index[:-2] == of_rows[:-2] or of_rows[-2] != of_index[-2]:
        return "dims in front are broadcast or cut"
    return rows
