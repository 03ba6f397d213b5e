"""The numeric gate: after every pass the graph is run, and a pass that changed the result is named.

The metric is, per output, ``max|a−b| / max|b|`` with equal non-finite masks; integer and boolean outputs must be equal.
The previous pass's outputs are kept, so N passes cost N + 1 runs.

An exact pass whose metric exceeds :data:`FLOAT32_BOUND` is applied again to a float64 copy of its input graph and
both run in float64: equal to :data:`FLOAT64_BOUND` means that only rounding was seen; else the pass is the culprit, and
the first node whose value differs is named. A graph that has no float64 twin, or one too large, is held to
:data:`UNPROVED_BOUND` and recorded as unproved.

An approximate pass is judged by the statistic that it declares; its outputs are what later passes are held to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlexport.core.artifact import Array
from vlexport.core.bundle_schema import Change, GateRecord
from vlexport.core.errors import CapabilityError, GateError, InternalError
from vlexport.core.numerics import relative_error
from vlexport.passes.base import Pass
from vlexport.passes.level import Failure, Level, Outputs
from vlexport.passes.probes import Probe, as_array, require_sight
from vlexport.passes.program_level import PROGRAM
from vlexport.passes.statistic import Statistic, Tally, one_digit

FLOAT32_BOUND = 1e-5
"""Above this an exact pass must be proven in float64. Rounding of a fold on a deep net is about 1e-6."""
FLOAT64_BOUND = 1e-9
"""Folds measured 4e-16 to 7e-16 in float64; a wrong weight shows at 1e-6 or more."""
PART_BOUND = 1e-2
"""A part of an output that moved by so much of its own size asks for the float64 proof, however small it is."""
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
        together: An approximate pass is judged on all probes as on one batch: of a single sample whose true answer lies
            near 0, a ratio says little.

    Raises:
        CapabilityError: VLX0402 when no output varies over the probes.
    """

    def __init__(
        self,
        source: Any,
        probes: Sequence[Probe],
        *,
        level: Level[Any] = PROGRAM,
        sighted: bool = False,
        together: bool = False,
    ) -> None:
        self.probes = probes
        self.together = together
        self.level = level
        self.kept: list[Outputs] = []
        self.blind: tuple[int, ...] = ()
        self.unreal: dict[int, float] = {}
        if not sighted:
            self.kept = self._sound(source, probes)
            self.blind = require_sight(self.kept)
            self.unreal = unreal_outputs(self.kept)
        self._digests = self._digested(source)

    def check(self, applied: Pass[Any], before: Any, after: Any) -> GateRecord:
        """Judge one pass; on success its outputs become the kept ones.

        Raises:
            GateError: VLX0401 when outputs changed, or by more than an approximate pass promises.
            InternalError: VLX0403 for an approximate pass that promises nothing.
        """
        self.kept = self.kept or self._sound(before, self.probes)
        if applied.effect == "approximate":
            return self._approximated(applied, before, after)
        outputs = []
        worst, where = 0.0, self.probes[0]
        aside, suspicious = 0, False
        for probe, kept, found in zip(self.probes, self.kept, self.level.run(after, self.probes), strict=True):
            outputs.append(_required(applied, probe, found))
            if [as_array(v).dtype for v in outputs[-1]] != [as_array(v).dtype for v in kept]:
                raise self._culprit(applied, before, after, probe, math.inf, FLOAT32_BOUND)
            if left_range(outputs[-1], kept):  # in float64 the numbers fit, so that it would prove nothing
                raise self._culprit(applied, before, after, probe, math.inf, FLOAT32_BOUND)
            error, rows = self._judged(outputs[-1], kept, probe, FLOAT32_BOUND)
            aside += rows
            suspicious = suspicious or small_part_changed(outputs[-1], kept)
            if not error <= worst:
                worst, where = error, probe
        record = GateRecord(worst=one_digit(worst), proof="float32", probes=len(self.probes))
        if worst == 0.0:
            record = record.model_copy(update={"proof": "identical"})
        elif suspicious or not worst <= FLOAT32_BOUND:
            record = self._prove(applied, before, after, where, worst)
        record = record.model_copy(update={"set_aside": aside})
        self.kept = outputs
        self._digests = self._digested(after)
        return record

    def _approximated(self, applied: Pass[Any], before: Any, after: Any) -> GateRecord:
        """Judge an approximate pass by its own statistic, output by output and probe by probe."""
        statistic = applied.statistic
        if statistic is None:
            raise InternalError("VLX0403", f"pass {applied.name} is approximate and declares no statistic")
        outputs: list[Outputs] = []
        verdict = Tally(statistic)
        seen = [Probe(f"sample {i}", tuple(values)) for i, values in enumerate(applied.witnesses, 1)]
        probes, known = [*self.probes, *seen], [*self.kept, *self._sound(before, seen)]
        judged = 0
        held: list[_Held] = []
        for probe, kept, found in zip(probes, known, self.level.run(after, probes), strict=True):
            outputs.append(_required(applied, probe, found))
            ours, reference = (tuple(map(as_array, each)) for each in (outputs[-1][: len(kept)], kept))
            unpromised = applied.unpromised(before, probe.values)
            aside = len(unpromised)
            judged += _batch(probe) - aside
            if unpromised:
                probe = replace(probe, undecided=unpromised)
                ours, reference = (_without(each, probe, _batch(probe)) for each in (ours, reference))
            elif verdict.broken_by(ours, reference) and self._few_undecided(probe):
                ours, reference = (_without(each, probe, _batch(probe)) for each in (ours, reference))
                aside = len(probe.undecided)
            held.append(_Held(probe, probe.name, ours, reference, aside))
        for each in _as_one_batch(held) if self.together else held:
            if broken := verdict.add(each.ours, each.reference, aside=each.aside):
                raise GateError(
                    "VLX0401",
                    f"pass {applied.name} costs more than it may: {broken} on the {each.name}",
                    where=self.level.first_difference(before, after, each.probe, statistic.broken),
                    hint=statistic.hint,
                )
        if not judged:
            raise CapabilityError(
                "VLX0402", f"the gate is blind: pass {applied.name} promises nothing of any probe",
                where="numeric gate",
                hint="give other samples with --calib DATA, or switch the gate off with --no-gate",
            )  # fmt: skip
        self._require_places(applied, statistic, before, after)
        self.kept = outputs[: len(self.probes)]
        self._digests = self._digested(after)
        return verdict.record(len(probes))

    def _require_places(self, applied: Pass[Any], statistic: Statistic, before: Any, after: Any) -> None:
        """Hold every place of a pass that promises something of each to what was made there before.

        Raises:
            GateError: VLX0401.
        """
        if statistic.place is None:
            return
        alone = replace(statistic, bound=statistic.place)
        for where, ours, reference in self.level.places(before, after, self.probes[0]):
            if alone.broken(ours, reference):
                found = f"{alone.name} {alone.of(ours, reference):.3g} of one place, {alone.bound:g} is promised"
                raise GateError(
                    "VLX0401", f"pass {applied.name} costs more than it may: {found}", where=where, hint=statistic.hint
                )

    def _few_undecided(self, probe: Probe) -> bool:
        """Whether a probe has undecided rows, and no more than half of all rows are."""
        rows = sum(_batch(each) for each in self.probes)
        return bool(probe.undecided) and 2 * sum(len(each.undecided) for each in self.probes) <= rows

    def require_untouched(self, applied: Pass[Any]) -> None:
        """Refuse a pass that wrote into a weight of its input graph, by whatever way.

        Raises:
            GateError: VLX0406.
        """
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            now = list(pool.map(lambda each: self.level.digest(each[1], fresh=True), self._digests))
        for (name, _, digest), found in zip(self._digests, now, strict=True):
            if found != digest:
                raise GateError(
                    "VLX0406",
                    f"pass {applied.name} edited parameter {name} in place",
                    where=name,
                    hint="a pass replaces a tensor with a new one; please report this",
                )

    def _judged(self, found: Outputs, kept: Outputs, probe: Probe, bound: float) -> tuple[float, int]:
        """The error, and how many rows were set aside for it: undecided ones, when they alone disagree.

        Nothing is set aside where more than half of all rows are undecided: what is left would prove too little.
        """
        error = _worst(found, kept)
        if error <= bound or not self._few_undecided(probe):
            return error, 0
        batch = _batch(probe)
        return _worst(_without(found, probe, batch), _without(kept, probe, batch)), len(probe.undecided)

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
        twins = self._twins(applied, before, after)
        if twins is None:
            if worst <= UNPROVED_BOUND:
                return GateRecord(worst=one_digit(worst), proof="unproved", probes=count)
            raise self._culprit(applied, before, after, probe, worst, FLOAT32_BOUND)
        doubled, reapplied, complete = twins
        if not complete:
            raise self._culprit(applied, before, after, probe, worst, FLOAT32_BOUND)
        probes = [_doubled(each) for each in self.probes]
        ran = zip(probes, self.level.run(reapplied, probes), self._sound(doubled, probes), strict=True)
        for each, found, wanted in ran:
            error, _ = self._judged(_required(applied, each, found), wanted, each, FLOAT64_BOUND)
            if not error <= FLOAT64_BOUND:
                raise self._culprit(applied, doubled, reapplied, each, error, FLOAT64_BOUND)
        # an integer output that rounding tipped over is infinitely far off, and equal in float64: no figure for that
        return GateRecord(worst=one_digit(worst) if math.isfinite(worst) else 1.0, proof="float64", probes=count)

    def _twins(self, applied: Pass[Any], before: Any, after: Any) -> tuple[Any, Any, bool] | None:
        """The float64 copy before and after the pass, and whether the pass did to it all that it did in float32.

        None where there is no such copy, where it does not run, or where a pass may rightly do less to it.

        Raises:
            GateError: VLX0401 when the pass gives another graph when it is applied again: then a proof of what it does
                in float64 says nothing about what it did.
        """
        level = self.level
        if level.size_bytes(before) > FLOAT64_WEIGHTS_LIMIT:
            return None
        doubled = level.double(before)
        if doubled is None:
            return None
        first = _doubled(self.probes[0])
        if isinstance(next(iter(level.run(doubled, [first]))), Failure):
            return None
        reapplied, again = level.copy(doubled), level.copy(before)
        wanted, _ = applied.run(again)
        if level.fingerprint(again) != level.fingerprint(after):
            raise GateError(
                "VLX0401",
                f"pass {applied.name} gives another graph when it is applied again",
                where=applied.name,
                hint=_HINT,
            )
        changes, _ = applied.run(reapplied)
        complete = not Counter(map(_deed, wanted)) - Counter(map(_deed, changes))
        if not complete and not level.runs_float64:
            return None
        return doubled, reapplied, complete  # what was not done again proves nothing

    def _culprit(
        self, applied: Pass[Any], before: Any, after: Any, probe: Probe, worst: float, bound: float
    ) -> GateError:
        return GateError(
            "VLX0401",
            f"pass {applied.name} changed what the model computes: {worst:.1e} on the {probe.name} (bound {bound:.0e})",
            where=self.level.first_difference(before, after, probe, lambda a, b: not relative_error(a, b) <= bound),
            hint=_HINT,
        )


