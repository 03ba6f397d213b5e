"""``vlexport validate`` and ``vlexport profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlexport.cli.console import make_reporter
from vlexport.cli.formats import FormatOption, OutputFormat
from vlexport.cli.outcome import Check, Outcome, checks_of
from vlexport.core.bundle_schema import LatencyResult, OperatorTime, Report, plain_json
from vlexport.core.errors import UsageError
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
BaselineOption = Annotated[
    str, typer.Option("--baseline", help="Another bundle, the one to beat; judged with --max-regress.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", help="Seconds that one answer of the runtime may take; 0 means no limit.", min=0)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def validate(
    bundle: BundleArgument,
    data: Annotated[str, typer.Option("--data", help="Class folders, images, .npz, .jsonl or FILE.py:FUNCTION.")],
    reference: Annotated[str, typer.Option("--reference", help="Model file or bundle to compare with.")] = "",
    arch: ArchOption = None,
    gate: GateOption = None,
    max_drop: Annotated[float | None, typer.Option("--max-drop", help="Same as --gate drop<=P.", min=0)] = None,
    baseline: BaselineOption = "",
    max_regress: Annotated[
        float | None, typer.Option("--max-regress", help="Largest drop of top-1 against --baseline, in points.", min=0)
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Repeatable FILE.py:FUNCTION, (outputs, label) → number a sample."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out samples that cannot be read or hold NaN; list them.")
    ] = False,
    threads: ThreadsOption = 0,
    timeout: TimeoutOption = 0,
    diagnose_preprocess: Annotated[
        bool, typer.Option("--diagnose-preprocess", help="Try the usual preprocessings instead; say which is better.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", help="For --diagnose-preprocess: about how many samples.", min=20)
    ] = 400,
    output_format: FormatOption = OutputFormat.HUMAN,
    json_output: JsonOption = False,
) -> Outcome:
    """Measure accuracy on labelled samples, and fidelity to a reference."""
    from vlexport.core.bundle import read_bundle
    from vlexport.core.user_metric import metric_names
    from vlexport.report.figures import accuracy_phrase, metric_phrase
    from vlexport.stages.validate import ValidateConfig
    from vlexport.stages.validate import validate as stage

    _require_one_baseline(baseline, max_regress, reference, "--reference")
    if diagnose_preprocess:
        unfit = {"--gate": gate, "--max-drop": max_drop is not None, "--metric": metric, "--baseline": baseline}
        for name, given in unfit.items():
            if given:
                raise UsageError(
                    "VLX0703", f"--diagnose-preprocess judges nothing, and {name} was given", where=name,
                    hint="leave it out",
                )  # fmt: skip
        return _diagnosed(bundle, data, reference, arch, threads, timeout, samples, skip_bad)
    if baseline:
        read_bundle(Path(baseline))
    drops = [bound for bound in (max_drop, max_regress) if bound is not None]
    texts = [*(gate or []), *(f"drop<={bound:g}" for bound in drops)]
    own = tuple(metric or ())
    names = metric_names(own)
    config = ValidateConfig(
        bundle, data, baseline or reference, arch, tuple(gate_from_text(text, extra=names) for text in texts), threads,
        skip_bad=skip_bad, metrics=own, timeout_s=timeout or None,
    )  # fmt: skip
    report = stage(config, reporter=make_reporter())
    lines = [accuracy_phrase(report)]
    lines += [metric_phrase(found) for found in report.metrics if metric_phrase(found) not in lines[0]]
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
    baseline: BaselineOption = "",
    max_regress: Annotated[
        float | None, typer.Option("--max-regress", help="How much longer than --baseline, in percent of p50.", min=0)
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", help="Measure at this batch too, where it is dynamic; 0 means no.", min=0)
    ] = 0,
    threads: ThreadsOption = 0,
    timeout: TimeoutOption = 0,
    output_format: FormatOption = OutputFormat.HUMAN,
    json_output: JsonOption = False,
) -> Outcome:
    """Measure latency, interleaved with a baseline, each in its own process."""
    from vlexport.core.errors import EXIT_INCONCLUSIVE
    from vlexport.report.figures import (
        latency_phrase,
        load_phrase,
        macs_phrase,
        memory_phrase,
        operators_phrase,
        pages_phrase,
        size_phrase,
        speed_phrase,
        tail_phrase,
        throughput_phrase,
    )
    from vlexport.stages.profile import ProfileConfig
    from vlexport.stages.profile import profile as stage

    _require_one_baseline(baseline, max_regress, against, "--against")
    texts = [*(gate or []), *([f"regress<={max_regress:g}"] if max_regress is not None else [])]
    config = ProfileConfig(
        bundle, str(Path(baseline).absolute()) if baseline else against, reference, arch,
        tuple(map(gate_from_text, texts)), threads, quick, batch=batch, timeout_s=timeout or None,
    )  # fmt: skip
    report = stage(config, reporter=make_reporter())
    assert report.latency is not None
    found = report.latency
    lines = [
        latency_phrase(report),
        f"{tail_phrase(found)}; {throughput_phrase(found)}",
        f"{load_phrase(found)}; {memory_phrase(found)}",
        f"size {size_phrase(report.size_bytes)}, "
        f"{macs_phrase(report.cost.macs, report.cost.opaque, batch=found.batch)}",
    ]
    if found.baseline and found.baseline_p50_ms is not None and found.baseline_load_ms is not None:
        lines.append(
            f"{found.baseline}: p50 {found.baseline_p50_ms:.2f} ms, load {found.baseline_load_ms:.0f} ms, "
            f"size {size_phrase(found.baseline_size_bytes or 0)}"
        )
    lines += [speed_phrase(found)] if found.ceilings else []
    lines += [f"{whose} spends {operators_phrase(times)}" for whose, times in _told(found) if times]
    pages = pages_phrase(report.machine)
    lines += [pages] if pages else []
    lines.append(
        f"{report.machine.cpu}, {', '.join(report.machine.instruction_set)}; "
        f"{found.rounds} rounds, {found.repeated} repeated"
    )
    outcome = _outcome(lines, report)
    if outcome.exit_code == 0 and found.verdict == "too noisy to tell":
        return Outcome(outcome.lines, outcome.payload, EXIT_INCONCLUSIVE, outcome.checks)
    return outcome


def _told(found: LatencyResult) -> tuple[tuple[str, tuple[OperatorTime, ...]], ...]:
    return ("the artifact", found.operators), (found.baseline, found.baseline_operators)


def _diagnosed(
    bundle: Path, data: str, reference: str, arch: str | None, threads: int, timeout: float, samples: int, skip: bool
) -> Outcome:
    from vlexport.report.preprocess_diagnosis import diagnosis_lines
    from vlexport.stages.diagnose_preprocess import DiagnoseConfig
    from vlexport.stages.diagnose_preprocess import diagnose_preprocess as stage

    config = DiagnoseConfig(bundle, data, reference, arch, threads, timeout or None, samples, skip)
    found = stage(config, reporter=make_reporter())
    said = diagnosis_lines(found)
    outcome = {"named": "fail", "stands": "pass", "cannot tell": "inconclusive"}
    check = Check("preprocessing", outcome[found.verdict], said[0])  # type: ignore[arg-type]
    return Outcome(said, {"diagnosis": plain_json(found)}, found.exit_code, (check,))


def _require_one_baseline(baseline: str, max_regress: float | None, other: str, flag: str) -> None:
    """Refuse a bound without a baseline, and two things to compare with.

    Raises:
        UsageError: VLX0703.
    """
    if max_regress is not None and not baseline:
        raise UsageError(
            "VLX0703", "--max-regress needs a baseline", where="--max-regress", hint="add --baseline BUNDLE"
        )
    if baseline and other:
        raise UsageError(
            "VLX0703", f"--baseline and {flag} were both given", where="--baseline", hint="give one of them"
        )


def _outcome(lines: list[str], report: Report) -> Outcome:
    from vlexport.report.figures import emulation_phrase

    if emulated := emulation_phrase(report):
        lines = [*lines, f"emulated: {emulated}"]
    lines = [*lines, *(f"gate {verdict}" for verdict in report.verdicts), *(f"note: {note}" for note in report.notes)]
    return Outcome(lines, {"report": plain_json(report)}, exit_code(report.verdicts), checks_of(report.verdicts))
