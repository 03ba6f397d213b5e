"""profile: latency against a baseline, interleaved, each session alone in its own process. No torch.

A round measures the baseline, then ours, then the baseline again. The two baseline medians are the control: a round in
which they differ by more than :data:`DRIFT` is thrown away and repeated. The ratio is the median over rounds of
p50(baseline) / p50(ours); its 95 % interval is the exact one for a median (order statistics), which needs seven rounds.

A runtime's threads go on spinning for a while after a run (ONNX Runtime's: 35 to 40 ms of one core, measured), in the
process that is idle now and beside the one that is timed. So every block begins with a rest of :data:`REST_SECONDS`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlexport.core.artifact import Array, Artifact
from vlexport.core.bundle import ARTIFACT_FOLDER, check_files, file_record, read_bundle
from vlexport.core.bundle_schema import Bundle, Component, LatencyResult, OperatorTime, Report
from vlexport.core.devices import available_cores
from vlexport.core.errors import CapabilityError, UsageError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.progress import Reporter, Silent
from vlexport.core.verdict import Gate
from vlexport.frontends.named_paths import require_reference
from vlexport.report.write import new_report, require_writable, write_report
from vlexport.stages.ceiling import ceilings, gops
from vlexport.stages.golden import read_golden
from vlexport.stages.validate import TIMED, judge_gates
from vlexport.targets import open_target
from vlexport.targets.base import Target

DRIFT = 0.05
"""Largest relative difference between the baseline's two medians of a round."""
_NEEDED_FOR_INTERVAL = 7
REST_SECONDS = 0.1
"""Before each block: until then the other process has stopped spinning."""
_FOR_P90 = 20
_FOR_P99 = 200
_WARMUP = 3
_PROFILED_RUNS = (3, 10)
_PROFILED_MS = 2000.0
"""The runtime's profiler watches so many runs, as many as fit into so long."""
_MIN_RUNS = 5
_MAX_RUNS = 200


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: Rounds whose control must hold.
        block_seconds: Seconds per block of runs.
        limit_seconds: No further round is begun after so long, once one has held; None means no limit.
        repeats: Rounds whose control did not hold before the machine is called too noisy.
    """

    rounds: int
    block_seconds: float
    limit_seconds: float | None = None
    repeats: int = 7


QUICK = Plan(rounds=3, block_seconds=0.7, limit_seconds=20.0)
"""About 20 s, or one round of a model that takes longer; too few rounds for an interval, and marked so."""
FULL = Plan(rounds=7, block_seconds=1.5, repeats=21)


class Timeable(Protocol):
    """What rounds are measured on: something open in a process of its own.

    Attributes:
        load_ms: Milliseconds of opening it, the runtime being imported already.
        cold_load_ms: The same with the import of the runtime.
    """

    load_ms: float
    cold_load_ms: float

    def time_ms(self, inputs: Mapping[str, Array], *, warmup: int, runs: int) -> list[float]:
        """Milliseconds of ``runs`` runs, measured inside that process after ``warmup`` runs."""
        ...


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
        batch: Measure the artifact at this batch as well; 0 for batch 1 (opt) alone.
        timeout_s: Seconds that one answer of a runtime may take; None waits for ever.
    """

    bundle: Path
    against: str = ""
    reference: str = ""
    arch: str | None = None
    gates: tuple[Gate, ...] = ()
    threads: int = 0
    quick: bool = False
    batch: int = 0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """A path given as text becomes one."""
        object.__setattr__(self, "bundle", Path(self.bundle))