@dataclass(frozen=True)
class _Held:
    """Outputs on a probe, and those that they are held to; ``aside`` rows do not count."""

    probe: Probe
    name: str
    ours: tuple[Array, ...]
    reference: tuple[Array, ...]
    aside: int


def _as_one_batch(held: Sequence[_Held]) -> Sequence[_Held]:
    """Outputs of all probes joined along dim 0, where each has one; else as they are."""
    shapes = {tuple(value.shape[1:] for value in (*each.ours, *each.reference)) for each in held}
    if len(held) < 2 or len(shapes) != 1 or not all(v.ndim for v in (*held[0].ours, *held[0].reference)):
        return held
    ours, reference = (
        tuple(np.concatenate(values) for values in zip(*sides, strict=True))
        for sides in ([each.ours for each in held], [each.reference for each in held])
    )
    return [_Held(held[0].probe, f"{len(held)} probes", ours, reference, sum(each.aside for each in held))]


def _deed(change: Change) -> tuple[str, tuple[str, ...]]:
    return change.what, change.where


def _doubled(probe: Probe) -> Probe:
    return replace(probe, values=tuple(v.double() if v.is_floating_point() else v for v in probe.values))


def _batch(probe: Probe) -> int:
    return int(probe.values[0].shape[0]) if probe.values and probe.values[0].ndim else 1


