"""quantized: a component in integers: calibrated on all samples, decided, spelled by the target, judged on samples.

The gate judges on calibration samples alone: a seeded draw lies outside of the ranges that they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from vlexport.core.errors import CapabilityError, UsageError
from vlexport.core.progress import Reporter
from vlexport.core.scheme import QuantScheme, choose_scheme
from vlexport.frontends.source import Source
from vlexport.frontends.sources import Sources
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.probes import Probe
from vlexport.passes.quantization.decide import wanted_values
from vlexport.passes.quantization.decisions import Decisions
from vlexport.passes.quantize import Quantize
from vlexport.stages.choices import quantize_options_of
from vlexport.stages.component import Optimized, in_order
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
        table: The ranges.
        decisions: What was made of them.
    """

    optimized: Optimized
    table: CalibrationTable
    decisions: Decisions

    def write(self, folder: Path) -> None:
        """Put both tables into a bundle."""
        write_table(self.table, folder / TABLE_FILE)
        text = canonical_json(plain_json(self.decisions))
        (folder / DECISIONS_FILE).write_text(f"{text}\n", encoding="utf-8", newline="\n")


def require_calibrated(config: BuildConfig, brief: Brief, target: Target) -> QuantScheme:
    """The scheme of a quantized build, before any work is done.

    Raises:
        UsageError: VLX0218 without calibration samples.
        CapabilityError: VLX0502 where the target has no scheme for the device.
    """
    if config.calib is None:
        raise UsageError(
            "VLX0218", f"--precision {brief.precision} rounds every value by the range that it has on real samples, "
            "and there are none", where="--precision",
            hint="add --calib DATA: some hundred unlabelled samples like those of later use",
        )  # fmt: skip
    return choose_scheme(target.schemes(), brief.precision, brief.device, this_machine())


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
    samples: Dataset,
    probes: Sequence[Mapping[str, Array]],
    dump: Path | None,
    hooks: Sequence[Hook] = (),
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> Quantized:
    """Quantize a component.

    Args:
        optimized: In float, after the passes that every target of these dims shares.
        source: The model.
        target: Spells it.
        brief: Precision and device.
        config: Options and gate.
        samples: Calibration samples.
        probes: Some of them with batch dim, by input name: the gate judges on these.
        dump: Folder for the graph's text after every pass.
        hooks: Watchers.
        cache: Where the calibration table may be found.
        reporter: Shows progress.

    Raises:
        DataError: VLX0213, VLX0214; VLX0215 for a table of something else.
        GateError: VLX0401 when too much is lost.
    """
    scheme = require_calibrated(config, brief, target)
    options = quantize_options_of(config)
    inputs = [in_order(source.program, each) for each in probes]
    optimized = smooth_component(
        optimized, scheme, config, samples=samples, tried=inputs[::TRIED_EACH], dump=dump and dump / "smoothed",
        hooks=hooks, cache=cache, reporter=reporter,
    )  # fmt: skip
    program = optimized.program
    wanted = wanted_values(program, scheme, keep=options.keep)
    method = options.calibration_method()
    if options.table:
        table = use_table(Path(options.table), program, samples, wanted, method)
    else:
        table = calibrate(
            program, samples, wanted, method, at_least=options.min_samples, cache=cache, reporter=reporter
        )  # fmt: skip
    pass_ = Quantize(options, scheme=scheme, ranges=table.by_value(), emit=target.emit_quant, samples=inputs)
    decisions = pass_.decisions(program)
    if not decisions.layers:
        raise CapabilityError(
            "VLX0502", f"nothing of the model can be quantized by scheme {scheme.id}", where="--precision",
            hint="build it with --precision fp32",
        )  # fmt: skip
    gate = None
    if optimized.probes is not None:
        judged = _stacked(source, inputs)
        gate = NumericGate(program, judged, sighted=True)
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    after, records = run_pipeline(program, [pass_], gate=gate, hooks=watching)
    notes = (*optimized.notes, *_notes(decisions, table, scheme, len(records[0].near_misses)))
    made = replace(optimized, program=after, records=(*optimized.records, *records), notes=notes, reference=after)
    return Quantized(made, table, decisions)


def _stacked(source: Source, rows: Sequence[tuple[Tensor, ...]]) -> list[Probe]:
    """All samples as one probe where the batch is dynamic and they are of one size: the ratio is that of all of them.

    A single sample whose true answer lies near 0 has a small ratio however little is lost.
    """
    dynamic = all(spec.shape and isinstance(spec.shape[0], str) for spec in source.program.signature.inputs)
    if dynamic and len({tuple(value.shape for value in row) for row in rows}) == 1:
        return [Probe("calibration samples", tuple(map(torch.cat, zip(*rows, strict=True))))]
    return [Probe(f"calibration sample {number}", row) for number, row in enumerate(rows)]


def _notes(decisions: Decisions, table: CalibrationTable, scheme: QuantScheme, left: int) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for each in decisions.layers:
        counts[each.op] = counts.get(each.op, 0) + 1
    what = ", ".join(f"{count} {op}" for op, count in counts.items())
    said = f"in integers: {what} (scheme {scheme.id}, ranges by {table.method.name} of {table.samples} samples)"
    kept = f"; {left} more stay in float" if left else ""
    edits = tuple(f"range {edit}" for edit in table.edits())
    return (said + kept, *edits)
