"""build: a model file becomes a verified, measured bundle. The one place that knows the order.

::

    model.pt ─ frontend ─▶ Program ─ passes ─▶ Program ─ lower ─▶ artifact ─▶ golden check ─▶ bundle
                                                                                 └─▶ validate ─▶ profile ─▶ report
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import vlexport
from vlexport.core.artifact import Array, Artifact, TensorSpec
from vlexport.core.bundle import ARTIFACT_FOLDER
from vlexport.core.bundle_schema import Bundle, Component, CostRecord, Golden, PassRecord, Report
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import DataError
from vlexport.core.progress import Reporter, Silent, StageClock
from vlexport.core.user_metric import open_metrics
from vlexport.frontends.source import Source, open_source
from vlexport.ir.cost import cost
from vlexport.ir.draw import draw
from vlexport.ir.program import Program
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, TimingHook, run_pipeline
from vlexport.passes.probes import make_probes
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
from vlexport.stages.golden import check_component
from vlexport.stages.lowered import lower_and_rewrite
from vlexport.stages.profile import QUICK, Measurable, measure_latency
from vlexport.stages.validate import TIMED, judge_gates, measure_accuracy, require_measured, skipped_phrase
from vlexport.stages.write_bundle import (
    golden_tolerance,
    require_folder,
    require_free,
    staging,
    write_bundle,
    write_golden,
)
from vlexport.targets import open_target
from vlexport.targets.base import Brief

GOLDEN_STEP = 2
"""Golden vectors lie so far above the smallest size: capture traces with batch 2, which would hide a baked-in size."""

RANGE_SAMPLES = 32
"""Calibration samples that ranges are measured on: the largest value of a layer settles within a few images."""


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
    device = profile_of(config)
    brief = Brief(options_of(config, target), device, precision, config.threads)
    passes_of(config, precision)  # what is wrong with them is said before the model is opened
    metrics = open_metrics(config.metric)
    output = output_of(config)
    require_free(output, force=config.force)
    require_folder(config.dump)
    target.require()
    target.require_tools(brief)
    threads = config.threads or available_cores()

    with clock.stage("open the model"):
        source = open_source(config)
    brief = replace(brief, labels=source.labels, preprocess=source.preprocess)
    dataset = open_dataset(config.data, source, skip_bad=config.skip_bad)
    if dataset is not None:
        require_measured([g for g in gates if g.metric not in TIMED], dataset, referenced=True)
    calibration_data = open_dataset(config.calib, source, skip_bad=config.skip_bad)
    calibration = _calibration(calibration_data, source)

    timing = TimingHook()
    with clock.stage("passes"):
        probes = make_probes(source.program, calibration=calibration, seed=config.seed)
        gate = NumericGate(source.program, probes) if config.numeric_gate else None
        samples = [*(probe.values for probe in probes), *_range_samples(calibration_data, source)]
        passes = passes_of(config, precision, samples=samples)
        hooks: list[Hook] = [timing, *([DumpHook(Path(config.dump))] if config.dump else [])]
        program, records = run_pipeline(
            source.program, [*passes, *target.program_passes(brief)], gate=gate, hooks=hooks
        )

    with staging(output) as folder:
        with clock.stage(f"lower to {target.id}"):
            artifact, lowered_records = lower_and_rewrite(
                target, program, folder / ARTIFACT_FOLDER, brief,
                probes=probes if config.numeric_gate else None, hooks=[timing],
                dump=Path(config.dump) / "lowered" if config.dump else None,
            )  # fmt: skip
        goldens = _write_goldens(folder, source, config.seed, golden_tolerance(precision))
        component = _component(source, program, (*records, *lowered_records), artifact, goldens)
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
                    compatibility=target.compatibility(brief),
                    files={},
                ),
                config.recipe(),
            )
            report = new_report(bundle, notes=(*source.notes, *_blind(gate, source)))
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


def golden_inputs(program: Program, seed: int) -> dict[str, Array]:
    """Seeded inputs with every dynamic dim two above its smallest size, or at its largest."""
    dims = program.signature.dims
    sizes = {n: r.min + GOLDEN_STEP if r.max is None else min(r.min + GOLDEN_STEP, r.max) for n, r in dims.items()}
    return _drawn(program, seed + 1, sizes, masks=True)


def _write_goldens(folder: Path, source: Source, seed: int, tolerance: float) -> tuple[Golden, Golden | None]:
    """Golden vectors at the larger sizes, and at the smallest where a dim is dynamic."""
    larger = golden_inputs(source.program, seed)
    golden = write_golden(folder, "main", larger, source.run(larger), tolerance=tolerance)
    dims = source.program.signature.dims
    if not dims:
        return golden, None
    smallest = _drawn(source.program, seed + 1, {name: r.min for name, r in dims.items()})
    outputs = source.run(smallest)
    return golden, write_golden(folder, "main", smallest, outputs, suffix="-smallest", tolerance=tolerance)


def opt_inputs(program: Program, seed: int) -> dict[str, Array]:
    """Seeded inputs with every dynamic dim at its ``opt``: what latency is measured on."""
    return _drawn(program, seed + 2, {name: r.opt for name, r in program.signature.dims.items()})


def _drawn(program: Program, seed: int, sizes: dict[str, int], *, masks: bool = False) -> dict[str, Array]:
    values = draw(program, torch.Generator().manual_seed(seed), sizes, masks=masks)
    return {spec.name: value.numpy() for spec, value in zip(program.signature.inputs, values, strict=True)}


def _calibration(dataset: Dataset | None, source: Source) -> Sequence[torch.Tensor] | None:
    """The first calibration sample, with batch dim."""
    if dataset is None:
        return None
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("VLX0202", "the calibration data is empty", where="--calib")
    return [_batched(first.inputs[spec.name], spec) for spec in source.program.signature.inputs]


def _range_samples(dataset: Dataset | None, source: Source) -> list[tuple[torch.Tensor, ...]]:
    """The first calibration samples, for passes that measure the range of values."""
    specs = source.program.signature.inputs
    first = islice(dataset or (), RANGE_SAMPLES)
    return [tuple(_batched(sample.inputs[spec.name], spec) for spec in specs) for sample in first]


def _batched(row: Array, spec: TensorSpec) -> torch.Tensor:
    """A sample with its batch dim: 1, or repeated to the size that the graph fixes."""
    size = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1
    return torch.from_numpy(np.repeat(row[None], size, axis=0))


def _blind(gate: NumericGate | None, source: Source) -> list[str]:
    """A note for outputs that the gate's probes do not move."""
    names = [source.program.signature.outputs[i].name for i in (gate.blind if gate is not None else ())]
    if not names:
        return []
    return [f"the numeric gate cannot see {', '.join(names)}: it does not change from probe to probe; give --calib"]


def _component(
    source: Source,
    program: Program,
    records: tuple[PassRecord, ...],
    artifact: Artifact,
    goldens: tuple[Golden, Golden | None],
) -> Component:
    return Component(
        artifact=artifact,
        dims=program.signature.dims,
        preprocess=source.preprocess,
        labels=source.labels,
        golden=goldens[0],
        golden_smallest=goldens[1],
        passes=records,
        cost=cost_record(program),
    )


def cost_record(program: Program) -> CostRecord:
    """What one run of a Program costs, as data of a bundle."""
    found = cost(program)
    return CostRecord(macs=found.macs, parameters=found.parameters, size_bytes=found.size_bytes, opaque=found.opaque)
