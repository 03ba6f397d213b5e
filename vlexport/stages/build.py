"""build: a model file becomes a verified, measured bundle. The one place that knows the order.

::

    model.pt ─ frontend ─▶ Program ─ passes ─▶ Program ─ lower ─▶ artifact ─▶ golden check ─▶ validate ─▶ profile ─▶
    bundle
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import vlexport
from vlexport.core.artifact import Array, Frozen
from vlexport.core.bundle import ARTIFACT_FOLDER
from vlexport.core.bundle_schema import Bundle, Component, CostRecord, PassRecord, Report
from vlexport.core.config import BuildConfig
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import CapabilityError, DataError, UsageError, nearest
from vlexport.core.progress import Reporter, Silent, StageClock
from vlexport.core.samples import Dataset, open_data
from vlexport.core.verdict import Gate, gate_from_text
from vlexport.frontends.source import Source, open_source
from vlexport.ir.cost import cost
from vlexport.ir.draw import draw
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE as PASSES
from vlexport.passes import pass_class
from vlexport.passes.base import Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, TimingHook, run_pipeline
from vlexport.passes.probes import make_probes
from vlexport.report.write import new_report, write_report
from vlexport.stages.golden import check_golden
from vlexport.stages.profile import QUICK, Measurable, measure_latency
from vlexport.stages.validate import TIMED, judge_gates, measure_accuracy, require_measured
from vlexport.stages.write_bundle import require_folder, require_free, staging, write_bundle, write_golden
from vlexport.targets import CATALOGUE as TARGETS
from vlexport.targets import open_target
from vlexport.targets.base import Target


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
    precision, reason = target.choose_precision(None if config.precision == "auto" else config.precision)
    gates = gates_of(config)
    options = _options(config, target)
    passes = _passes(config)
    _device_profile(config)
    output = Path(config.output or f"{Path(config.model).stem}.bundle")
    require_free(output, force=config.force)
    require_folder(config.dump)
    target.require()
    threads = config.threads or available_cores()

    with clock.stage("open the model"):
        source = open_source(config)
    dataset = _dataset(config.data, source)
    if dataset is not None:
        require_measured([g for g in gates if g.metric not in TIMED], dataset, referenced=True)
    calibration = _calibration(config.calib, source)

    timing = TimingHook()
    with clock.stage("passes"):
        probes = make_probes(source.program, calibration=calibration, seed=config.seed)
        gate = NumericGate(source.program, probes) if config.numeric_gate else None
        hooks: list[Hook] = [timing, *([DumpHook(Path(config.dump))] if config.dump else [])]
        program, records = run_pipeline(source.program, [*passes, *target.program_passes()], gate=gate, hooks=hooks)

    with staging(output) as folder:
        with clock.stage(f"lower to {target.id}"):
            artifact = target.lower(program, folder / ARTIFACT_FOLDER, options=options, threads=config.threads)
        inputs = golden_inputs(source.program, config.seed)
        outputs = source.run(inputs)
        golden = write_golden(folder, "main", inputs, outputs)
        with target.open(folder / ARTIFACT_FOLDER, artifact, threads=threads) as session:
            with clock.stage("golden check"):
                check_golden(session, inputs, outputs, tolerance=golden.tolerance, code="VLX0504")
            bundle = write_bundle(
                folder,
                Bundle(
                    vlexport=vlexport.__version__,
                    state="verified",
                    target=target.id,
                    precision=precision,
                    device_profile=config.device_profile,
                    source_hash=source.source_hash,
                    components={"main": _component(source, program, records, artifact, golden)},
                    tools=target.tools(),
                    instruction_set=this_machine().instruction_set,
                    compatibility=target.compatibility(options),
                    files={},
                ),
                config.recipe(),
            )
            report = new_report(bundle, notes=source.notes)
            if dataset is not None:
                with clock.stage("validate"):
                    judged = measure_accuracy(session, dataset, bundle.main, reference=source.run, reporter=reporter)
                notes = (*source.notes, *judged.pop("notes"))
                report = report.model_copy(update={**judged, "notes": notes, "reference": "source program"})
        if config.profile:
            with clock.stage("profile"), tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
                naive = Measurable("naive", target, Path(scratch), target.lower_naive(source.program, Path(scratch)))
                ours = Measurable("artifact", target, folder / ARTIFACT_FOLDER, artifact)
                inputs = opt_inputs(source.program, config.seed)
                latency = measure_latency(ours, inputs, baseline=naive, plan=QUICK, threads=threads, reporter=reporter)
            report = report.model_copy(update={"latency": latency})
        report = judge_gates(report, gates)
        seconds = {**clock.seconds, **{f"pass {name}": spent for name, spent in timing.seconds.items()}}
        report = report.model_copy(update={"stage_seconds": {k: round(v, 2) for k, v in seconds.items()}})
        write_report(folder, bundle, report)
    reporter.note(f"precision {precision}: {reason}")
    return BuildResult(output, bundle, report, seconds)


def gates_of(config: BuildConfig) -> tuple[Gate, ...]:
    """All gates of a config, ``--max-drop`` among them; those that need data are refused without it.

    Raises:
        UsageError: VLX0702, VLX0804.
    """
    texts = [*config.gate, *([f"drop<={config.max_drop:g}"] if config.max_drop is not None else [])]
    gates = tuple(gate_from_text(text) for text in texts)
    for gate in gates:
        needs_data = gate.metric not in (*TIMED, "size_mb")
        if (needs_data and config.data is None) or (gate.metric in TIMED and not config.profile):
            flag = "--data DATA" if needs_data else "--profile"
            raise UsageError(
                "VLX0804",
                f"gate {gate} needs a measurement that this build does not make",
                where="--gate",
                hint=f"add {flag}",
            )
    return gates


def golden_inputs(program: Program, seed: int) -> dict[str, Array]:
    """Seeded inputs with every dynamic dim one above its smallest size, where its range allows."""
    sizes = {name: r.min + 1 if r.max is None or r.max > r.min else r.min for name, r in program.signature.dims.items()}
    return _drawn(program, seed + 1, sizes)


def opt_inputs(program: Program, seed: int) -> dict[str, Array]:
    """Seeded inputs with every dynamic dim at its ``opt``: what latency is measured on."""
    return _drawn(program, seed + 2, {name: r.opt for name, r in program.signature.dims.items()})


def _drawn(program: Program, seed: int, sizes: dict[str, int]) -> dict[str, Array]:
    values = draw(program, torch.Generator().manual_seed(seed), sizes)
    return {spec.name: value.numpy() for spec, value in zip(program.signature.inputs, values, strict=True)}


def _passes(config: BuildConfig) -> list[Pass[Program]]:
    made: list[Pass[Program]] = []
    for name in PASSES:
        kind = pass_class(name)
        made.append(kind(_typed(kind.Options, config.scoped_options(name), name)))
    return made


def _options(config: BuildConfig, target: Target) -> Frozen:
    scopes = [*PASSES, *TARGETS]
    for key in config.options:
        scope = key.partition(".")[0]
        if scope not in scopes:
            raise UsageError(
                "VLX0703",
                f"--set {key}: no pass or target '{scope}'{nearest(scope, scopes)}",
                where="--set",
                hint=f"known: {', '.join(scopes)}",
            )
    return _typed(target.Options, config.scoped_options(target.id), target.id)


def _typed(kind: type[Frozen], values: dict[str, str], scope: str) -> Frozen:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        near = nearest(name, kind.model_fields)
        raise UsageError(
            "VLX0703",
            f"--set {scope}.{name}: {first['msg'].lower()}{near}",
            where="--set",
            hint=f"options of {scope}: {', '.join(kind.model_fields) or 'none'}",
        ) from error


def _device_profile(config: BuildConfig) -> None:
    if config.device_profile != "this":
        raise CapabilityError(
            "VLX0703", f"no device profile '{config.device_profile}' in this version", where="--for", hint="known: this"
        )


def _dataset(data: str | None, source: Source) -> Dataset | None:
    if data is None:
        return None
    return open_data(
        data, inputs=source.program.signature.inputs, preprocess=source.preprocess, labels=source.labels or None
    )


def _calibration(data: str | None, source: Source) -> Sequence[torch.Tensor] | None:
    """The first calibration sample, with batch dim."""
    dataset = _dataset(data, source)
    if dataset is None:
        return None
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("VLX0202", "the calibration data is empty", where="--calib")
    names = [spec.name for spec in source.program.signature.inputs]
    return [torch.from_numpy(first.inputs[name][None]) for name in names]


def _component(
    source: Source, program: Program, records: tuple[PassRecord, ...], artifact: Any, golden: Any
) -> Component:
    found = cost(program)
    return Component(
        artifact=artifact,
        dims=program.signature.dims,
        preprocess=source.preprocess,
        labels=source.labels,
        golden=golden,
        passes=records,
        cost=CostRecord(macs=found.macs, parameters=found.parameters, size_bytes=found.size_bytes, opaque=found.opaque),
    )
