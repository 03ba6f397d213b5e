"""Rows of a probe whose result hangs on a selection that rounding could tip.

A top-k, sort or argmax turns a difference of one rounding step into another index. Where two scores that decide a
selection lie within :data:`SELECTION_MARGIN` of each other, an exact pass may rightly give another output; the gate
sets such rows aside when they disagree, and counts them.

In a graph that rounds to integers, the last digit tips integers over first, and these the choice: margins of scores
say nothing there. So the graph is asked itself (:func:`tipped_choices`): its inputs are moved in their last digits, as
another kernel's sums would move what is computed from them, and it is seen which rows then choose otherwise, and by
how much their outputs move. A deep graph in integers without any choice may move as far: where each layer rounds by the
range of what it is given, one integer that tips over changes the range of the next layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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

NUDGE = 1e-6
"""By what share inputs are moved, at random: about the rounding of a float32 sum of some hundred terms."""
KERNELS = 1e-5
"""The same where other kernels compute every layer: by so much the scores of a deep graph were seen to move."""
TRIALS = 4


@dataclass(frozen=True)
class Tipped:
    """Rows that choose otherwise, or move far in integers, once the last digits of the inputs move.

    Attributes:
        rows: Of dim 0 of the first input.
        moved: By how much an output of one of them moved at most, as a share of that output's largest value.
    """

    rows: tuple[int, ...] = ()
    moved: float = 0.0


def tipped_choices(
    program: Program, values: Sequence[Tensor], *, nudge: float = NUDGE, beyond: float = 0.0,
    in_integers: float = math.inf,
) -> Tipped:  # fmt: skip
    """Run a Program on inputs and on some that are the same but for their last digits; see which rows choose otherwise.

    Nothing is found in a graph that neither selects nor rounds. Inputs without floats have no last digit to move: in a
    graph that rounds, those of what it stores are moved then; in others nothing is found.

    Args:
        program: What is run.
        values: Its inputs.
        nudge: By what share they are moved.
        beyond: Rows that choose otherwise are left out where no output of theirs moves by so much (the order of what is
            chosen may not matter).
        in_integers: In a graph that rounds to integers, rows of which an output moves by so much count as well,
            whatever they choose.
    """
    selections, rounds = _selections(program), in_integers < math.inf and _rounds(program)
    has_floats = any(each.is_floating_point() for each in values)
    if not (rounds or (selections and has_floats)):
        return Tipped()
    generator = torch.Generator().manual_seed(0)
    outputs, chosen = _run(program, values, selections)
    batch = int(values[0].shape[0]) if values[0].ndim else 1
    rows: set[int] = set()
    moved = 0.0
    for _ in range(TRIALS):
        moving = program if has_floats else _with_moved_floats(program, nudge, generator)
        found, others = _run(moving, [_nudged(each, nudge, generator) for each in values], selections)
        tipped = {row for pair in zip(others, chosen, strict=True) for row in _differing(*pair, batch)}
        looked_at = range(batch) if rounds else tipped
        far = {row: max(_moved(a, b, [row], batch) for a, b in zip(found, outputs, strict=True)) for row in looked_at}
        far = {row: by for row, by in far.items() if (row in tipped and by >= beyond) or by >= in_integers}
        rows.update(far)
        moved = max([moved, *far.values()])
    return Tipped(tuple(sorted(rows)), moved)


def _nudged(value: Tensor, nudge: float, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    return value * (1.0 + nudge * torch.randn(value.shape, generator=generator)).to(value.dtype)


def _with_moved_floats(program: Program, nudge: float, generator: torch.Generator) -> Program:
    """The same graph over tensors that are moved."""
    twin = copy.copy(program)
    twin.tensors = {name: _nudged(each, nudge, generator) for name, each in program.tensors.items()}
    return twin


def _run(program: Program, values: Sequence[Tensor], wanted: Sequence[Node]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and the indices that each selection gave."""
    chosen: list[Tensor] = []

    def keep(node: Node, value: Any) -> None:
        if node in wanted:
            chosen.extend(each for each in _tensors(value) if not each.is_floating_point())

    return program.run(*values, observe=keep), chosen


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(each, Tensor)]


def _differing(ours: Tensor, reference: Tensor, batch: int) -> set[int]:
    if ours.shape != reference.shape or not ours.ndim or ours.shape[0] != batch:
        return set() if torch.equal(ours, reference) else set(range(batch))
    return set((ours != reference).reshape(batch, -1).any(1).nonzero()[:, 0].tolist())


def _moved(ours: Tensor, reference: Tensor, rows: Sequence[int], batch: int) -> float:
    """``max|a−b| / max|b|``, of those rows where there are rows; integers, or what is NaN, are all the way off."""
    if not reference.is_floating_point():
        return float(not torch.equal(ours, reference))
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    if ours.shape == reference.shape and reference.ndim and reference.shape[0] == batch:
        ours, reference = ours[list(rows)], reference[list(rows)]
    elif ours.shape != reference.shape:
        return 1.0
    found = float((ours - reference).abs().max()) / largest if largest else 0.0
    return found if math.isfinite(found) else 1.0


def _selections(program: Program) -> list[Node]:
    return [n for n in program.calls() if dialect.op_name(n) in _SELECTIONS and isinstance(n.args[0], Node)]


def _rounds(program: Program) -> bool:
    return any(dialect.op_name(node) == "vlexport.quantize.default" for node in program.calls())


def undecided_rows(program: Program, values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Rows of a batch (dim 0 of the first input) that some selection of the Program leaves undecided."""
    selections = _selections(program)
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
