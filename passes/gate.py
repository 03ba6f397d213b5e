"""The numeric gate: after every pass the Program is run, and a pass that changed the result is named.

The metric is, per output, ``max|a−b| / max|b|`` with equal non-finite masks; integer and boolean outputs must be equal.
The previous pass's outputs are kept, so N passes cost N + 1 runs.

An exact pass whose metric exceeds :data:`FLOAT32_BOUND` is applied again to a float64 copy of its input Program and
both run in float64: equal to :data:`FLOAT64_BOUND` means that only rounding was seen; else the pass is the culprit, and
the first node whose value differs is named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch.fx import Node

from vlexport.core.bundle_schema import Change, GateRecord
from vlexport.core.errors import GateError
from vlexport.core.numerics import relative_error
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.ir.text import tensor_digest
from vlexport.passes.base import Pass
from vlexport.passes.probes import Probe, require_sight

FLOAT32_BOUND = 1e-5
"""Above this an exact pass must be proven in float64. Rounding of a fold on a deep net is about 1e-6."""
FLOAT64_BOUND = 1e-9
"""Folds measured 4e-16 to 7e-16 in float64; a wrong weight shows at 1e-6 or more."""
UNPROVED_BOUND = 1e-4
"""What is accepted, and recorded as unproved, where the float64 run would not fit in memory."""
FLOAT64_WEIGHTS_LIMIT = 1 << 30
"""Bytes of weights up to which a pass is applied again in float64."""

Outputs = tuple[torch.Tensor, ...]


class NumericGate:
    """Keeps the last accepted outputs and judges the next Program against them.

    Args:
        source: The Program before the first pass.
        probes: Inputs to run on.

    Raises:
        CapabilityError: VLX0402 when no output varies over the probes.
    """

    def __init__(self, source: Program, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.kept = [source.run(*probe.values) for probe in probes]
        require_sight(self.kept)
        self._digests = _digests(source)

    def check(self, applied: Pass[Program], before: Program, after: Program) -> GateRecord:
        """Judge one pass; on success its outputs become the kept ones.

        Raises:
            GateError: VLX0401 when outputs changed.
        """
        outputs: list[Outputs] = []
        worst, where = 0.0, self.probes[0]
        for probe, kept in zip(self.probes, self.kept, strict=True):
            found = _run(applied, after, probe)
            outputs.append(found)
            error = _worst(found, kept)
            if not error <= worst:
                worst, where = error, probe
        record = GateRecord(worst=one_digit(worst), proof="float32", probes=len(self.probes))
        if worst == 0.0:
            record = record.model_copy(update={"proof": "identical"})
        elif not worst <= FLOAT32_BOUND:
            record = self._prove(applied, before, after, where, worst)
        self.kept = outputs
        self._digests = _digests(after)
        return record

    def require_untouched(self, applied: Pass[Program]) -> None:
        """Refuse a pass that wrote into a tensor of its input Program, by whatever way.

        Raises:
            GateError: VLX0406.
        """
        for tensor, (name, digest) in self._digests.items():
            if tensor_digest(tensor, fresh=True) != digest:
                raise GateError(
                    "VLX0406",
                    f"pass {applied.name} edited parameter {name} in place",
                    where=name,
                    hint="a pass replaces a tensor with Program.add_tensor; please report this",
                )

    def _prove(self, applied: Pass[Program], before: Program, after: Program, probe: Probe, worst: float) -> GateRecord:
        count = len(self.probes)
        if before.size_bytes > FLOAT64_WEIGHTS_LIMIT:
            if worst <= UNPROVED_BOUND:
                return GateRecord(worst=one_digit(worst), proof="unproved", probes=count)
            raise _culprit(applied, before, after, probe, worst)
        doubled = before.double()
        reapplied = doubled.copy()
        wanted, _ = applied.run(before.copy())
        changes, _ = applied.run(reapplied)
        if Counter(map(_deed, wanted)) - Counter(map(_deed, changes)):  # what was not done again proves nothing
            raise _culprit(applied, before, after, probe, worst)
        for each in self.probes:
            doubled_probe = Probe(each.name, tuple(v.double() if v.is_floating_point() else v for v in each.values))
            error = _worst(_run(applied, reapplied, doubled_probe), doubled.run(*doubled_probe.values))
            if not error <= FLOAT64_BOUND:
                raise _culprit(applied, doubled, reapplied, doubled_probe, error)
        # an integer output that rounding tipped over is infinitely far off, and equal in float64: no figure for that
        return GateRecord(worst=one_digit(worst) if math.isfinite(worst) else 1.0, proof="float64", probes=count)


def _deed(change: Change) -> tuple[str, tuple[str, ...]]:
    return change.what, change.where


def one_digit(value: float) -> float:
    """Rounded to one significant digit, so that records are equal from machine to machine."""
    return float(f"{value:.0e}")


def _digests(program: Program) -> dict[torch.Tensor, tuple[str, str]]:
    return {tensor: (name, tensor_digest(tensor)) for name, tensor in program.used_tensors().items()}


def _run(applied: Pass[Program], program: Program, probe: Probe) -> Outputs:
    """Run, naming the pass when its graph does not even run."""
    reached: list[Node] = []
    try:
        return program.run(*probe.values, observe=lambda node, _: reached.append(node))
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        node = next((n for n in program.calls() if n not in set(reached)), None)
        raise GateError(
            "VLX0401",
            f"after pass {applied.name} the program does not run on the {probe.name}: {str(error).splitlines()[0]}",
            where=provenance.describe(node) if node is not None else "",
            hint=_HINT,
        ) from error


_HINT = "please report this; --no-gate would ship the wrong model"


def _worst(found: Outputs, expected: Outputs) -> float:
    if len(found) != len(expected):
        return float("inf")
    return max((relative_error(_array(a), _array(b)) for a, b in zip(found, expected, strict=True)), default=0.0)


def _array(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _culprit(applied: Pass[Program], before: Program, after: Program, probe: Probe, worst: float) -> GateError:
    bound = FLOAT64_BOUND if probe.values and probe.values[0].dtype is torch.float64 else FLOAT32_BOUND
    return GateError(
        "VLX0401",
        f"pass {applied.name} changed what the model computes: {worst:.1e} on the {probe.name} (bound {bound:.0e})",
        where=_first_difference(before, after, probe, bound),
        hint=_HINT,
    )


def _first_difference(before: Program, after: Program, probe: Probe, bound: float) -> str:
    """The first node of ``after`` whose value differs from that of the node it stands for."""
    values: dict[int, torch.Tensor] = {}

    def keep(node: Node, value: object) -> None:
        if isinstance(value, torch.Tensor) and provenance.origins(node):
            values[provenance.origins(node)[-1]] = value

    before.run(*probe.values, observe=keep)
    found: list[Node] = []
    last: dict[int, Node] = {}
    for node in after.calls():
        if provenance.origins(node):
            last[provenance.origins(node)[-1]] = node

    def compare(node: Node, value: object) -> None:
        origin = provenance.origins(node)[-1:]
        if found or not origin or not isinstance(value, torch.Tensor) or origin[0] not in values:
            return
        expected = values[origin[0]]
        if last[origin[0]] is node and not relative_error(_array(value), _array(expected)) <= bound:
            found.append(node)

    after.run(*probe.values, observe=compare)
    if found:
        return provenance.describe(found[0])
    names = [
        spec.name
        for spec, old, new in zip(before.signature.outputs, before.results, after.results, strict=True)
        if provenance.origins(old)[-1:] != provenance.origins(new)[-1:]
    ]
    return f"the order of outputs ({', '.join(names)})" if names else "an output"
