"""Figures in words: the same phrase in the receipt, the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlexport.core.account import Account, Missing
from vlexport.core.bundle_schema import (
    AccuracyResult,
    LatencyResult,
    Machine,
    MetricResult,
    OperatorTime,
    PassRecord,
    Report,
    Trial,
    Tuning,
)
from vlexport.core.device_profiles import THIS
from vlexport.core.huge_pages import ASKED_FOR, REQUEST, VARIABLE

_OPERATORS_SHOWN = 6


def size_phrase(size_bytes: int) -> str:
    """Megabytes (10⁶) with one digit; gigabytes, kilobytes or bytes where there are too many of them, or none."""
    if size_bytes < 1e3:
        return f"{size_bytes} B"
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def macs_phrase(macs: int, opaque: tuple[str, ...], *, batch: int = 1) -> str:
    """GMACs, MMACs or kMACs; what is not counted is said, and so is a batch of more than one."""
    unit, size = ("G", 1e9) if macs >= 1e8 else ("M", 1e6) if macs >= 1e5 else ("k", 1e3)
    shown = f"{macs / size:.2f} {unit}MACs"
    shown += f" at batch {batch}" if batch != 1 else ""
    return f"{shown} without {', '.join(opaque)}" if opaque else shown


def parameters_phrase(count: int) -> str:
    """Millions, thousands of a small model, or the number of a tiny one."""
    if count < 1e3:
        return f"{count} parameter{'s' * (count != 1)}"
    return f"{count / 1e6:.2f} M parameters" if count >= 1e5 else f"{count / 1e3:.2f} k parameters"


def device_phrase(profile: str) -> str:
    """What a bundle was built for; the profile of no named device is that of the machine that built it."""
    return "the machine that built it" if profile == THIS else profile


def accuracy_phrase(report: Report) -> str:
    """Accuracy with its interval, or fidelity where there are no labels, or that nothing was measured."""
    found = report.accuracy
    if found is not None:
        shown = (
            f"top-1 {found.top1:.2f} % (95 %: {found.top1_low:.2f} to {found.top1_high:.2f}) on {found.samples} samples"
        )
        if found.drop is not None and found.drop_low is not None and found.drop_high is not None:
            shown += f", drop {found.drop:+.2f} points ({found.drop_low:+.2f} to {found.drop_high:+.2f})"
        return shown
    if report.metrics:
        return "; ".join(map(metric_phrase, report.metrics))
    if report.fidelity:
        name, worst = min(report.fidelity.items(), key=lambda item: item[1].cosine_min)
        return f"{name} against the {report.reference}: cosine ≥ {worst.cosine_min:.6f} on {worst.samples} samples"
    return "not measured: give samples with --data"


def emulation_phrase(report: Report) -> str:
    """Whose figures they are where the target's own runtime did not run; empty where it did."""
    if not report.emulator:
        return ""
    return f"computed by {report.emulator} on the same graph, not by {report.target} itself"


def accuracy_figure(found: AccuracyResult | None) -> tuple[str, str]:
    """Top-1 in percent and the drop in points, for a column; empty where there is none."""
    if found is None:
        return "", ""
    return f"{found.top1:.2f}", f"{found.drop:+.2f}" if found.drop is not None else ""


def ratio_figure(found: LatencyResult | None) -> tuple[str, str]:
    """p50 in milliseconds and the ratio, for a column; a ratio of quick rounds is marked as one."""
    if found is None:
        return "", ""
    quick = " (quick)" if found.verdict == "quick" else ""
    return f"{found.p50_ms:.2f}", f"{found.ratio:.2f}×{quick}" if found.ratio is not None else ""


def metric_phrase(found: MetricResult) -> str:
    """A metric of the user's, with the kind of its interval."""
    shown = f"{found.name} {found.value:.4g} ({_normal(found.low, found.high)}) on {found.samples} samples"
    if found.change is None or found.change_low is None or found.change_high is None or found.reference is None:
        return shown
    change = _normal(found.change_low, found.change_high)
    return f"{shown}, reference {found.reference:.4g}, paired change {found.change:+.4g} ({change})"


