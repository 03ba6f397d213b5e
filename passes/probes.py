"""Probes: the inputs on which a Program is run before and after every pass.

At most four, of at most eight images in all: the saved example, one calibration sample, a seeded draw with every
dynamic dim at its smallest size, and one with every dim at its largest (or three above the smallest, when it has no
bound). An input that the Program refuses by a check of its own is no probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vlexport.core.artifact import Array
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect
from vlexport.ir.draw import draw
from vlexport.ir.program import Program
from vlexport.passes.selection import undecided_rows

MAX_IMAGES = 8
_UNBOUNDED_STEP = 2
_SEED_STEP = 3
"""Saving draws its example with a seed of its own; golden vectors and timing inputs take the two after the build's."""


@dataclass(frozen=True)
class Probe:
    """Named input values, one tensor per input.

    Attributes:
        undecided: Rows (dim 0 of the first input) whose result hangs on a selection that rounding could tip.
    """

    name: str
    values: tuple[torch.Tensor, ...]
    undecided: tuple[int, ...] = ()


def make_probes(program: Program, *, calibration: Sequence[torch.Tensor] | None, seed: int) -> list[Probe]:
    """Probes for a Program.

    Args:
        program: The source Program.
        calibration: One real sample per input, with batch dim, if the user gave calibration data.
        seed: Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed + _SEED_STEP)
    probes = [Probe("example", _shortened(program, program.example))]
    if calibration is not None:
        probes.append(Probe("calibration sample", tuple(calibration)))
    dims = program.signature.dims
    smallest = {name: r.min for name, r in dims.items()}
    probes.append(
        Probe("draw at the smallest size" if dims else "draw", draw(program, generator, smallest, masks=not dims))
    )
    if dims:
        spent = sum(_images(p) for p in probes)
        largest = {name: r.max if r.max is not None else r.min + _UNBOUNDED_STEP for name, r in dims.items()}
        batch = _batch_dims(program)
        largest = {n: max(min(s, MAX_IMAGES - spent), dims[n].min) if n in batch else s for n, s in largest.items()}
        probes.append(Probe("draw at the largest size", draw(program, generator, largest, masks=True)))
    probes = [probes[0], *(probe for probe in probes[1:] if _is_taken(program, probe))]
    return [replace(probe, undecided=undecided_rows(program, probe.values)) for probe in probes]


def _is_taken(program: Program, probe: Probe) -> bool:
    """Whether a Program that refuses some inputs while it runs takes this one: of noise, a mask may keep nothing."""
    if not any(map(dialect.checks_at_run_time, program.calls())):
        return True
    try:
        program.run(*probe.values)
    except RuntimeError:
        return False
    return True


def as_array(value: Any) -> Array:
    """A tensor or array as an array; bfloat16, which numpy has not, as float32."""
    if isinstance(value, torch.Tensor):
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return np.asarray(value)


def require_sight(outputs: Sequence[tuple[Any, ...]]) -> tuple[int, ...]:
    """Refuse probes on which no output varies.

    Args:
        outputs: The source graph's outputs on every probe, tensors or arrays.

    Returns:
        Positions of outputs that do not vary: what a pass does to them, the gate cannot see.

    Raises:
        CapabilityError: VLX0402.
    """
    rows: list[list[Array]] = [[] for _ in outputs[0]]
    for values in outputs:
        for kept, value in zip(rows, map(as_array, values), strict=True):
            kept.extend(value if value.ndim else [value])
    # NaN equals NaN: an output that is always NaN shows nothing.
    blind = tuple(
        position
        for position, seen in enumerate(rows)
        if all(np.array_equal(v, seen[0], equal_nan=v.dtype.kind == "f") for v in seen[1:])
    )
    if len(blind) < len(rows):
        return blind
    raise CapabilityError(
        "VLX0402",
        "the gate is blind: no output changes from probe to probe",
        where="numeric gate",
        hint="give real samples with --calib DATA, or switch the gate off with --no-gate",
    )


def _batch_dims(program: Program) -> set[str]:
    return {str(spec.shape[0]) for spec in program.signature.inputs if spec.shape and isinstance(spec.shape[0], str)}


def _images(probe: Probe) -> int:
    return max((int(v.shape[0]) for v in probe.values if v.ndim), default=1)


def _shortened(program: Program, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The example with at most two rows where the batch may be shortened."""
    batch = _batch_dims(program)
    least = max((program.signature.dims[d].min for d in batch), default=1)
    specs = program.signature.inputs
    return tuple(
        value[: max(2, least)] if spec.shape and spec.shape[0] in batch else value
        for value, spec in zip(values, specs, strict=True)
    )
