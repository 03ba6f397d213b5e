"""Figures in words: the same phrase in the receipt, the report and the terminal."""

from __future__ import annotations

from vlexport.core.bundle_schema import PassRecord, Report


def size_phrase(size_bytes: int) -> str:
    """Megabytes (10⁶) with one digit, or kilobytes below one."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def macs_phrase(macs: int, opaque: tuple[str, ...]) -> str:
    """GMACs or MMACs; what is not counted is said."""
    shown = f"{macs / 1e9:.2f} GMACs" if macs >= 1e8 else f"{macs / 1e6:.2f} MMACs"
    return f"{shown} without {', '.join(opaque)}" if opaque else shown


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
    if report.fidelity:
        name, worst = min(report.fidelity.items(), key=lambda item: item[1].cosine_min)
        return f"{name} against the {report.reference}: cosine ≥ {worst.cosine_min:.6f} on {worst.samples} samples"
    return "not measured: give samples with --data"


def latency_phrase(report: Report) -> str:
    """Latency, and the ratio with its interval where one holds."""
    found = report.latency
    if found is None:
        return "not measured here"
    shown = f"p50 {found.p50_ms:.2f} ms at {found.threads} thread{'s' if found.threads != 1 else ''}"
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


def pass_phrase(record: PassRecord) -> str:
    """What a pass did, in a few words."""
    count = sum(change.count for change in record.changes)
    said = f"{record.name} {count} change{'s' if count != 1 else ''}" if count else f"{record.name} nothing to do"
    misses = len(record.near_misses)
    return f"{said} ({misses} near miss{'es' if misses != 1 else ''})" if misses else said