def _without(outputs: Outputs, probe: Probe, batch: int) -> Outputs:
    """Outputs without the undecided rows; one whose dim 0 is not the batch cannot be split and is left out."""
    kept = []
    for value in map(as_array, outputs):
        batched = value.ndim and value.shape[0] == batch
        kept.append(np.delete(value, probe.undecided, axis=0) if batched else value[:0] if value.ndim else value * 0)
    return tuple(kept)


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


def left_range(found: Outputs, expected: Outputs) -> bool:
    """Whether an output has NaN or infinities and had none: two weights became one that its dtype does not hold."""
    pairs = ((as_array(a), as_array(b)) for a, b in zip(found, expected, strict=False))
    floats = ((a, b) for a, b in pairs if a.dtype.kind == b.dtype.kind == "f")
    return any(bool(np.isfinite(b).all()) and not bool(np.isfinite(a).all()) for a, b in floats)


def unreal_outputs(seen: Sequence[Outputs]) -> dict[int, float]:
    """Position of an output → the share of it that is NaN or infinite over all probes, where that is more than none."""
    shares: dict[int, float] = {}
    for position in range(len(seen[0])):
        values = [as_array(outputs[position]) for outputs in seen]
        sizes = sum(value.size for value in values)
        unreal = sum(int((~np.isfinite(value)).sum()) for value in values if value.dtype.kind == "f")
        if unreal:
            shares[position] = unreal / sizes
    return shares


def small_part_changed(found: Outputs, expected: Outputs) -> bool:
    """Whether some index of an output's later dims moved by more than :data:`PART_BOUND` of its own largest value.

    The metric measures against the largest value of the whole output, so that scores beside box coordinates could
    vanish within it. Such a change is no verdict; it asks for the float64 proof.
    """
    for a, b in zip(map(as_array, found), map(as_array, expected), strict=True):
        if a.shape != b.shape or a.dtype.kind != "f" or a.ndim < 2:
            continue
        finite = np.isfinite(a) & np.isfinite(b)
        moved = np.abs(np.subtract(a, b, out=np.zeros_like(a), where=finite))
        size = np.where(finite, np.abs(b), 0.0)
        for axis in range(1, a.ndim):
            others = tuple(i for i in range(a.ndim) if i != axis)
            if bool(np.any(moved.max(axis=others, initial=0.0) > PART_BOUND * size.max(axis=others, initial=0.0))):
                return True
    return False