def _normal(low: float, high: float) -> str:
    return "one sample, no interval" if math.isinf(low) else f"95 %, normal: {low:.4g} to {high:.4g}"


def load_phrase(found: LatencyResult) -> str:
    """The three kinds of loading."""
    cold = f", {found.cold_load_ms:.0f} ms with the runtime's import" if found.cold_load_ms is not None else ""
    warm = f"; {found.warm_load_ms:.0f} ms when warm" if found.warm_load_ms is not None else ""
    return f"load {found.load_ms:.0f} ms in a fresh process{cold}{warm}"


def tail_phrase(found: LatencyResult) -> str:
    """Percentiles above the median, or why there are none."""
    p90 = f"p90 {found.p90_ms:.2f} ms" if found.p90_ms is not None else "p90 not measured"
    p99 = f"p99 {found.p99_ms:.2f} ms" if found.p99_ms is not None else "p99 not measured"
    few = " (too few)" if found.p99_ms is None else ""
    return f"{p90}, {p99}, of {found.runs} runs{few}"


def throughput_phrase(found: LatencyResult) -> str:
    """Samples a second, at the batch of the rounds and at the one that was asked for."""
    if found.throughput is None:
        return "throughput not measured"
    shown = f"{found.throughput:.1f} samples/s at batch {found.batch}"
    if found.large_batch is None or found.large_batch_throughput is None:
        return shown
    return f"{shown}, {found.large_batch_throughput:.1f} at batch {found.large_batch}"


def memory_phrase(found: LatencyResult) -> str:
    """The process's peak memory, where this system tells it."""
    if found.peak_memory_bytes is None:
        return "peak memory not measured here"
    return f"peak memory {size_phrase(found.peak_memory_bytes)} with interpreter and runtime"


def operators_phrase(times: Sequence[OperatorTime]) -> str:
    """Where a runtime's profiler sees the time go: the operators that take the most, with how many there are."""
    whole = sum(each.ms for each in times) or 1.0
    shown = [f"{100 * each.ms / whole:.0f} % in {each.count} {each.operator}" for each in times[:_OPERATORS_SHOWN]]
    rest = f", {100 * sum(each.ms for each in times[_OPERATORS_SHOWN:]) / whole:.0f} % in others"
    return ", ".join(shown) + (rest if len(times) > _OPERATORS_SHOWN else "")


def speed_phrase(found: LatencyResult) -> str:
    """Operations a second, beside what plain products of matrices reach on the same machine."""
    if found.gops is None or not found.ceilings:
        return "speed in operations not measured"
    parts = [
        f"{100 * found.gops / each.gops:.0f} % of the {each.gops:.1f} of a plain product in {each.kind}"
        for each in reversed(found.ceilings)
    ]
    unit = "GOP/s" if len(found.ceilings) > 1 else "GFLOP/s"
    return f"{found.gops:.1f} {unit}, {', '.join(parts)}"


def latency_phrase(report: Report) -> str:
    """Latency, and the ratio with its interval where one holds."""
    found = report.latency
    if found is None:
        return "not measured here"
    shown = f"p50 {found.p50_ms:.2f} ms at {found.threads} thread{'s' if found.threads != 1 else ''}"
    shown += f", batch {found.batch}" if found.batch != 1 else ""
    shown += ", huge pages" if report.machine.memory_pages == ASKED_FOR else ""
    if not found.baseline:
        return shown
    if found.ratio is None or found.ratio_low is None or found.ratio_high is None:
        return f"{shown}; against {found.baseline}: too noisy to tell ({found.repeated} rounds drifted)"
    span = f"{found.ratio_low:.2f} to {found.ratio_high:.2f}"
    kind = (
        f"range of {found.rounds} quick rounds, no verdict"
        if found.verdict == "quick"
        else f"95 %: {span}, {found.verdict}"
    )
    if found.verdict == "quick":
        return f"{shown}; {found.ratio:.2f}× against {found.baseline} ({span}, {kind})"
    return f"{shown}; {found.ratio:.2f}× against {found.baseline} ({kind})"


