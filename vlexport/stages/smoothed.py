"""smoothed: channels of a component made alike before it is quantized: exact rewrites, steered by calibration.

The model runs over the samples once: ranges of channels, which steer the rewrites, and ranges of what will be rounded
are seen in the same run, and the latter are carried over to what the values are after the rewrites. That is right of
extremes: methods that count values, or average over runs, look at the rewritten model in a second run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.collect import Wanted, asked, together
from vlexport.calibration.keys import model_key, value_keys
from vlexport.calibration.methods import Method
from vlexport.calibration.table import CalibrationTable, ValueEntry
from vlexport.core.cache import Cache
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.progress import Reporter
from vlexport.core.scheme import QuantScheme
from vlexport.ir.program import Program
from vlexport.passes.equalize_ranges import EqualizeRanges, equalized_channels
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.quantization.decide import wanted_values
from vlexport.passes.quantization.even_channels import EvenChannels
from vlexport.passes.smooth_activations import SmoothActivations, smoothed_channels
from vlexport.stages.choices import quantize_options_of, smooth_options_of
from vlexport.stages.component import Optimized


def smooth_component(
    optimized: Optimized,
    scheme: QuantScheme,
    config: BuildConfig,
    *,
    samples: Dataset,
    tried: Sequence[tuple[Tensor, ...]],
    dump: Path | None,
    hooks: Sequence[Hook] = (),
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> tuple[Optimized, CalibrationTable | None]:
    """Make channels alike where rounding to integers gains by it.

    Args:
        optimized: In float.
        scheme: What will be quantized, and how.
        config: Which of the two passes run, with which options; what stays in float changes nothing here.
        samples: Calibration samples: ranges of channels are measured on all of them.
        tried: Some of them with batch dim, one tensor per input each: factors are chosen on these.
        dump: Folder for the graph's text after every pass.
        hooks: Watchers.
        cache: Where the ranges may be found.
        reporter: Shows progress.

    Returns:
        The component, and the ranges of what will be rounded; None where they have to be measured on the component as
        it is now, or a table is given.

    Raises:
        DataError: VLX0213, VLX0214.
        GateError: VLX0401.
    """
    program, options = optimized.program, quantize_options_of(config)
    asking = [smoothed_channels] * options.smooth + [equalized_channels] * options.equalize
    channels = together(*(each(program) for each in asking))
    if not scheme.on_grids or not any(channels(node) for node in program.calls()):
        return optimized, None
    once = options.calibration_method() == Method() and not options.table
    table = calibrate(
        program, samples, together(channels, *([wanted_values(program, scheme)] if once else [])), Method(),
        at_least=options.min_samples, cache=cache, reporter=reporter,
    )  # fmt: skip
    ranges: Mapping[str, ValueEntry] = table.by_value()
    gate = NumericGate(program, optimized.probes, sighted=True) if optimized.probes is not None else None
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    passes: list[EvenChannels] = []
    if options.smooth:
        passes.append(SmoothActivations(smooth_options_of(config), scheme=scheme, samples=tried))
    if options.equalize:
        passes.append(EqualizeRanges(scheme=scheme, samples=tried))
    after, records = optimized, optimized.records
    for each in passes:
        each.ranges = ranges
        program, (record,) = run_pipeline(after.program, [each], gate=gate, hooks=watching)
        records, ranges = (*records, record), each.behind
        after = replace(after, program=program, records=records)
    return after, _carried(table, after.program, wanted_values(after.program, scheme), ranges) if once else None


def _carried(
    table: CalibrationTable, program: Program, wanted: Wanted, ranges: Mapping[str, ValueEntry]
) -> CalibrationTable | None:
    """The table of what will be rounded; None where some of it has to be measured."""
    keys = value_keys(program)
    values = [ranges.get(keys[node]) for node in asked(program, wanted)]
    plain = tuple(each.model_copy(update={"channels": None}) for each in values if each is not None)
    if len(plain) < len(values):
        return None
    key = table.key.model_copy(update={"model": model_key(program)})
    return table.model_copy(update={"key": key, "values": plain})
