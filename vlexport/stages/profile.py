"""profile: latency against a baseline, interleaved, each session alone in its own process. No torch.

A round measures the baseline, then ours, then the baseline again. The two baseline medians are the control: a round in
which they differ by more than :data:`DRIFT` is thrown away and repeated. The ratio is the median over rounds of
p50(baseline) / p50(ours); its 95 % interval is the exact one for a median (order statistics), which needs seven rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlexport.core.artifact import Array, Artifact, DimRange
from vlexport.core.bundle import ARTIFACT_FOLDER, check_files, file_record, read_bundle
from vlexport.core.bundle_schema import LatencyResult, Report
from vlexport.core.devices import available_cores
from vlexport.core.errors import UsageError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.progress import Reporter, Silent
from vlexport.core.verdict import Gate
from vlexport.report.write import new_report, require_writable, write_report
from vlexport.stages.golden import read_golden
from vlexport.stages.validate import TIMED, judge_gates
from vlexport.targets import open_target
from vlexport.targets.base import Target

DRIFT = 0.05
"""Largest relative difference between the baseline's two medians of a round."""
MAX_REPEATS = 7
_NEEDED_FOR_INTERVAL = 7
_WARMUP = 3
_MIN_RUNS = 5
_MAX_RUNS = 200


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds, and seconds per block of runs."""

    rounds: int
    block_seconds: float


QUICK = Plan(rounds=3, block_seconds=0.7)
"""≤ 30 s; too few rounds for an interval, and marked so."""
FULL = Plan(rounds=7, block_seconds=1.5)


@dataclass(frozen=True)
class Measurable:
    """An artifact that can be opened for timing."""

    name: str
    target: Target
    folder: Path
    artifact: Artifact

    def size_bytes(self) -> int:
        """Bytes of all files of the artifact's folder."""
        return sum(file_record(f).size_bytes for f in self.folder.rglob("*") if f.is_file())


@dataclass(frozen=True)
class ProfileConfig:
    """What to profile.

    Attributes:
        bundle: Folder of the bundle.
        against: Another bundle, ``naive``, or empty.
        reference: Model file, needed for ``naive``.
        arch: Architecture, when the reference holds weights only.
        gates: To judge.
        threads: 0 takes all cores.
        quick: Three rounds instead of seven.
    """

    bundle: Path
    against: str = ""
    reference: str = ""
    arch: str | None = None
    gates: tuple[Gate, ...] = ()
    threads: int = 0
    quick: bool = False


def profile(config: ProfileConfig, *, reporter: Reporter | None = None) -> Report:
    """Measure a bundle's latency and add the report to ``measured/``.

    Raises:
        VlexportError: VLX06xx for the bundle, VLX0803 when the control never holds.
    """
    reporter = reporter or Silent()
    bundle = read_bundle(config.bundle)
    check_files(config.bundle, bundle)
    require_writable(config.bundle)
    _require_timed(config.gates)
    target = open_target(bundle.target)
    target.require()
    ours = Measurable("artifact", target, config.bundle / ARTIFACT_FOLDER, bundle.main.artifact)
    golden, _ = read_golden(config.bundle, bundle.main)
    inputs = {
        spec.name: _at_opt(golden[spec.name], spec.shape, bundle.main.dims) for spec in bundle.main.artifact.inputs
    }
    with _baseline(config, reporter) as baseline:
        latency = measure_latency(
            ours, inputs, baseline=baseline, plan=QUICK if config.quick else FULL,
            threads=config.threads or available_cores(), reporter=reporter,
        )  # fmt: skip
    report = judge_gates(new_report(bundle).model_copy(update={"latency": latency}), config.gates)
    write_report(config.bundle, bundle, report)
    return report


def measure_latency(
    ours: Measurable,
    inputs: Mapping[str, Array],
    *,
    baseline: Measurable | None,
    plan: Plan,
    threads: int,
    reporter: Reporter,
) -> LatencyResult:
    """Measure ``ours``, interleaved with ``baseline`` where there is one.

    Args:
        ours: The artifact.
        inputs: What both run on.
        baseline: What it is compared with.
        plan: How long.
        threads: For both runtimes.
        reporter: Progress.
    """
    with ours.target.open(ours.folder, ours.artifact, threads=threads) as session:
        if baseline is None:
            return _alone(session, inputs, plan, threads, reporter)
        with baseline.target.open(baseline.folder, baseline.artifact, threads=threads) as other:
            result = _interleaved(session, other, inputs, plan, threads, reporter)
    return result.model_copy(update={"baseline": baseline.name, "baseline_size_bytes": baseline.size_bytes()})


