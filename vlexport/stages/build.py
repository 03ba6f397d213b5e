"""build: a model file becomes a verified, measured bundle. The one place that knows the order.

::

    model.pt ─ frontend ─▶ Program ─ passes ─▶ Program ─ lower ─▶ artifact ─▶ golden check ─▶ bundle
                                                                                 └─▶ validate ─▶ profile ─▶ report
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import vlexport
from vlexport.core.artifact import Array
from vlexport.core.bundle import ARTIFACT_FOLDER
from vlexport.core.bundle_schema import Bundle, Report
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import DataError
from vlexport.core.progress import Reporter, Silent, StageClock
from vlexport.core.user_metric import open_metrics
from vlexport.frontends.source import open_source
from vlexport.passes.pipeline import TimingHook
from vlexport.report.write import new_report, write_report
from vlexport.stages.choices import (
    gates_of,
    open_dataset,
    options_of,
    output_of,
    passes_of,
    precision_of,
    profile_of,
    tools_of,
    why_untimed,
)
from vlexport.stages.component import lower_component, opt_inputs, optimize_component
from vlexport.stages.golden import check_component
from vlexport.stages.profile import QUICK, Measurable, measure_latency
from vlexport.stages.validate import TIMED, judge_gates, measure_accuracy, require_measured, skipped_phrase
from vlexport.stages.write_bundle import require_folder, require_free, staging, write_bundle
from vlexport.targets import open_target


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    Attributes:
        output: The bundle's folder.
        bundle: Its ``bundle.json``.
        report: What was measured.
        seconds: Stage → seconds; passes as ``pass NAME`` (their part of the stage ``passes``).
    """

    output: Path
    bundle: Bundle
    report: Report
    seconds: dict[str, float]


def build(config: BuildConfig, *, reporter: Reporter | None = None) -> BuildResult:
    """Build a bundle.

    Args:
        config: What to build.
        reporter: Where progress goes; silent by default.

    Raises:
        VlexportError: With the code and exit code of whatever is wrong; then nothing is left behind.
    """
    reporter = reporter or Silent()
    clock = StageClock(reporter)
    target = open_target(config.target)
    precision, reason = precision_of(config, target)
    gates = gates_of(config)
    options = options_of(config, target)
    passes = passes_of(config)
    device = profile_of(config)
    metrics = open_metrics(config.metric)
    output = output_of(config)
    require_free(output, force=config.force)
    require_folder(config.dump)
    target.require()
    threads = config.threads or available_cores()

    with clock.stage("open the model"):
        source = open_source(config)
    dataset = open_dataset(config.data, source, skip_bad=config.skip_bad)
    if dataset is not None:
        require_measured([g for g in gates if g.metric not in TIMED], dataset, referenced=True)
    calibration_data = open_dataset(config.calib, source, skip_bad=config.skip_bad)
    sample = _first_sample(calibration_data)

    timing = TimingHook()
    dump = Path(config.dump) if config.dump else None
    with clock.stage("passes"):
        optimized = optimize_component(
            source, [*passes, *target.program_passes()], config=config, sample=sample, dump=dump, hooks=[timing]
        )

    with staging(output) as folder:
        with clock.stage(f"lower to {target.id}"):
            component = lower_component(
                target, source, optimized, bundle=folder, folder=folder / ARTIFACT_FOLDER, name="main",
                options=options, config=config, dump=dump / "lowered" if dump else None, hooks=[timing],
            )  # fmt: skip
        artifact = component.artifact
        with target.open(folder / ARTIFACT_FOLDER, artifact, threads=threads) as session:
            with clock.stage("golden check"):
                check_component(session, folder, component, code="VLX0504")
            untimed = why_untimed(session, gates)
            bundle = write_bundle(
                folder,
                Bundle(
                    vlexport=vlexport.__version__,
                    state="verified",
                    target=target.id,
                    precision=precision,
                    device_profile=device.id,
                    source_hash=source.source_hash,
                    components={"main": component},
                    tools=tools_of(config, target),
                    instruction_set=this_machine().instruction_set,
                    compatibility=target.compatibility(options),
                    files={},
                ),
                config.recipe(),
            )
            report = new_report(bundle, notes=(*source.notes, *optimized.notes))
            if dataset is not None:
                with clock.stage("validate"):
                    judged = measure_accuracy(
                        session, dataset, bundle.main, reference=source.run, reporter=reporter, metrics=metrics,
                        calibrated_on=frozenset(sample.content_hash() for sample in calibration_data or ()),
                    )  # fmt: skip
                notes = (*report.notes, *judged.pop("notes"))
                report = report.model_copy(update={**judged, "notes": notes, "reference": "source program"})
        if config.profile and not device.is_this(this_machine()):
            elsewhere = f"latency was not measured: this machine is no {device.id}"
            report = report.model_copy(update={"notes": (*report.notes, elsewhere)})
        elif config.profile and untimed:
            report = report.model_copy(update={"notes": (*report.notes, untimed)})
        elif config.profile:
            with clock.stage("profile"), tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
                naive = Measurable("naive", target, Path(scratch), target.lower_naive(source.program, Path(scratch)))
                ours = Measurable("artifact", target, folder / ARTIFACT_FOLDER, artifact)
                inputs = opt_inputs(source.program, config.seed)
                latency = measure_latency(ours, inputs, baseline=naive, plan=QUICK, threads=threads, reporter=reporter)
            report = report.model_copy(update={"latency": latency})
        if calibration_data is not None and calibration_data.skipped:
            note = skipped_phrase(calibration_data, "calibration samples")
            report = report.model_copy(update={"notes": (*report.notes, note)})
        report = judge_gates(report, gates)
        seconds = {**clock.seconds, **{f"pass {name}": spent for name, spent in timing.seconds.items()}}
        report = report.model_copy(update={"stage_seconds": {k: round(v, 2) for k, v in seconds.items()}})
        write_report(folder, bundle, report)
    reporter.note(f"precision {precision}: {reason}")
    return BuildResult(output, bundle, report, seconds)


def _first_sample(dataset: Dataset | None) -> dict[str, Array] | None:
    """The first calibration sample, without batch dim."""
    if dataset is None:
        return None
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("VLX0202", "the calibration data is empty", where="--calib")
    return first.inputs