def pages_phrase(machine: Machine) -> str:
    """What pages of memory the figures stand for, where a process gets such pages only by asking; empty elsewhere."""
    if machine.memory_pages != ASKED_FOR:
        return ""
    return f"memory in huge pages, which this system gives to who asks: set {VARIABLE}={REQUEST} where the model runs"


def tuning_phrase(found: Tuning) -> str:
    """What a search decided, with the confirmed figure."""
    count = len(found.trials)
    tried = f"{count} candidate{'s' if count != 1 else ''}"
    confirmed = found.confirmation
    if confirmed is None:
        said = f"the recipe stands: none of {tried} was faster"
    elif found.adopted:
        said = f"{options_phrase(found.adopted)} of {tried}: {ratio_phrase(confirmed)} the recipe as it was, confirmed"
    else:
        said = f"the recipe stands: of {tried}, {options_phrase(confirmed.options)} was not confirmed: "
        said += ratio_phrase(confirmed)
    if not found.finished:
        said += "; the budget ended the search, --resume goes on"
    if found.confirming_samples:
        said += f"; accuracy is that of the {found.confirming_samples} samples not chosen on"
    return said


def ratio_phrase(trial: Trial) -> str:
    """A candidate's ratio with its interval or range, or why there is none."""
    if trial.ratio is None or trial.ratio_low is None or trial.ratio_high is None:
        return f"{trial.outcome} ({trial.reason})"
    return f"{trial.ratio:.3f}× ({trial.ratio_low:.3f} to {trial.ratio_high:.3f})"


def options_phrase(options: dict[str, str]) -> str:
    """Options as after ``--set``."""
    return " ".join(f"{name}={value}" for name, value in options.items())


def account_phrase(account: Account) -> str:
    """How many of the expected modules became one operator, and which."""
    fates = ", ".join(f"{name} {count}" for name, count in account.fates.items())
    said = f"{account.idea}: {account.found} of {account.expected} modules became one operator"
    said += f" ({fates})" if fates else ""
    return said + (f"; {account.beyond} more in no such module" if account.beyond else "")


def missing_phrase(missing: Missing) -> str:
    """Modules of one class, and why they are not one operator."""
    others = len(missing.modules) - 1
    more = f" and {others} more" if others else ""
    return f"{missing.of} at {missing.modules[0] or 'the root'}{more}: {missing.reason}"


def shortfall_phrase(accounts: Sequence[Account]) -> str:
    """What is expected and was not found, with the first reason; empty where nothing is missing."""
    short = [each for each in accounts if each.missing]
    if not short:
        return ""
    counts = ", ".join(f"{a.expected - a.found} of {a.expected} {a.idea} modules" for a in short)
    others = sum(len(each.missing) for each in short) - 1
    more = f" (and {others} more reason{'s' if others > 1 else ''} in the report)" if others else ""
    return f"{counts} did not become one operator: {missing_phrase(short[0].missing[0])}{more}"


def pass_phrase(record: PassRecord) -> str:
    """What a pass did, in a few words."""
    count = sum(change.count for change in record.changes)
    said = f"{record.name} {count} change{'s' if count != 1 else ''}" if count else f"{record.name} nothing to do"
    misses = len(record.near_misses)
    return f"{said} ({misses} near miss{'es' if misses != 1 else ''})" if misses else said


def idle_passes(records: Sequence[PassRecord]) -> tuple[str, ...]:
    """Names of passes that had nothing to do, each once; a pass that runs twice must have been idle both times."""
    busy = {each.name for each in records if each.changes or each.near_misses}
    return tuple(dict.fromkeys(each.name for each in records if each.name not in busy))
