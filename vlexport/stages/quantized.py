"""quantized: a component in integers: calibrated on all samples, decided, spelled by the target, judged on samples.

The gate judges on calibration samples alone: a seeded draw lies outside of the ranges that they have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vlexport.calibration.calibrate import calibrate, use_table
from vlexport.calibration.table import CalibrationTable, write_table
from vlexport.core.artifact import Array
from vlexport.core.bundle import DECISIONS_FILE, TABLE_FILE
from vlexport.core.bundle_schema import canonical_json, plain_json
from vlexport.core.cache import Cache
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.devices import this_machine
from vlexport.core.errors import CapabilityError, GateError, UsageError
from vlexport.core.progress import Reporter
from vlexport.core.scheme import QuantScheme, choose_scheme
from vlexport.frontends.source import Source
from vlexport.frontends.sources import Sources
from vlexport.ir.program import Program
from vlexport.ir.rounded import holds_half, rounded_twin
from vlexport.passes.base import Pass
from vlexport.passes.cast_floats import CastFloats
from vlexport.passes.fold_casts import FoldCasts
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.probes import Probe
from vlexport.passes.quantization.decide import wanted_values
from vlexport.passes.quantization.decisions import Decisions
from vlexport.passes.quantize import Quantize, QuantizeOptions
from vlexport.passes.smooth_activations import SmoothActivations
from vlexport.stages.choices import precision_passes_of, quantize_options_of
from vlexport.stages.component import Optimized, in_order, legalize_component
from vlexport.stages.layer_figures import layer_figures
from vlexport.stages.smoothed import smooth_component
from vlexport.targets.base import Brief, Target

PROBES = 8
"""Calibration samples that the gate judges on."""
TRIED_EACH = 2
"""One probe of so many is one that factors of channels are tried on."""


@dataclass(frozen=True)
class Quantized:
    """A component in integers.

    Attributes:
        optimized: Its Program, which holds what the target's artifact will compute.
        table: The ranges; None where nothing but weights is rounded.
        decisions: What was made of them.
        program: In float, as it was decided about.
        samples: Calibration samples to measure single layers on.
    """

    optimized: Optimized
    table: CalibrationTable | None
    decisions: Decisions
    program: Program
    samples: Sequence[tuple[Tensor, ...]]

    def write(self, folder: Path) -> None:
        """Put the tables into a bundle, and what the layers lose."""
        if self.table is not None:
            write_table(self.table, folder / TABLE_FILE)
        values = plain_json(self.decisions)
        figures = layer_figures(self.program, self.optimized.program, self.decisions, self.samples)
        if figures:
            values["layers"] = [{**each, **figures["layers"][each["call"]]} for each in values["layers"]]
            values["seen"] = figures["seen"]
        text = canonical_json(values)
        (folder / DECISIONS_FILE).write_text(f"{text}\n", encoding="utf-8", newline="\n")


def require_calibrated(config: BuildConfig, brief: Brief, target: Target) -> QuantScheme:
    """The scheme of a quantized build, before any work is done.

    Raises:
        UsageError: VLX0218 without calibration samples, VLX0703 for options of a pass that does not run.
        CapabilityError: VLX0502 where the target has no scheme for the device.
    """
    options = quantize_options_of(config)
    if config.calib is None and options.kind == "static":
        raise UsageError(
            "VLX0218", f"--precision {brief.precision} rounds every value by the range that it has on real samples, "
            "and there are none", where="--precision",
            hint="add --calib DATA: some hundred unlabelled samples like those of later use",
        )  # fmt: skip
    scheme = choose_scheme(
        target.schemes(), brief.precision, target.quantized_for(brief), this_machine(), kind=options.kind,
        weight=options.weight_type,
    )  # fmt: skip
    idle = next((key for key in config.options if key.partition(".")[0] == SmoothActivations.name), "")
    if idle and not (options.kind == "static" and options.smooth and scheme.on_grids):
        raise UsageError(
            "VLX0703", f"--set {idle}: pass '{SmoothActivations.name}' is not run", where="--set",
            hint="it runs where values are rounded to integers by calibrated ranges, unless quantize.smooth=false",
        )  # fmt: skip
    return scheme


def require_single(sources: Sources) -> None:
    """Refuse a model of several components, whose samples are those of the whole.

    Raises:
        CapabilityError: VLX0502.
    """
    if sources.only is None:
        raise CapabilityError(
            "VLX0502",
            f"a model of several components ({', '.join(sources.components)}) is not quantized in this version",
            where="--precision", hint="build it with --precision fp32, or each component as a model of its own",
        )  # fmt: skip


def quantize_component(
    optimized: Optimized,
    source: Source,
    *,
    target: Target,
    brief: Brief,
    config: BuildConfig,
    samples: Dataset | None,
    probes: Sequence[Mapping[str, Array]],
    dump: Path | None,
    hooks: Sequence[Hook] = (),
    cache: Cache | None = None,
    known: Calibrated | None = None,
    reporter: Reporter | None = None,
) -> Quantized:
    """Quantize a component.

    Args:
        optimized: In float, after the passes that every target of these dims shares.
        source: The model.
        target: Spells it.
        brief: Precision and device.
        config: Options and gate.
        samples: Calibration samples; None where nothing but weights is rounded and none were given.
        probes: Some of them with batch dim, by input name: the gate judges on these, or without any on its own.
        dump: Folder for the graph's text after every pass.
        hooks: Watchers.
        cache: Where the calibration table may be found.
        known: What :func:`calibrated` gives, where it was made already; whatever is kept in float, it is the same.
        reporter: Shows progress.

    Raises:
        DataError: VLX0213, VLX0214; VLX0215 for a table of something else.
        GateError: VLX0401 when too much is lost.
    """
    rows = [in_order(source.program, each) for each in probes]
    ready = known or calibrated(
        optimized, rows, target=target, brief=brief, config=config, samples=samples, dump=dump, hooks=hooks,
        cache=cache, reporter=reporter,
    )  # fmt: skip
    optimized, program = ready.optimized, ready.optimized.program
    found = quantizing(program, ready.table, rows, target=target, brief=brief, config=config)
    gate = None
    if optimized.probes is not None:
        gate = NumericGate(
            program, stacked(source.program, rows) if rows else optimized.probes, sighted=True, together=True
        )
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    after, records = run_pipeline(program, found.passes, gate=gate, hooks=watching)
    notes = (*optimized.notes, *_notes(found.decisions, ready.table, found.scheme, len(records[0].near_misses)))
    reference = rounded_twin(after) if holds_half(after) else after
    made = replace(
        optimized, program=after, records=(*optimized.records, *records), notes=notes, reference=reference
    )  # fmt: skip
    return Quantized(made, ready.table, found.decisions, program, rows)


@dataclass(frozen=True)
class Calibrated:
    """A component ready to be rounded.

    Attributes:
        optimized: In float, its channels made alike.
        table: The ranges; None where nothing but weights is rounded.
    """

    optimized: Optimized
    table: CalibrationTable | None


def calibrated(
    optimized: Optimized,
    rows: Sequence[tuple[Tensor, ...]],
    *,
    target: Target,
    brief: Brief,
    config: BuildConfig,
    samples: Dataset | None,
    dump: Path | None = None,
    hooks: Sequence[Hook] = (),
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> Calibrated:
    """Make channels alike and measure ranges, of what is kept in float too, so that this serves every choice of it.

    Args:
        optimized: In float.
        rows: Some calibration samples, one tensor per input each, with batch dim.
        target: As for :func:`quantize_component`, and so for the others that are not named here.
        brief: Precision and device.
        config: Options.
        samples: All of them.
        dump: Folder for the graph's text.
        hooks: Watchers.
        cache: Where the ranges may be found.
        reporter: Shows progress.

    Raises:
        DataError: VLX0213, VLX0214; VLX0215 for a table of something else.
        GateError: VLX0401.
    """
    scheme, options = require_calibrated(config, brief, target), quantize_options_of(config)
    if options.kind != "static":
        return Calibrated(optimized, None)
    assert samples is not None
    optimized, table = smooth_component(
        optimized, scheme, config, samples=samples, tried=rows[::TRIED_EACH], dump=dump and dump / "smoothed",
        hooks=hooks, cache=cache, reporter=reporter,
    )  # fmt: skip
    if table is not None:
        return Calibrated(optimized, table)
    program, method = optimized.program, options.calibration_method()
    wanted = wanted_values(program, scheme)
    if options.table:
        return Calibrated(optimized, use_table(Path(options.table), program, samples, wanted, method))
    table = calibrate(
        program, samples, wanted, method, at_least=options.min_samples, cache=cache, reporter=reporter
    )  # fmt: skip
    return Calibrated(optimized, table)


@dataclass(frozen=True)
class Quantizing:
    """What turns a component into integers.

    Attributes:
        passes: In order; the first one is quantize.
        scheme: What the target wants.
        decisions: What is rounded, and how.
    """

    passes: tuple[Pass[Program], ...]
    scheme: QuantScheme
    decisions: Decisions


def quantizing(
    program: Program,
    table: CalibrationTable | None,
    rows: Sequence[tuple[Tensor, ...]],
    *,
    target: Target,
    brief: Brief,
    config: BuildConfig,
) -> Quantizing:
    """Decide what is rounded, and say what passes spell it.

    Args:
        program: In float, calibrated.
        table: Its ranges.
        rows: Samples that biases are corrected on, and what is typed to half is measured on.
        target: Spells it.
        brief: Precision and device.
        config: Options.

    Raises:
        CapabilityError: VLX0502 where nothing can be quantized.
        UsageError: VLX0703 for a name of no module.
    """
    scheme, options = require_calibrated(config, brief, target), quantize_options_of(config)
    ranges = table.by_value() if table is not None else {}
    pass_ = Quantize(options, scheme=scheme, ranges=ranges, emit=target.emit_quant, samples=rows)
    decisions = pass_.decisions(program)
    if not decisions.layers:
        raise CapabilityError(
            "VLX0502", f"nothing of the model can be quantized by scheme {scheme.id}", where="--precision",
            hint="build it with --precision fp32",
        )  # fmt: skip
    typing = _typing(config, target.float_precision(brief.precision), options, rows or [program.example])
    ending = target.quantized_passes(scheme, min_sqnr_db=options.min_sqnr_db)
    return Quantizing((pass_, *typing, *ending), scheme, decisions)


def with_fallback(
    quantized: Optimized, typed: Callable[[], Optimized], passes: Sequence[Pass[Program]], *, precision: str
) -> tuple[Optimized, Program | None]:
    """A quantized component, and the same in a precision that is not quantized, to lie beside it.

    Args:
        quantized: The component; it gets a note where the other one cannot be made.
        typed: Makes the other one.
        passes: The target's own, for it.
        precision: Its precision.
    """
    try:
        return quantized, legalize_component(typed(), passes, dump=None).program
    except GateError as error:
        note = f"no {precision} graph lies beside it: {error.message}"
        return replace(quantized, notes=(*quantized.notes, note)), None


def _typing(
    config: BuildConfig, precision: str, options: QuantizeOptions, samples: Sequence[tuple[Tensor, ...]]
) -> list[Pass[Program]]:
    """Passes that type what is not quantized, and let the scales follow.

    A value that is rounded to half lies on the other side of a tie now and then, and is then a whole step off: noise
    like that of quantization, which is held to the same bound.
    """
    key = f"{CastFloats.name}.min_sqnr_db"
    bound = {key: str(options.min_sqnr_db), **config.options}
    found = precision_passes_of(config.model_copy(update={"options": bound}), precision, samples)
    return [*found, FoldCasts()] if found else []


def stacked(program: Program, rows: Sequence[tuple[Tensor, ...]]) -> list[Probe]:
    """All samples as one probe where the batch is dynamic and they are of one size: the ratio is that of all of them.

    A single sample whose true answer lies near 0 has a small ratio however little is lost.
    """
    dynamic = all(spec.shape and isinstance(spec.shape[0], str) for spec in program.signature.inputs)
    if dynamic and len({tuple(value.shape for value in row) for row in rows}) == 1:
        return [Probe("calibration samples", tuple(map(torch.cat, zip(*rows, strict=True))))]
    return [Probe(f"calibration sample {number}", row) for number, row in enumerate(rows)]


def _notes(decisions: Decisions, table: CalibrationTable | None, scheme: QuantScheme, left: int) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for each in decisions.layers:
        counts[each.op] = counts.get(each.op, 0) + 1
    what = ", ".join(f"{count} {op}" for op, count in counts.items())
    edits: tuple[str, ...] = ()
    if table is None:
        dynamic = any(each.dynamic for each in decisions.layers)
        how = "ranges found at each run" if dynamic else "weights alone"
    else:
        how = f"ranges by {table.method.name} of {table.samples} samples"
        edits = tuple(f"range {edit}" for edit in table.edits())
    kind = "in float8" if scheme.precision == "fp8" else "in integers"
    said = f"{kind}: {what} (scheme {scheme.id}, {how})"
    kept = f"; {left} more stay in float" if left else ""
    remark = (scheme.remark,) if scheme.remark else ()
    return (said + kept, *remark, *edits)
