"""build: a model file becomes a verified, measured bundle. The one place that knows the order.

::

    model.pt ─ frontend ─▶ Program ─ passes ─▶ Program ─ lower ─▶ artifact ─▶ golden check ─▶ bundle
                                                                                 └─▶ validate ─▶ profile ─▶ report

What several targets share is made by ``stages/prepare``; :func:`build_prepared` is one target's own part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import vlexport
from vlexport.core.bundle import ARTIFACT_FOLDER
from vlexport.core.bundle_schema import Bundle, Component, Golden, Report
from vlexport.core.config import BuildConfig
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import CapabilityError, UsageError
from vlexport.core.progress import Reporter, Silent, StageClock
from vlexport.frontends.sources import Sources
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import TimingHook
from vlexport.report.write import new_report, write_report
from vlexport.stages.choices import (
    INTEGER_PRECISIONS,
    settled_of,
    tools_of,
    why_untimed,
)
from vlexport.stages.dims import dims_of
from vlexport.stages.golden import check_bundle, tipping_note
from vlexport.stages.make import make
from vlexport.stages.naive import plain_export
from vlexport.stages.order import Order, configs_of, order_of
from vlexport.stages.prepare import Prepared, pass_seconds, prepare
from vlexport.stages.profile import QUICK, Measurable, measure_latency
from vlexport.stages.searches import Chosen, choose
from vlexport.stages.tune import Subject, Tuned, autotune
from vlexport.stages.validate import Run, judge_gates, measure_accuracy, skipped_phrase
from vlexport.stages.whole_model import opt_inputs, whole_goldens
from vlexport.stages.write_bundle import golden_tolerance, output_of, require_free, staging, write_bundle


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    Attributes:
        output: The bundle's folder.
        bundle: Its ``bundle.json``.
        report: What was measured.
        seconds: Stage → seconds; passes as ``pass NAME`` (their part of the stage ``passes``).
        tuned: The search over session options behind it; ``finish`` forgets its trials, once the bundle stands.
        chosen: The searches that decided what the artifact is; likewise.
    """

    output: Path
    bundle: Bundle
    report: Report
    seconds: dict[str, float]
    tuned: Tuned | None = None
    chosen: Chosen | None = None

    def standing(self, output: Path) -> BuildResult:
        """The same, now that the bundle stands at ``output``."""
        if self.tuned is not None:
            self.tuned.finish()
        if self.chosen is not None:
            self.chosen.finish()
        return replace(self, output=output)


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
    with staging(output, force=config.force) as folder:
        result = build_prepared(order, prepared, folder, reporter)
    return result.standing(output)


def build_prepared(order: Order, prepared: Prepared, folder: Path, reporter: Reporter) -> BuildResult:
    """One target's bundle, written into ``folder``.

    Raises:
        VlexportError: With the code and exit code of whatever is wrong.
    """
    clock, timing = StageClock(reporter), TimingHook()
    config, target, brief = order.config, order.target, order.brief
    dims = dims_of(config, target, prepared.sources.signature)
    sources = prepared.sources.narrowed(dims)
    chosen = choose(order, prepared, sources, clock)
    order, prepared = chosen.order, chosen.prepared
    config, brief = order.config, order.brief
    made = make(order, prepared, sources, folder, clock, timing)
    if made.quantized is not None:
        with clock.stage("look at layers"):
            made.quantized.write(folder)
    optimized, components, lowered = made.optimized, made.components, made.lowered
    dataset = prepared.dataset
    tuned: Tuned | None = None
    if order.axes:
        with clock.stage("autotune"):
            ((name, component),) = components.items()
            subject = Subject(
                config=config, target=target, folder=folder, component=component, source_hash=sources.source_hash,
                source=chosen.reference, inputs=opt_inputs(sources, config.seed), gates=order.gates,
                metrics=prepared.metrics, tools=tools_of(config, target, lowered),
                threads=config.threads or available_cores(),
            )  # fmt: skip
            left = chosen.minutes_left()
            tuned = autotune(subject, order.axes, dataset, budget_minutes=left, reporter=reporter)
        components[name], dataset = tuned.component, tuned.dataset
        order = replace(
            order, config=tuned.config, brief=replace(brief, options=settled_of(tuned.config, target, brief.precision))
        )
    elif chosen.confirming is not None:
        dataset = chosen.confirming
    prepared = replace(prepared, dataset=dataset)
    owed = sources.with_sources({name: each.held_to(sources.components[name]) for name, each in optimized.items()})
    goldens = whole_goldens(folder, owed, config.seed, golden_tolerance(target.computes_in(brief)))
    unwritten = _bundle(order, sources, components, lowered, goldens)
    bundle, report = _measured(order, prepared, sources, unwritten, folder, clock, chosen.reference)
    tuning = tuned.tuning if tuned is not None else None
    report = report.model_copy(update={"tuning": tuning, "searches": tuple(chosen.records)})
    notes = [note for name, each in optimized.items() for note in sources.said(name, each.notes)]
    first = (*notes, *_narrowing(prepared.sources, sources, config), *order.notes, *chosen.notes)
    first = (*first, *tipping_note(components))
    report = report.model_copy(update={"notes": (*first, *report.notes, *_facts(sources, components))})
    if prepared.calibration is not None and prepared.calibration.skipped:
        report = _with_notes(report, skipped_phrase(prepared.calibration, "calibration samples"))
    report = judge_gates(report, order.gates)
    seconds = {**prepared.seconds, **clock.seconds}
    for name, spent in pass_seconds(timing).items():
        seconds[name] = seconds.get(name, 0.0) + spent
    report = report.model_copy(update={"stage_seconds": {k: round(v, 2) for k, v in seconds.items()}})
    write_report(folder, bundle, report)
    reporter.note(f"precision of {target.id}: {order.brief.precision}, {order.reason}")
    return BuildResult(folder, bundle, report, seconds, tuned, chosen)


