"""smoothed: channels of a component made alike before it is quantized: exact rewrites, steered by calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.fx import Node

from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.collect import Want, Wanted
from vlexport.calibration.methods import Method
from vlexport.core.cache import Cache
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.progress import Reporter
from vlexport.core.scheme import QuantScheme
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.equalize_ranges import EqualizeRanges, equalized_channels
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
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
) -> Optimized:
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

    Raises:
        DataError: VLX0213, VLX0214.
        GateError: VLX0401.
    """
    if not scheme.on_grids:
        return optimized
    program, options = optimized.program, quantize_options_of(config)
    wanted = _either(
        smoothed_channels(program) if options.smooth else _nothing,
        equalized_channels(program) if options.equalize else _nothing,
    )
    if not any(wanted(node) for node in program.calls()):
        return optimized
    table = calibrate(
        program, samples, wanted, Method(), at_least=options.min_samples, cache=cache, reporter=reporter
    ).by_value()  # fmt: skip
    passes: list[Pass[Program]] = []
    if options.smooth:
        chosen = smooth_options_of(config)
        passes.append(SmoothActivations(chosen, scheme=scheme, ranges=table, samples=tried))
    if options.equalize:
        passes.append(EqualizeRanges(scheme=scheme, ranges=table, samples=tried))
    gate = NumericGate(program, optimized.probes, sighted=True) if optimized.probes is not None else None
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    after, records = run_pipeline(program, passes, gate=gate, hooks=watching)
    return replace(optimized, program=after, records=(*optimized.records, *records))


def _nothing(node: Node) -> Want | None:
    return None


def _either(first: Wanted, second: Wanted) -> Wanted:
    return lambda node: first(node) or second(node)
