"""Rows of a probe whose result hangs on a selection that rounding could tip.

A top-k, sort or argmax turns a difference of one rounding step into another index. Where two scores that decide a
selection lie within :data:`SELECTION_MARGIN` of each other, an exact pass may rightly give another output; the gate
sets such rows aside when they disagree, and counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

SELECTION_MARGIN = 1e-6
"""Smallest trusted difference of two scores, as a share of the largest score: a few float32 rounding steps."""

_SELECTIONS = {
    "aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable",
    "aten.argmax.default", "aten.argmin.default", "aten.max.dim", "aten.min.dim",
}  # fmt: skip
_FIRST_ONLY = ("aten.argmax.default", "aten.argmin.default", "aten.max.dim", "aten.min.dim")
_SMALLEST_FIRST = ("aten.argmin.default", "aten.min.dim")


def undecided_rows(program: Program, values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Rows of a batch (dim 0 of the first input) that some selection of the Program leaves undecided."""
    selections = [n for n in program.calls() if dialect.op_name(n) in _SELECTIONS and isinstance(n.args[0], Node)]
    if not selections or not values or not values[0].ndim:
        return ()
    batch = int(values[0].shape[0])
    kept: dict[Any, Any] = dict(zip(program.placeholders, values, strict=True))
    wanted = {n.args[0] for n in selections}

    def keep(node: Node, value: Any) -> None:
        if node in wanted:
            kept[node] = value

    program.run(*values, observe=keep)
    rows: set[int] = set()
    for node in selections:
        scores = kept.get(node.args[0])
        if isinstance(scores, torch.Tensor) and scores.is_floating_point():
            rows |= _undecided(node, scores, batch)
    return tuple(sorted(rows))


def _undecided(node: Node, scores: torch.Tensor, batch: int) -> set[int]:
    name = dialect.op_name(node)
    dim, count, largest = _choice(node, name)
    if dim is None:
        scores, dim = scores.reshape(1, -1), 1
    dim %= max(scores.ndim, 1)
    if not scores.ndim or scores.shape[dim] < 2:
        return set()
    ordered = scores.sort(dim, descending=largest).values
    length = min(count + 1 if count is not None else scores.shape[dim], int(scores.shape[dim]))
    steps = (ordered.narrow(dim, 0, length - 1) - ordered.narrow(dim, 1, length - 1)).abs()
    finite = scores[torch.isfinite(scores)].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    tight = steps <= SELECTION_MARGIN * scale
    if dim == 0 or scores.shape[0] != batch:
        return set(range(batch)) if bool(tight.any()) else set()
    return {i for i, row in enumerate(tight) if bool(row.any())}


def _choice(node: Node, name: str) -> tuple[int | None, int | None, bool]:
    """Dim, how many of the first places matter (None: all), and whether the largest come first."""
    target: Any = node.target
    given = {a.name: value for a, value in zip(target._schema.arguments, dialect.operands(node), strict=True)}
    dim: Any = given.get("dim", -1)
    count: Any = 1 if name in _FIRST_ONLY else given.get("k")
    largest = given.get("largest", True) if name == "aten.topk.default" else name not in _SMALLEST_FIRST
    return dim, count, bool(largest)
