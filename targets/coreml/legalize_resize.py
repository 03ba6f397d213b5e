"""legalize-resize: bicubic and antialiased resizing, written as two matrix products with constants.

Before → after::

    upsample_bicubic2d(x)  (with or without antialias)      →   matmul(matmul(rows, x), columns)
    _upsample_bilinear2d_aa(x)

Equation: resizing is linear and separable: y[i, j] = Σ rows[i, a] · x[a, b] · columns[b, j]. Both matrices are what
torch's own operator makes of the identity, in float64, rounded once.
Does not apply when: height or width depends on the input.
Numerical effect: rounding only.
Source: coremltools 9.0 has no bicubic resizing, and converts the antialiased bilinear one to one without antialias
(converters/mil/frontend/torch/ops.py, ``_upsample_bilinear2d_aa``), which computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

aten = torch.ops.aten
_RESIZES = {
    f"aten.{name}.{overload}"
    for name in ("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa")
    for overload in ("vec", "default")
}


class LegalizeResize(Pass[Program]):
    """Resizing that Core ML does not have, as matrix products."""

    name: ClassVar[str] = "legalize-resize"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if dialect.op_name(node) not in _RESIZES:
                continue
            sizes = (*node.args[0].meta["val"].shape[2:], *node.meta["val"].shape[2:])  # type: ignore[union-attr]
            if any(isinstance(size, torch.SymInt) for size in sizes):
                yield NearMiss(dialect.plain_name(node), node, "height or width depends on the input")
            else:
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        was, place, before = dialect.plain_name(node), provenance.module_path(node), cost(ir)
        count = len(ir.calls())
        source: Any = node.args[0]
        rows, columns = (matrix.to(source.meta["val"].dtype) for matrix in _matrices(node))
        left = ir.add_tensor("resize_rows", rows, before=node, kind="constant")
        right = ir.add_tensor("resize_columns", columns, before=node, kind="constant")
        tall = ir.add_call(aten.matmul.default, (left, source), before=node, value_of=node)
        made = ir.add_call(aten.matmul.default, (tall, right), before=node, value_of=node)
        ir.replace(node, made)
        after = cost(ir)
        return Change(
            what=f"{was} written as two matrix products",
            where=(place,),
            saved_nodes=count - len(ir.calls()),
            saved_parameters=before.parameters - after.parameters,
            saved_macs=before.macs - after.macs,
        )


def _matrices(node: Node) -> tuple[Tensor, Tensor]:
    """(H_out × H_in) and (W_in × W_out), float64.

    One direction at a time: a picture of the identity's columns is resized along it and keeps its other size, which
    leaves that other direction as it is.
    """
    source: Any = node.args[0]
    height, width = (int(s) for s in source.meta["val"].shape[2:])
    tall, wide = (int(s) for s in node.meta["val"].shape[2:])
    align, by_height, by_width = _settings(node)
    operator: Any = getattr(aten, dialect.op_name(node).split(".")[1]).default
    eye = torch.eye(height, dtype=torch.float64).reshape(height, 1, height, 1)
    rows = operator(eye.expand(-1, -1, -1, 2).contiguous(), [tall, 2], align, by_height, None)[:, 0, :, 0].T
    eye = torch.eye(width, dtype=torch.float64).reshape(width, 1, 1, width)
    columns = operator(eye.expand(-1, -1, 2, -1).contiguous(), [2, wide], align, None, by_width)[:, 0, 0, :]
    return rows.contiguous(), columns.contiguous()


def _settings(node: Node) -> tuple[bool, float | None, float | None]:
    """Whether corners are aligned, and the scales of height and width where they are given."""
    operands = dialect.operands(node)
    if dialect.op_name(node).endswith(".vec"):
        scales = operands[3] or (None, None)
        return bool(operands[2]), scales[0], scales[1]
    return bool(operands[2]), operands[3], operands[4]