def profile(config: ProfileConfig, *, reporter: Reporter | None = None) -> Report:
    """Measure a bundle's latency and add the report to ``measured/``.

    Raises:
        VlexportError: VLX06xx for the bundle, VLX0501 where the target does not run, VLX0703 for a batch that it does
            not take, VLX0803 when times on it mean nothing, VLX0804 for gates on what is not measured.
    """
    reporter = reporter or Silent()
    bundle = read_bundle(config.bundle)
    if config.against == "naive":
        require_reference(config.reference, config.arch)
    elif config.against:
        read_bundle(Path(config.against))
    check_files(config.bundle, bundle)
    require_writable(config.bundle)
    _require_timed(config)
    large = _large_sizes(config.batch, bundle.main)
    target = open_target(bundle.target)
    _require_runnable(target)
    ours = Measurable("artifact", target, config.bundle / ARTIFACT_FOLDER, bundle.main.artifact)
    golden, _ = read_golden(config.bundle, bundle.main)
    opt = {name: found.opt for name, found in bundle.main.dims.items()}
    inputs = _sized(golden, bundle.main, opt)
    with _baseline(config, reporter) as baseline:
        latency = measure_latency(
            ours, inputs, baseline=baseline, plan=QUICK if config.quick else FULL,
            threads=config.threads or available_cores(), reporter=reporter,
            large=_sized(golden, bundle.main, {**opt, **large}) if large else None, timeout_s=config.timeout_s,
            operators=True,
        )  # fmt: skip
    latency = _beside_products(latency, ours, bundle, config)
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
    large: Mapping[str, Array] | None = None,
    timeout_s: float | None = None,
    operators: bool = False,
) -> LatencyResult:
    """Measure ``ours``, interleaved with ``baseline`` where there is one.

    Args:
        ours: The artifact.
        inputs: What both run on.
        baseline: What it is compared with.
        plan: How long.
        threads: For both runtimes.
        reporter: Progress.
        large: Inputs of a larger batch, to be measured on ``ours`` after the rounds.
        timeout_s: Seconds that one answer of a runtime may take.
        operators: Ask the runtimes, too, where the time goes. Each opens its file once more, and runs it for about two
            seconds at most (three runs at least).
    """
    with ours.target.open(ours.folder, ours.artifact, threads=threads, timeout_s=timeout_s) as session:
        if baseline is None:
            result = _alone(session, inputs, plan, threads, reporter)
        else:
            with baseline.target.open(
                baseline.folder, baseline.artifact, threads=threads, timeout_s=timeout_s
            ) as other:
                result = interleaved(session, other, inputs, plan, threads, reporter)
                theirs = _by_operator(other, inputs, result.baseline_p50_ms) if operators else ()
            named = {"baseline": baseline.name, "baseline_size_bytes": baseline.size_bytes()}
            result = result.model_copy(update={**named, "baseline_operators": theirs})
        result = result.model_copy(update={"peak_memory_bytes": session.peak_memory_bytes()})
        if large is not None:
            result = result.model_copy(update=_at_large(session, large, plan))
        if operators:
            result = result.model_copy(update={"operators": _by_operator(session, inputs, result.p50_ms)})
        # Last, because a second copy of the artifact is in memory then.
        return result.model_copy(update={"warm_load_ms": session.reload_ms()})


def _beside_products(latency: LatencyResult, ours: Measurable, bundle: Bundle, config: ProfileConfig) -> LatencyResult:
    """The speed in operations, and what the machine's plain products reach."""
    found = ceilings(
        ours.target, ours.artifact, bundle.precision, threads=latency.threads, timeout_s=config.timeout_s
    )  # fmt: skip
    reached = gops(bundle.main.cost.macs, latency.p50_ms)
    return latency.model_copy(update={"gops": reached, "ceilings": found}) if found else latency


def _by_operator(
    session: IsolatedSession, inputs: Mapping[str, Array], p50_ms: float | None
) -> tuple[OperatorTime, ...]:
    least, most = _PROFILED_RUNS
    runs = max(least, min(most, int(_PROFILED_MS / p50_ms))) if p50_ms else most
    found = session.operator_times(inputs, runs=runs)
    return tuple(OperatorTime(operator=name, count=count, ms=round(ms, 4)) for name, (count, ms) in found.items())


def _at_large(session: IsolatedSession, inputs: Mapping[str, Array], plan: Plan) -> dict[str, float]:
    times = _block(session, inputs, _runs(session, inputs, plan))
    batch = _batch_of(inputs)
    return {
        "large_batch": batch,
        "large_batch_p50_ms": statistics.median(times),
        "large_batch_throughput": batch * 1e3 / statistics.mean(times),
    }


def _ours(session: Timeable, inputs: Mapping[str, Array], times: Sequence[float]) -> dict[str, Any]:
    """The figures of a result that concern our own runs alone."""
    batch = _batch_of(inputs)
    return {
        "p50_ms": statistics.median(times),
        "p90_ms": float(np.percentile(times, 90)) if len(times) >= _FOR_P90 else None,
        "p99_ms": float(np.percentile(times, 99)) if len(times) >= _FOR_P99 else None,
        "load_ms": session.load_ms,
        "cold_load_ms": session.cold_load_ms,
        "runs": len(times),
        "batch": batch,
        "throughput": batch * 1e3 / statistics.mean(times),
    }


def _block(session: Timeable, inputs: Mapping[str, Array], runs: int) -> list[float]:
    time.sleep(REST_SECONDS)
    return session.time_ms(inputs, warmup=1, runs=runs)


def _batch_of(inputs: Mapping[str, Array]) -> int:
    first = next((value for value in inputs.values() if value.ndim), None)
    return 1 if first is None else len(first)


def _require_runnable(target: Target) -> None:
    found = target.probe()
    if not found.available:
        raise CapabilityError(
            "VLX0501", f"not measured here: {target.id} cannot run on this machine", where="profile", hint=found.reason
        )


