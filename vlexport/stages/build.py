"""build: a model file becomes a verified, measured bundle. The one place that knows the order.

::

    model.pt ─ frontend ─▶ Program ─ passes ─▶ Program ─ lower ─▶ artifact ─▶ golden check ─▶ bundle
                                                                                 └─▶ validate ─▶ profile ─▶ report

:func:`prepare` is what several targets share (``stages/build_each``); :func:`build_prepared` is one target's own part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import vlexport
from vlexport.core.artifact import Array
from vlexport.core.bundle import ARTIFACT_FOLDER
from vlexport.core.bundle_schema import Bundle, Component, Report
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import DataError, UsageError
from vlexport.core.progress import Reporter, Silent, StageClock
from vlexport.core.user_metric import UserMetric, open_metrics
from vlexport.frontends.source import Source, open_source
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import TimingHook
from vlexport.report.write import new_report, write_report
from vlexport.stages.choices import open_dataset, output_of, passes_of, tools_of, why_untimed
from vlexport.stages.component import Optimized, lower_component, opt_inputs, optimize_component, specialize_component
from vlexport.stages.dims import dims_of
from vlexport.stages.golden import check_component
from vlexport.stages.order import Order, configs_of, order_of
from vlexport.stages.profile import QUICK, Measurable, measure_latency
from vlexport.stages.validate import TIMED, judge_gates, measure_accuracy, require_measured, skipped_phrase
from vlexport.stages.write_bundle import require_folder, require_free, staging, write_bundle


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


@dataclass(frozen=True)
class Prepared:
    """What all targets share.

    Attributes:
        source: The model.
        optimized: After the passes that no target owns.
        passes: Those passes.
        dataset: Evaluation samples.
        calibration: Calibration samples.
        sample: The first of them, without batch dim.
        metrics: The user's own.
        seconds: Stage → seconds spent so far.
    """

    source: Source
    optimized: Optimized
    passes: tuple[Pass[Program], ...]
    dataset: Dataset | None
    calibration: Dataset | None
    sample: dict[str, Array] | None
    metrics: tuple[UserMetric, ...]
    seconds: dict[str, float]


def build(config: BuildConfig, *, reporter: Reporter | None = None) -> BuildResult:
    """Build a bundle for one target.

    Args:
        config: What to build.
        reporter: Where progress goes; silent by default.

    Raises:
        VlexportError: With the code and exit code of whatever is wrong; then nothing is left behind.
    """
    reporter = reporter or Silent()
    configs = configs_of(config)
    if len(configs) != 1:
        raise UsageError(
            "VLX0701", f"build makes one bundle, '{config.target}' names {len(configs)} targets", where="--target",
            hint="vlexport.build_each makes one bundle a target",
        )  # fmt: skip
    order = order_of(next(iter(configs.values())))
    output = output_of(config)
    require_free(output, force=config.force)
    prepared = prepare(config, (order,), reporter)
    with staging(output) as folder:
        result = build_prepared(order, prepared, folder, reporter)
    return replace(result, output=output)


def prepare(config: BuildConfig, orders: Sequence[Order], reporter: Reporter) -> Prepared:
    """Open model and data, and run the passes that no target owns.

    Raises:
        VlexportError: With the code and exit code of whatever is wrong.
    """
    clock = StageClock(reporter)
    passes = tuple(passes_of(config))
    metrics = open_metrics(config.metric)
    require_folder(config.dump)
    with clock.stage("open the model"):
        source = open_source(config)
    dataset = open_dataset(config.data, source, skip_bad=config.skip_bad)
    if dataset is not None:
        for order in orders:
            require_measured([g for g in order.gates if g.metric not in TIMED], dataset, referenced=True)
    calibration = open_dataset(config.calib, source, skip_bad=config.skip_bad)
    sample = _first_sample(calibration)
    timing = TimingHook()
    with clock.stage("passes"):
        optimized = optimize_component(
            source, passes, config=config, sample=sample, dump=_dump(config), hooks=[timing]
        )  # fmt: skip
    seconds = {**clock.seconds, **_pass_seconds(timing)}
    return Prepared(source, optimized, passes, dataset, calibration, sample, metrics, seconds)


def build_prepared(order: Order, prepared: Prepared, folder: Path, reporter: Reporter) -> BuildResult:
    """One target's bundle, written into ``folder``.

    Raises:
        VlexportError: With the code and exit code of whatever is wrong.
    """
    clock, timing = StageClock(reporter), TimingHook()
    config, target, source = order.config, order.target, prepared.source
    brief = replace(order.brief, labels=source.labels, preprocess=source.preprocess)
    dims = dims_of(config, target, source.program.signature)
    dump = _dump(config, target.id)
    with clock.stage(f"passes for {target.id}"):
        optimized = specialize_component(
            prepared.optimized, target.program_passes(brief), dims=dims,
            again=[p for p in prepared.passes if p.stage == "normalize"], config=config, sample=prepared.sample,
            dump=dump, hooks=[timing],
        )  # fmt: skip
    with clock.stage(f"lower to {target.id}"):
        component = lower_component(
            target, source, optimized, brief, bundle=folder, folder=folder / ARTIFACT_FOLDER, seed=config.seed,
            dump=dump / "lowered" if dump else None, hooks=[timing],
        )  # fmt: skip
    bundle, report = _measured(order, prepared, optimized, component, folder, clock)
    if prepared.calibration is not None and prepared.calibration.skipped:
        report = _with_notes(report, skipped_phrase(prepared.calibration, "calibration samples"))
    report = judge_gates(report, order.gates)
    seconds = {**prepared.seconds, **clock.seconds}
    for name, spent in _pass_seconds(timing).items():
        seconds[name] = seconds.get(name, 0.0) + spent
    report = report.model_copy(update={"stage_seconds": {k: round(v, 2) for k, v in seconds.items()}})
    write_report(folder, bundle, report)
    reporter.note(f"precision {order.brief.precision}: {order.reason}")
    return BuildResult(folder, bundle, report, seconds)


def _measured(
    order: Order, prepared: Prepared, optimized: Optimized, component: Component, folder: Path, clock: StageClock
) -> tuple[Bundle, Report]:
    """Write the bundle, and measure what can be measured here."""
    notes = (*prepared.source.notes, *optimized.notes, *_narrowing(prepared, optimized))
    if not order.probe.available:
        bundle = _written(order, prepared, component, folder, state="built")
        why = f"{order.target.id} does not run here, so nothing was run or measured: {order.probe.reason}"
        return bundle, new_report(bundle, notes=(why, *notes))
    config, target = order.config, order.target
    threads = config.threads or available_cores()
    with target.open(folder / ARTIFACT_FOLDER, component.artifact, threads=threads) as session:
        with clock.stage("golden check"):
            check_component(session, folder, component, code="VLX0504")
        untimed = why_untimed(session, order.gates)
        bundle = _written(order, prepared, component, folder, state="built" if untimed else "verified")
        report = new_report(bundle, notes=notes)
        if prepared.dataset is not None:
            with clock.stage("validate"):
                judged = measure_accuracy(
                    session, prepared.dataset, bundle.main, reference=prepared.source.run, reporter=clock.reporter,
                    metrics=prepared.metrics,
                    calibrated_on=frozenset(sample.content_hash() for sample in prepared.calibration or ()),
                )  # fmt: skip
            more = judged.pop("notes")
            report = _with_notes(report.model_copy(update={**judged, "reference": "source program"}), *more)
    if not config.profile:
        return bundle, report
    if untimed:
        return bundle, _with_notes(report, untimed)
    if not order.brief.device.is_this(this_machine()):
        return bundle, _with_notes(report, f"latency was not measured: this machine is no {order.brief.device.id}")
    with clock.stage("profile"), tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        naive = Measurable("naive", target, Path(scratch), target.lower_naive(optimized.source, Path(scratch)))
        ours = Measurable("artifact", target, folder / ARTIFACT_FOLDER, component.artifact)
        inputs = opt_inputs(optimized.source, config.seed)
        latency = measure_latency(ours, inputs, baseline=naive, plan=QUICK, threads=threads, reporter=clock.reporter)
    return bundle, report.model_copy(update={"latency": latency})


def _written(
    order: Order, prepared: Prepared, component: Component, folder: Path, *, state: Literal["built", "verified"]
) -> Bundle:
    return write_bundle(
        folder,
        Bundle(
            vlexport=vlexport.__version__,
            state=state,
            target=order.target.id,
            precision=order.brief.precision,
            device_profile=order.brief.device.id,
            source_hash=prepared.source.source_hash,
            components={"main": component},
            tools=tools_of(order.config, order.target),
            instruction_set=this_machine().instruction_set,
            compatibility=order.target.compatibility(order.brief),
            files={},
        ),
        order.config.recipe(),
    )


def _narrowing(prepared: Prepared, optimized: Optimized) -> tuple[str, ...]:
    """A note on dims that take fewer sizes in the artifact than in the model."""
    saved, made = prepared.source.program.signature.dims, optimized.source.signature.dims
    fixed = [name for name in saved if name not in made]
    if not fixed:
        return ()
    sizes = dict(zip(_shapes(prepared.source.program), _shapes(optimized.source), strict=True))
    said = ", ".join(f"{name} is fixed to {sizes[name]}" for name in fixed)
    return (f"{said}; --dynamic {fixed[0]}=MIN:OPT:MAX keeps it dynamic",)


def _shapes(program: Program) -> list[int | str]:
    return [dim for spec in program.signature.inputs for dim in spec.shape]


def _with_notes(report: Report, *notes: str) -> Report:
    return report.model_copy(update={"notes": (*report.notes, *notes)})


def _dump(config: BuildConfig, part: str = "") -> Path | None:
    return Path(config.dump) / part if config.dump else None


def _pass_seconds(timing: TimingHook) -> dict[str, float]:
    return {f"pass {name}": spent for name, spent in timing.seconds.items()}


def _first_sample(dataset: Dataset | None) -> dict[str, Array] | None:
    """The first calibration sample, without batch dim."""
    if dataset is None:
        return None
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("VLX0202", "the calibration data is empty", where="--calib")
    return first.inputs