def _require_timed(gates: Sequence[Gate]) -> None:
    for gate in gates:
        if gate.metric not in (*TIMED, "size_mb"):
            raise UsageError(
                "VLX0804", f"gate {gate} needs samples, which profile does not look at", where=f"--gate {gate}",
                hint="give it to `vlexport validate`",
            )  # fmt: skip


def _alone(
    session: IsolatedSession, inputs: Mapping[str, Array], plan: Plan, threads: int, reporter: Reporter
) -> LatencyResult:
    runs = _runs(session, inputs, plan)
    times: list[float] = []
    with reporter.steps("profile", plan.rounds) as advance:
        for _ in range(plan.rounds):
            times += session.time_ms(inputs, warmup=1, runs=runs)
            advance()
    p50 = statistics.median(times)
    return LatencyResult(p50_ms=p50, load_ms=session.load_ms, runs=len(times), threads=threads, rounds=plan.rounds)


def _interleaved(
    ours: IsolatedSession,
    baseline: IsolatedSession,
    inputs: Mapping[str, Array],
    plan: Plan,
    threads: int,
    reporter: Reporter,
) -> LatencyResult:
    our_runs, baseline_runs = _runs(ours, inputs, plan), _runs(baseline, inputs, plan)
    ratios: list[float] = []
    our_times: list[float] = []
    baseline_times: list[float] = []
    repeated = 0
    with reporter.steps("profile", plan.rounds) as advance:
        while len(ratios) < plan.rounds and repeated <= MAX_REPEATS:
            before = baseline.time_ms(inputs, warmup=1, runs=baseline_runs)
            mine = ours.time_ms(inputs, warmup=1, runs=our_runs)
            after = baseline.time_ms(inputs, warmup=1, runs=baseline_runs)
            first, last = statistics.median(before), statistics.median(after)
            our_times += mine
            baseline_times += [*before, *after]
            if abs(first / last - 1) > DRIFT:
                repeated += 1
                continue
            ratios.append(statistics.median([*before, *after]) / statistics.median(mine))
            advance()
    steady = len(ratios) == plan.rounds
    low, high = median_interval(ratios)
    return LatencyResult(
        p50_ms=statistics.median(our_times),
        load_ms=ours.load_ms,
        runs=len(our_times),
        threads=threads,
        baseline_p50_ms=statistics.median(baseline_times),
        baseline_load_ms=baseline.load_ms,
        ratio=statistics.median(ratios) if steady else None,
        ratio_low=low if steady else None,
        ratio_high=high if steady else None,
        rounds=len(ratios),
        repeated=repeated,
        verdict=_verdict(steady, len(ratios), low, high),
    )


def median_interval(values: list[float]) -> tuple[float, float]:
    """Exact 95 % interval for the median from order statistics; the whole range when there are too few values."""
    ordered = sorted(values)
    n = len(ordered)
    if not n:
        return math.nan, math.nan
    skip = 0
    while skip + 1 <= (n - 1) // 2 and 2 * sum(math.comb(n, i) for i in range(skip + 2)) / 2**n <= 0.05:
        skip += 1
    return ordered[skip], ordered[n - 1 - skip]


def _verdict(steady: bool, rounds: int, low: float, high: float) -> str:
    if not steady:
        return "too noisy to tell"
    if rounds < _NEEDED_FOR_INTERVAL:
        return "quick"
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "no difference shown"


def _runs(session: IsolatedSession, inputs: Mapping[str, Array], plan: Plan) -> int:
    once = statistics.median(session.time_ms(inputs, warmup=_WARMUP, runs=3)) / 1e3
    return max(_MIN_RUNS, min(_MAX_RUNS, round(plan.block_seconds / max(once, 1e-6))))


def _at_opt(value: Array, shape: tuple[int | str, ...], dims: Mapping[str, DimRange]) -> Array:
    """A golden input cut to every dim's ``opt``, or repeated up to it."""
    for axis, dim in enumerate(shape):
        if isinstance(dim, str):
            value = np.take(value, np.arange(dims[dim].opt) % value.shape[axis], axis=axis)
    return value


@contextmanager
def _baseline(config: ProfileConfig, reporter: Reporter) -> Iterator[Measurable | None]:
    if not config.against:
        yield None
    elif config.against == "naive":
        from vlexport.stages.naive import naive_baseline

        with naive_baseline(config.bundle, config.reference, config.arch, reporter) as made:
            yield made
    else:
        other = Path(config.against)
        bundle = read_bundle(other)
        check_files(other, bundle)
        yield Measurable(
            other.resolve().name or "other bundle",
            open_target(bundle.target),
            other / ARTIFACT_FOLDER,
            bundle.main.artifact,
        )
