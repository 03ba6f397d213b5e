"""The receipt: what a build ends in, at most twelve lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vlexport.core.bundle_schema import Bundle, Report
from vlexport.report.figures import (
    accuracy_phrase,
    emulation_phrase,
    latency_phrase,
    macs_phrase,
    parameters_phrase,
    pass_phrase,
    shortfall_phrase,
    size_phrase,
    tuning_phrase,
)

MAX_LINES = 12
_MAX_NOTES = 3
_LAST_LINES = 3
"""What comes behind the notes."""
_BEHIND_PASSES = 3


def receipt(bundle: Bundle, report: Report, shown_path: str, *, use_it: Sequence[str] = ()) -> list[str]:
    """Lines of the receipt.

    Args:
        bundle: What was built.
        report: What was measured.
        shown_path: The bundle's folder as the user typed it.
        use_it: How its target is used where that is not by ``vlexport.load``; one line.
    """
    main = bundle.main
    work = macs_phrase(main.cost.macs, main.cost.opaque, batch=main.artifact.batch(main.dims))
    lines = [
        f"Built    {shown_path}: {bundle.target} {bundle.precision}, {_components(bundle)}"
        f"{size_phrase(report.size_bytes)}, {work}, {parameters_phrase(main.cost.parameters)}",
        f"Checked  {_gates(bundle)}; {_golden(bundle, report)}",
        f"Passes   {_passes(bundle)}",
        f"Accuracy {accuracy_phrase(report)}",
        f"Latency  {latency_phrase(report)}",
    ]
    shortfall = shortfall_phrase(main.account)
    if shortfall:
        lines.insert(_BEHIND_PASSES, f"Missing  {shortfall}")
    searched = [f"{each.about}: {each.said}" for each in report.searches]
    if report.tuning is not None:
        searched.append(tuning_phrase(report.tuning))
    if searched:
        lines.append(f"Tuned    {'; '.join(searched)}")
    lines += _verdicts(report, room=MAX_LINES - _LAST_LINES - len(lines))
    if report.notes:
        shown = report.notes[: min(_MAX_NOTES, MAX_LINES - _LAST_LINES - len(lines))]
        lines += [f"Note     {note}" for note in shown]
        if len(report.notes) > len(shown):
            left = len(report.notes) - len(shown)
            lines[-1] += f" (and {left} {'more' if shown else 'notes'} in the report)"
    quick = report.latency is not None and report.latency.verdict == "quick"
    why = "full rounds; the quick figure has no verdict" if quick else "measure latency"
    if bundle.state == "verified":
        lines.append(f"Next     vlexport profile {shlex.quote(shown_path)}   ({why})")
    else:
        lines.append(f"Next     copy {shown_path} to where {bundle.target} itself runs, and measure there")
    lines.append("Use it:")
    return [*lines, *(use_it or snippet(bundle, shown_path))]


def _verdicts(report: Report, *, room: int) -> list[str]:
    """Gates, those that do not hold first, and of others as many as make two."""
    found = sorted(report.verdicts, key=lambda each: ("fail", "inconclusive", "pass").index(each.outcome))
    broken = sum(each.outcome != "pass" for each in found)
    shown = [f"Gate     {each}" for each in found[: min(room, max(2, broken))]]
    if len(found) > len(shown):
        shown[-1] += f" (and {len(found) - len(shown)} more in the report)"
    return shown


def snippet(bundle: Bundle, shown_path: str) -> list[str]:
    """Python that loads the bundle and runs it once."""
    main = bundle.main
    if len(main.preprocess) == 1 and len(main.artifact.inputs) == 1 and len(main.artifact.outputs[0].shape) == 2:
        return [f'    import vlexport; print(vlexport.load({shown_path!r}).classify("photo.png"))']
    shapes = [(s, tuple(main.dims[d].opt if isinstance(d, str) else d for d in s.shape)) for s in main.artifact.inputs]
    arrays = ", ".join(f"{spec.name!r}: np.zeros({shape}, {spec.dtype!r})" for spec, shape in shapes)
    return [f"    import numpy as np, vlexport; print(vlexport.load({shown_path!r}).run({{{arrays}}}))"]


def _golden(bundle: Bundle, report: Report) -> str:
    """Whether the golden vectors were run, and by the target's own runtime or another."""
    within = f"golden vectors within {bundle.main.golden.tolerance:.0e}"
    if bundle.state == "verified":
        return within
    if report.emulator:
        return f"{within}, {emulation_phrase(report)}"
    return "made but not verified here"


def _components(bundle: Bundle) -> str:
    names = list(bundle.components)
    return f"{len(names)} components ({', '.join(names)}), " if len(names) > 1 else ""


def _passes(bundle: Bundle) -> str:
    """Passes that did something, or nearly."""
    records = bundle.main.passes
    told = [pass_phrase(record) for record in records if record.changes or record.near_misses]
    rest = ["all others nothing to do" if told else "nothing to do"] if len(told) < len(records) else []
    return "; ".join([*told, *rest])


def _gates(bundle: Bundle) -> str:
    records = bundle.main.passes
    if any(p.gate.proof == "off" for p in records):
        return "numeric gate off"
    proven = [p.name for p in records if p.gate.proof == "float64"]
    unproved = [p.name for p in records if p.gate.proof == "unproved"]
    worst = max((p.gate.worst for p in records), default=0.0)
    change = f"largest change {worst:.0e}" if worst else "no output changed by a bit"
    said = f"{len(records)} passes gated, {change}"
    said += f", proven rounding in float64: {', '.join(proven)}" if proven else ""
    said += f", unproved: {', '.join(unproved)}" if unproved else ""
    judged = [p for p in records if p.gate.statistic is not None and p.gate.value is not None]
    return said + "".join(f", {p.name} {p.gate.statistic} {p.gate.value:g} (bound {p.gate.bound:g})" for p in judged)
