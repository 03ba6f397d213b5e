"""legalize-resize: resizing that Core ML has not, written as two matrix products with constants.

Before → after::

    upsample_bicubic2d(x)  (with or without antialias)      →   matmul(matmul(rows, x), columns)
    _upsample_bilinear2d_aa(x)
    upsample_nearest2d(x), _upsample_nearest_exact2d(x)  (by no whole factor)

Equation: resizing is linear and separable: y[i, j] = Σ rows[i, a] · x[a, b] · columns[b, j]. Both matrices are what
torch's own operator makes of the identity, in float64, rounded once.
Does not apply when: height or width depends on the input; the nearest pixel is repeated a whole number of times.
Numerical effect: rounding only.
Source: coremltools 9.0 has no bicubic resizing, and converts the antialiased bilinear one to one without antialias
(converters/mil/frontend/torch/ops.py, ``_upsample_bilinear2d_aa``), which computes something else. Which pixel is the
nearest at a broken factor is a convention in which torch and Core ML need not agree.
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
_NEAREST = ("upsample_nearest2d", "_upsample_nearest_exact2d")
_RESIZES = {
    f"aten.{name}.{overload}"
    for name in (*_NEAREST, "upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa")
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
            elif not _repeats(node):
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


def _is_nearest(node: Node) -> bool:
    return dialect.op_name(node).split(".")[1] in _NEAREST


def _repeats(node: Node) -> bool:
    """Whether every pixel is repeated a whole number of times, which Core ML does in the same way."""
    source: Any = node.args[0]
    pairs = zip(node.meta["val"].shape[2:], source.meta["val"].shape[2:], strict=True)
    plain = dialect.op_name(node).startswith("aten.upsample_nearest2d")
    return plain and all(out % size == 0 for out, size in pairs)


def _matrices(node: Node) -> tuple[Tensor, Tensor]:
    """(H_out × H_in) and (W_in × W_out), float64.

    One direction at a time: a picture of the identity's columns is resized along it and keeps its other size, which
    leaves that other direction as it is.
    """
    source: Any = node.args[0]
    height, width = (int(s) for s in source.meta["val"].shape[2:])
    tall, wide = (int(s) for s in node.meta["val"].shape[2:])
    align, by_height, by_width = _settings(node)
    settings = () if _is_nearest(node) else (align,)
    operator: Any = getattr(aten, dialect.op_name(node).split(".")[1]).default
    eye = torch.eye(height, dtype=torch.float64).reshape(height, 1, height, 1).expand(-1, -1, -1, 2).contiguous()
    rows = operator(eye, [tall, 2], *settings, by_height, None)[:, 0, :, 0].T
    eye = torch.eye(width, dtype=torch.float64).reshape(width, 1, 1, width).expand(-1, -1, 2, -1).contiguous()
    columns = operator(eye, [2, wide], *settings, None, by_width)[:, 0, 0, :]
    return rows.contiguous(), columns.contiguous()


def _settings(node: Node) -> tuple[bool, float | None, float | None]:
    """Whether corners are aligned, and the scales of height and width where they are given."""
    operands = dialect.operands(node)
    align = False if _is_nearest(node) else bool(operands[2])
    scales: Any = operands[-1] or (None, None) if dialect.op_name(node).endswith(".vec") else operands[-2:]
    return align, scales[0], scales[1]
