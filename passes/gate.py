"""The numeric gate: after every pass the graph is run, and a pass that changed the result is named.

The metric is, per output, ``max|a−b| / max|b|`` with equal non-finite masks; integer and boolean outputs must be equal.
The previous pass's outputs are kept, so N passes cost N + 1 runs.

An exact pass whose metric exceeds :data:`FLOAT32_BOUND` is applied again to a float64 copy of its input graph and
both run in float64: equal to :data:`FLOAT64_BOUND` means that only rounding was seen; else the pass is the culprit, and
the first node whose value differs is named. A graph that has no float64 twin, or one too large, is held to
:data:`UNPROVED_BOUND` and recorded as unproved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlexport.core.bundle_schema import Change, GateRecord
from vlexport.core.errors import GateError
from vlexport.core.numerics import relative_error
from vlexport.passes.base import Pass
from vlexport.passes.level import Failure, Level, Outputs
from vlexport.passes.probes import Probe, as_array, require_sight
from vlexport.passes.program_level import PROGRAM

FLOAT32_BOUND = 1e-5
"""Above this an exact pass must be proven in float64. Rounding of a fold on a deep net is about 1e-6."""
FLOAT64_BOUND = 1e-9
"""Folds measured 4e-16 to 7e-16 in float64; a wrong weight shows at 1e-6 or more."""
UNPROVED_BOUND = 1e-4
"""What is accepted, and recorded as unproved, where the float64 run would not fit in memory or does not exist."""
FLOAT64_WEIGHTS_LIMIT = 1 << 30
"""Bytes of weights up to which a pass is applied again in float64."""


class NumericGate:
    """Keeps the last accepted outputs and judges the next graph against them.

    Args:
        source: The graph before the first pass.
        probes: Inputs to run on.
        level: What kind of graph it is.
        sighted: Another gate has seen outputs vary on these probes: nothing is run until a pass changes something.

    Raises:
        CapabilityError: VLX0402 when no output varies over the probes.
    """

    def __init__(
        self, source: Any, probes: Sequence[Probe], *, level: Level[Any] = PROGRAM, sighted: bool = False
    ) -> None:
        self.probes = probes
        self.level = level
        self.kept: list[Outputs] = []
        if not sighted:
            self.kept = self._sound(source, probes)
            require_sight(self.kept)
        self._digests = self._digested(source)

    def check(self, applied: Pass[Any], before: Any, after: Any) -> GateRecord:
        """Judge one pass; on success its outputs become the kept ones.

        Raises:
            GateError: VLX0401 when outputs changed.
        """
        self.kept = self.kept or self._sound(before, self.probes)
        outputs = []
        worst, where = 0.0, self.probes[0]
        for probe, kept, found in zip(self.probes, self.kept, self.level.run(after, self.probes), strict=True):
            outputs.append(_required(applied, probe, found))
            error = _worst(outputs[-1], kept)
            if not error <= worst:
                worst, where = error, probe
        record = GateRecord(worst=one_digit(worst), proof="float32", probes=len(self.probes))
        if worst == 0.0:
            record = record.model_copy(update={"proof": "identical"})
        elif not worst <= FLOAT32_BOUND:
            record = self._prove(applied, before, after, where, worst)
        self.kept = outputs
        self._digests = self._digested(after)
        return record

    def require_untouched(self, applied: Pass[Any]) -> None:
        """Refuse a pass that wrote into a weight of its input graph, by whatever way.

        Raises:
            GateError: VLX0406.
        """
        for name, weight, digest in self._digests:
            if self.level.digest(weight, fresh=True) != digest:
                raise GateError(
                    "VLX0406",
                    f"pass {applied.name} edited parameter {name} in place",
                    where=name,
                    hint="a pass replaces a tensor with a new one; please report this",
                )

    def _digested(self, graph: Any) -> list[tuple[str, Any, str]]:
        return [(name, weight, self.level.digest(weight)) for name, weight in self.level.weights(graph)]

    def _sound(self, graph: Any, probes: Sequence[Probe]) -> list[Outputs]:
        """Outputs of a graph that no pass is to blame for."""
        outputs = []
        for found in self.level.run(graph, probes):
            if isinstance(found, Failure):
                raise found.error
            outputs.append(found)
        return outputs

    def _prove(self, applied: Pass[Any], before: Any, after: Any, probe: Probe, worst: float) -> GateRecord:
        count = len(self.probes)
        twins = self._twins(applied, before)
        if twins is None:
            if worst <= UNPROVED_BOUND:
                return GateRecord(worst=one_digit(worst), proof="unproved", probes=count)
            raise self._culprit(applied, before, after, probe, worst)
        doubled, reapplied, complete = twins
        if not complete:
            raise self._culprit(applied, before, after, probe, worst)
        probes = [_doubled(each) for each in self.probes]
        ran = zip(probes, self.level.run(reapplied, probes), self._sound(doubled, probes), strict=True)
        for each, found, wanted in ran:
            error = _worst(_required(applied, each, found), wanted)
            if not error <= FLOAT64_BOUND:
                raise self._culprit(applied, doubled, reapplied, each, error)
        # an integer output that rounding tipped over is infinitely far off, and equal in float64: no figure for that
        return GateRecord(worst=one_digit(worst) if math.isfinite(worst) else 1.0, proof="float64", probes=count)

    def _twins(self, applied: Pass[Any], before: Any) -> tuple[Any, Any, bool] | None:
        """The float64 copy before and after the pass, and whether the pass did to it all that it did in float32.

        None where there is no such copy, or where a pass may rightly do less to it.
        """
        level = self.level
        if level.size_bytes(before) > FLOAT64_WEIGHTS_LIMIT:
            return None
        doubled = level.double(before)
        if doubled is None:
            return None
        first = _doubled(self.probes[0])
        if not level.runs_float64 and isinstance(next(iter(level.run(doubled, [first]))), Failure):
            return None
        reapplied = level.copy(doubled)
        wanted, _ = applied.run(level.copy(before))
        changes, _ = applied.run(reapplied)
        complete = not Counter(map(_deed, wanted)) - Counter(map(_deed, changes))
        if not complete and not level.runs_float64:
            return None
        return doubled, reapplied, complete  # what was not done again proves nothing

    def _culprit(self, applied: Pass[Any], before: Any, after: Any, probe: Probe, worst: float) -> GateError:
        in_float64 = any(as_array(v).dtype == "float64" for v in probe.values)
        bound = FLOAT64_BOUND if in_float64 else FLOAT32_BOUND
        return GateError(
            "VLX0401",
            f"pass {applied.name} changed what the model computes: {worst:.1e} on the {probe.name} (bound {bound:.0e})",
            where=self.level.first_difference(before, after, probe, bound),
            hint=_HINT,
        )


def _deed(change: Change) -> tuple[str, tuple[str, ...]]:
    return change.what, change.where


def _doubled(probe: Probe) -> Probe:
    return Probe(probe.name, tuple(v.double() if v.is_floating_point() else v for v in probe.values))


def one_digit(value: float) -> float:
    """Rounded to one significant digit, so that records are equal from machine to machine."""
    return float(f"{value:.0e}")


def _required(applied: Pass[Any], probe: Probe, found: Outputs | Failure) -> Outputs:
    """The outputs, or an error that names the pass whose graph does not even run."""
    if isinstance(found, Failure):
        raise GateError(
            "VLX0401",
            f"after pass {applied.name} the program does not run on the {probe.name}: {found.reason}",
            where=found.where,
            hint=_HINT,
        ) from found.error
    return found


_HINT = "please report this; --no-gate would ship the wrong model"


def _worst(found: Outputs, expected: Outputs) -> float:
    if len(found) != len(expected):
        return float("inf")
    return max((relative_error(as_array(a), as_array(b)) for a, b in zip(found, expected, strict=True)), default=0.0)