def _measured(
    order: Order,
    prepared: Prepared,
    sources: Sources,
    unwritten: Bundle,
    folder: Path,
    clock: StageClock,
    reference: Run,
) -> tuple[Bundle, Report]:
    """Write the bundle, and measure what can be measured here."""
    config, target = order.config, order.target
    if not order.probe.available:
        bundle = write_bundle(folder, unwritten, config.recipe())
        why = f"{target.id} does not run here, so nothing was run or measured: {order.probe.reason}"
        return bundle, new_report(bundle, notes=(why, *sources.notes))
    threads = config.threads or available_cores()
    artifact = unwritten.main.artifact
    with target.open(folder / ARTIFACT_FOLDER, artifact, threads=threads) as session:
        with clock.stage("golden check"):
            check_bundle(target, session, folder, unwritten, code="VLX0504", threads=threads)
        untimed = why_untimed(session, order.gates)
        state: Literal["built", "verified"] = "built" if untimed else "verified"
        bundle = write_bundle(folder, unwritten.model_copy(update={"state": state}), config.recipe())
        report = new_report(bundle, notes=sources.notes)
        report = report.model_copy(update={"emulator": order.probe.emulator if session.timing == "emulated" else ""})
        if prepared.dataset is not None:
            with clock.stage("validate"):
                judged = measure_accuracy(
                    session, prepared.dataset, bundle.main, reference=reference, reporter=clock.reporter,
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
        ours = Measurable("artifact", target, folder / ARTIFACT_FOLDER, artifact)
        measured = partial(
            measure_latency, ours, opt_inputs(sources, config.seed), plan=QUICK, threads=threads,
            reporter=clock.reporter, operators=True,
        )  # fmt: skip
        try:
            naive = plain_export(target, sources, Path(scratch), cache=prepared.cache, reporter=clock.reporter)
            latency = measured(baseline=naive)
        except CapabilityError as error:  # of the plain export's making: ours has passed its golden check
            latency = measured(baseline=None)
            report = _with_notes(report, f"no ratio: the plain export of this model does not run, {error.message}")
    if order.brief.precision in INTEGER_PRECISIONS and latency.ratio is not None and latency.ratio < 1.0:
        slower = f"{order.brief.precision} is slower here than the plain fp32 export: {latency.ratio:.2f}× its speed"
        report = _with_notes(report, f"{slower}; build with --precision fp32")
    return bundle, report.model_copy(update={"latency": latency})


def _bundle(
    order: Order,
    sources: Sources,
    components: Mapping[str, Component],
    lowered: Sequence[Pass[Any]],
    goldens: tuple[Golden | None, Golden | None],
) -> Bundle:
    return Bundle(
        vlexport=vlexport.__version__,
        state="built",
        target=order.target.id,
        precision=order.brief.precision,
        device_profile=order.brief.device.id,
        source_hash=sources.source_hash,
        components=dict(components),
        edges=sources.edges,
        golden=goldens[0],
        golden_smallest=goldens[1],
        tools=tools_of(order.config, order.target, lowered),
        instruction_set=this_machine().instruction_set,
        compatibility=_compatibility(order, components),
        files={},
    )


def _compatibility(order: Order, components: Mapping[str, Component]) -> dict[str, str]:
    """What a device is checked against; where an artifact's facts say it better than the brief, they do."""
    found = order.target.compatibility(order.brief)
    for each in components.values():
        found |= {key: value for key, value in each.artifact.facts.items() if key in found}
    return found


def _facts(sources: Sources, components: Mapping[str, Component]) -> Iterator[str]:
    """A note on what only lowering found out, of each component."""
    for name, each in components.items():
        told = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in sorted(each.artifact.facts.items()))
        yield from sources.said(name, (told,) if told else ())


def _narrowing(saved: Sources, made: Sources, config: BuildConfig) -> tuple[str, ...]:
    """A note on dims that are dynamic in the model and fixed in the artifact, though nobody asked for it."""
    asked = [text.partition("=")[0] for text in config.dynamic]
    pairs = zip(saved.signature.inputs, made.signature.inputs, strict=True)
    sizes = dict(pair for a, b in pairs for pair in zip(a.shape, b.shape, strict=True))
    fixed = [name for name in saved.signature.dims if name not in made.signature.dims and name not in asked]
    if not fixed:
        return ()
    said = ", ".join(f"{name} is fixed to {sizes[name]}" for name in fixed)
    return (f"{said}; --dynamic {fixed[0]}=MIN:OPT:MAX keeps it dynamic",)


def _with_notes(report: Report, *notes: str) -> Report:
    return report.model_copy(update={"notes": (*report.notes, *notes)})