def _require_timed(config: ProfileConfig) -> None:
    for gate in config.gates:
        if gate.metric == "regress" and (not config.against or config.quick):
            raise UsageError(
                "VLX0804", f"gate {gate} needs full rounds against a baseline", where=f"--gate {gate}",
                hint="leave --quick out" if config.against else "add --against OTHER",
            )  # fmt: skip
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
            times += _block(session, inputs, runs)
            advance()
    return LatencyResult(threads=threads, rounds=plan.rounds, **_ours(session, inputs, times))


def interleaved(
    ours: Timeable,
    baseline: Timeable,
    inputs: Mapping[str, Array],
    plan: Plan,
    threads: int,
    reporter: Reporter,
) -> LatencyResult:
    """Rounds of the baseline, ours and the baseline again, until enough of them held.

    Args:
        ours: What is measured.
        baseline: What it is compared with.
        inputs: What both run on.
        plan: How long.
        threads: Of both, recorded only.
        reporter: Progress.
    """
    our_runs, baseline_runs = _runs(ours, inputs, plan), _runs(baseline, inputs, plan)
    ratios: list[float] = []
    our_times: list[float] = []
    baseline_times: list[float] = []
    drifted: list[tuple[list[float], list[float]]] = []
    started = time.monotonic()
    with reporter.steps("profile", plan.rounds) as advance:
        while len(ratios) < plan.rounds and len(drifted) <= plan.repeats:
            if ratios and plan.limit_seconds is not None and time.monotonic() - started > plan.limit_seconds:
                break
            before = _block(baseline, inputs, baseline_runs)
            mine = _block(ours, inputs, our_runs)
            after = _block(baseline, inputs, baseline_runs)
            first, last = statistics.median(before), statistics.median(after)
            if abs(first / last - 1) > DRIFT:
                drifted.append((mine, [*before, *after]))
                continue
            our_times += mine
            baseline_times += [*before, *after]
            ratios.append(statistics.median([*before, *after]) / statistics.median(mine))
            advance()
    steady = bool(ratios) and len(drifted) <= plan.repeats
    low, high = median_interval(ratios)
    if not ratios:  # better a rough figure, marked as noisy, than none
        our_times = [t for mine, _ in drifted for t in mine]
        baseline_times = [t for _, theirs in drifted for t in theirs]
    return LatencyResult(
        **_ours(ours, inputs, our_times),
        threads=threads,
        baseline_p50_ms=statistics.median(baseline_times),
        baseline_load_ms=baseline.load_ms,
        ratio=statistics.median(ratios) if steady else None,
        ratio_low=low if steady else None,
        ratio_high=high if steady else None,
        rounds=len(ratios),
        repeated=len(drifted),
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


def _runs(session: Timeable, inputs: Mapping[str, Array], plan: Plan) -> int:
    once = statistics.median(session.time_ms(inputs, warmup=_WARMUP, runs=3)) / 1e3
    return max(_MIN_RUNS, min(_MAX_RUNS, round(plan.block_seconds / max(once, 1e-6))))


def _sized(golden: Mapping[str, Array], component: Component, sizes: Mapping[str, int]) -> dict[str, Array]:
    """The golden inputs with every dynamic dim cut to its size, or repeated up to it."""
    made = {}
    for spec in component.artifact.inputs:
        value = golden[spec.name]
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                value = np.take(value, np.arange(sizes[dim]) % value.shape[axis], axis=axis)
        made[spec.name] = value
    return made


def _large_sizes(batch: int, component: Component) -> dict[str, int]:
    """Size of the batch dim for ``--batch``; empty when none is asked for.

    Raises:
        UsageError: VLX0703 when the bundle's batch is fixed, or its range does not hold that size.
    """
    if not batch:
        return {}
    shape = component.artifact.inputs[0].shape
    dim = shape[0] if shape else 1
    if not isinstance(dim, str):
        raise UsageError(
            "VLX0703", f"--batch {batch}: this bundle's batch is fixed to {dim}", where="--batch",
            hint="leave --batch out, or save the model with a dynamic batch",
        )  # fmt: skip
    found = component.dims[dim]
    if batch < found.min or (found.max is not None and batch > found.max):
        upper = "up" if found.max is None else f"to {found.max}"
        raise UsageError(
            "VLX0703", f"--batch {batch}: this bundle takes batches from {found.min} {upper}", where="--batch"
        )
    return {dim: batch}


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
            f"bundle {bundle.digest[:12]}",
            open_target(bundle.target),
            other / ARTIFACT_FOLDER,
            bundle.main.artifact,
        )
