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
from vlexport.core.bundle import ARTIFACT_FOLDER, artifact_folder
from vlexport.core.bundle_schema import Bundle, Component, Report
from vlexport.core.config import BuildConfig
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.progress import Reporter, Silent, StageClock
from vlexport.core.user_metric import open_metrics
from vlexport.frontends.sources import Sources, open_sources
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
from vlexport.stages.component import Optimized, lower_component, optimize_component
from vlexport.stages.golden import check_bundle
from vlexport.stages.profile import QUICK, Measurable, measure_latency
from vlexport.stages.validate import TIMED, judge_gates, measure_accuracy, require_measured, skipped_phrase
from vlexport.stages.whole_model import first_sample, naive_artifact, opt_inputs, whole_goldens
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
        sources = open_sources(config)
    dataset = open_dataset(config.data, sources, skip_bad=config.skip_bad)
    if dataset is not None:
        require_measured([g for g in gates if g.metric not in TIMED], dataset, referenced=True)
    calibration_data = open_dataset(config.calib, sources, skip_bad=config.skip_bad)
    samples = first_sample(calibration_data, sources)

    timing = TimingHook()
    optimized: dict[str, Optimized] = {}
    with clock.stage("passes"):
        for name, source in sources.components.items():
            with sources.named(name):
                optimized[name] = optimize_component(
                    source, [*passes, *target.program_passes()], config=config, sample=samples.get(name),
                    dump=_dump(config, sources, name), hooks=[timing],
                )  # fmt: skip

    with staging(output) as folder:
        components: dict[str, Component] = {}
        with clock.stage(f"lower to {target.id}"):
            for name, source in sources.components.items():
                with sources.named(name):
                    components[name] = lower_component(
                        target, source, optimized[name], bundle=folder, name=name,
                        folder=folder / artifact_folder(sources.components, name), options=options, config=config,
                        dump=_dump(config, sources, name, "lowered"), hooks=[timing],
                    )  # fmt: skip
        golden, golden_smallest = whole_goldens(folder, sources, config.seed)
        bundle = Bundle(
            vlexport=vlexport.__version__,
            state="verified",
            target=target.id,
            precision=precision,
            device_profile=device.id,
            source_hash=sources.source_hash,
            components=components,
            edges=sources.edges,
            golden=golden,
            golden_smallest=golden_smallest,
            tools=tools_of(config, target),
            instruction_set=this_machine().instruction_set,
            compatibility=target.compatibility(options),
            files={},
        )
        artifact = bundle.main.artifact
        with target.open(folder / ARTIFACT_FOLDER, artifact, threads=threads) as session:
            with clock.stage("golden check"):
                check_bundle(target, session, folder, bundle, code="VLX0504", threads=threads)
            untimed = why_untimed(session, gates)
            bundle = write_bundle(folder, bundle, config.recipe())
            found = [note for name, each in optimized.items() for note in sources.said(name, each.notes)]
            report = new_report(bundle, notes=(*sources.notes, *found))
            if dataset is not None:
                with clock.stage("validate"):
                    judged = measure_accuracy(
                        session, dataset, bundle.main, reference=sources.run, reporter=reporter, metrics=metrics,
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
                naive = Measurable("naive", target, Path(scratch), naive_artifact(target, sources, Path(scratch)))
                ours = Measurable("artifact", target, folder / ARTIFACT_FOLDER, artifact)
                inputs = opt_inputs(sources, config.seed)
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


def _dump(config: BuildConfig, sources: Sources, name: str, part: str = "") -> Path | None:
    """Where a component's graph goes after every pass; None without ``--dump``."""
    if not config.dump:
        return None
    return Path(config.dump) / (name if sources.only is None else "") / part
