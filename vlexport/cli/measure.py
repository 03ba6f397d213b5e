"""``vlexport validate`` and ``vlexport profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlexport.cli.console import make_reporter
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import Report, plain_json
from vlexport.core.verdict import exit_code, gate_from_text

BundleArgument = Annotated[
    Path, typer.Argument(help="Folder that `vlexport build` wrote.", metavar="BUNDLE", show_default=False)
]
GateOption = Annotated[list[str] | None, typer.Option("--gate", help='Repeatable "METRIC OP VALUE"; judges only.')]
ThreadsOption = Annotated[
    int, typer.Option("--threads", help="Threads for the runtime; 0 means the bundle's, or all cores.", min=0, max=1024)
]
ArchOption = Annotated[
    str | None,
    typer.Option("--arch", help="Architecture, when the reference holds weights only: timm:NAME, FILE.py:FACTORY."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def validate(
    bundle: BundleArgument,
    data: Annotated[str, typer.Option("--data", help="Class folders, images, .npz or FILE.py:FUNCTION.")],
    reference: Annotated[str, typer.Option("--reference", help="Model file or bundle to compare with.")] = "",
    arch: ArchOption = None,
    gate: GateOption = None,
    max_drop: Annotated[float | None, typer.Option("--max-drop", help="Same as --gate drop<=P.", min=0)] = None,
    threads: ThreadsOption = 0,
    json_output: JsonOption = False,
) -> Outcome:
    """Measure accuracy on labelled samples, and fidelity to a reference."""
    from vlexport.report.figures import accuracy_phrase
    from vlexport.stages.validate import ValidateConfig
    from vlexport.stages.validate import validate as stage

    texts = [*(gate or []), *([f"drop<={max_drop:g}"] if max_drop is not None else [])]
    config = ValidateConfig(bundle, data, reference, arch, tuple(map(gate_from_text, texts)), threads)
    report = stage(config, reporter=make_reporter())
    lines = [accuracy_phrase(report)]
    for name, found in report.fidelity.items():
        agreement = f", same top-1 on {found.agreements} of {found.samples}" if found.agreements is not None else ""
        lines.append(
            f"{name} against the {report.reference}: cosine {found.cosine_mean:.6f} (least {found.cosine_min:.6f}), "
            f"SQNR {found.sqnr_db:.1f} dB, max|a−b|/max|b| {found.relative_error:.1e}{agreement}"
        )
    for each in report.disagreements:
        close = ", within rounding" if each.close else ""
        lines.append(f"differs: {each.sample} (margin {each.margin:.1e}{close})")
    return _outcome(lines, report)


def profile(
    bundle: BundleArgument,
    against: Annotated[str, typer.Option("--against", help="`naive` (with --reference) or another bundle.")] = "",
    reference: Annotated[str, typer.Option("--reference", help="Model file that the bundle was built from.")] = "",
    arch: ArchOption = None,
    gate: GateOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds instead of seven: no verdict.")] = False,
    threads: ThreadsOption = 0,
    json_output: JsonOption = False,
) -> Outcome:
    """Measure latency, interleaved with a baseline, each in its own process."""
    from vlexport.core.errors import EXIT_INCONCLUSIVE
    from vlexport.report.figures import latency_phrase, size_phrase
    from vlexport.stages.profile import ProfileConfig
    from vlexport.stages.profile import profile as stage

    config = ProfileConfig(bundle, against, reference, arch, tuple(map(gate_from_text, gate or [])), threads, quick)
    report = stage(config, reporter=make_reporter())
    assert report.latency is not None
    found = report.latency
    lines = [
        latency_phrase(report),
        f"load {found.load_ms:.0f} ms, size {size_phrase(report.size_bytes)}, {report.cost.macs / 1e9:.2f} GMACs",
    ]
    if found.baseline and found.baseline_p50_ms is not None and found.baseline_load_ms is not None:
        lines.append(
            f"{found.baseline}: p50 {found.baseline_p50_ms:.2f} ms, load {found.baseline_load_ms:.0f} ms, "
            f"size {size_phrase(found.baseline_size_bytes or 0)}"
        )
    lines.append(
        f"{report.machine.cpu}, {', '.join(report.machine.instruction_set)}; "
        f"{found.rounds} rounds, {found.repeated} repeated"
    )
    outcome = _outcome(lines, report)
    if outcome.exit_code == 0 and found.verdict == "too noisy to tell":
        return Outcome(outcome.lines, outcome.payload, EXIT_INCONCLUSIVE)
    return outcome


def _outcome(lines: list[str], report: Report) -> Outcome:
    lines = [*lines, *(f"gate {verdict}" for verdict in report.verdicts), *(f"note: {note}" for note in report.notes)]
    return Outcome(lines, {"report": plain_json(report)}, exit_code(report.verdicts))
