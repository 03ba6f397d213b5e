"""make: one target's passes and lowering: artifact and golden vectors of every component, and nothing measured yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlexport.core.artifact import Array
from vlexport.core.bundle import artifact_folder
from vlexport.core.bundle_schema import Component
from vlexport.core.progress import Reporter, StageClock
from vlexport.frontends.sources import Sources
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.pipeline import TimingHook
from vlexport.stages.choices import INTEGER_PRECISIONS, lowered_passes_of
from vlexport.stages.component import Optimized, legalize_component, lower_component
from vlexport.stages.dims import dims_of
from vlexport.stages.order import Order
from vlexport.stages.prepare import Prepared, dump_of, specialized
from vlexport.stages.quantized import PROBES, Calibrated, Quantized, quantize_component, require_single, with_fallback
from vlexport.stages.whole_model import spread_samples


@dataclass(frozen=True)
class Made:
    """What was made, in a folder that is no bundle yet.

    Attributes:
        optimized: Component → its graph behind all passes.
        components: Component → artifact and golden vectors.
        lowered: The target's lowered passes that ran.
        quantized: The single component in integers, where the precision asks for it; its tables are not written.
    """

    optimized: dict[str, Optimized]
    components: dict[str, Component]
    lowered: Sequence[Pass[Any]]
    quantized: Quantized | None


def make(
    order: Order, prepared: Prepared, sources: Sources, folder: Path, clock: StageClock, timing: TimingHook, *,
    known: Calibrated | None = None, beside: bool = True,
) -> Made:  # fmt: skip
    """Run the passes of one target and lower to it.

    Args:
        order: What is asked for.
        prepared: What targets share.
        sources: The model, with the sizes that the target takes.
        folder: Where artifact and golden vectors go.
        clock: Told how long each part took.
        timing: Told how long each pass took.
        known: The single component ready to be rounded, where it was made so already.
        beside: Make the graph, too, that is not quantized and lies beside one that is, where the target has one.

    Raises:
        VlexportError: VLX02xx for the calibration samples, VLX04xx for the passes, VLX05xx for the target.
    """
    config, target, brief = order.config, order.target, order.brief
    optimized: dict[str, Optimized] = {}
    fallbacks: dict[str, Program | None] = {}
    quantized: Quantized | None = None
    with clock.stage(f"passes for {target.id}"):
        for name in sources.components:
            with sources.named(name):
                shared = specialized_for(order, prepared, sources, name, timing)
                dump = dump_of(config, sources, name, target.id)
                if brief.precision in INTEGER_PRECISIONS:
                    quantized = quantize(
                        order, prepared, sources, shared, known=known, timing=timing, dump=dump,
                        reporter=clock.reporter,
                    )  # fmt: skip
                    shared = quantized.optimized
                    if beside and (plain := target.fallback_precision(brief)):
                        other = replace(order, brief=replace(brief, precision=plain))
                        typed = partial(specialized_for, other, prepared, sources, name, timing)
                        passes = target.program_passes(other.brief)
                        shared, fallbacks[name] = with_fallback(shared, typed, passes, precision=plain)
                optimized[name] = legalize_component(
                    shared, target.program_passes(brief), dump=dump and dump / "legalized", hooks=[timing]
                )
    components: dict[str, Component] = {}
    lowered = lowered_passes_of(config, target, brief.options)
    with clock.stage(f"lower to {target.id}"):
        for name, source in sources.components.items():
            with sources.named(name):
                components[name] = lower_component(
                    target, source, optimized[name], replace(brief, fallback=fallbacks.get(name)), bundle=folder,
                    name=name, seed=config.seed, folder=folder / artifact_folder(sources.components, name),
                    passes=lowered, dump=dump_of(config, sources, name, target.id, "lowered"), hooks=[timing],
                    cache=prepared.cache, reporter=clock.reporter,
                )  # fmt: skip
    return Made(optimized, components, lowered, quantized)


def specialized_for(order: Order, prepared: Prepared, sources: Sources, name: str, timing: TimingHook) -> Optimized:
    """A component behind the passes that targets of the same dims and precision share."""
    config = order.config
    dims = dims_of(config, order.target, prepared.sources.signature)
    dump = dump_of(config, sources, name, order.target.id)
    return specialized(prepared, sources, name, dims, order.brief.precision, config, dump, timing)


def calibration_rows(prepared: Prepared, sources: Sources) -> Sequence[dict[str, Array]]:
    """A few calibration samples of the single component, with batch dim; none without any."""
    ((name, _),) = sources.components.items()
    if prepared.calibration is None:
        return ()
    return spread_samples(prepared.calibration, sources, count=PROBES)[name]


def quantize(
    order: Order, prepared: Prepared, sources: Sources, shared: Optimized, *, known: Calibrated | None,
    timing: TimingHook, dump: Path | None = None, reporter: Reporter | None = None,
) -> Quantized:  # fmt: skip
    """The single component in integers.

    Raises:
        CapabilityError: VLX0502 where there are several.
        DataError: VLX0213, VLX0214.
        GateError: VLX0401 when too much is lost.
    """
    require_single(sources)
    (source,) = sources.components.values()
    probes = calibration_rows(prepared, sources)
    return quantize_component(
        shared, source, target=order.target, brief=order.brief, config=order.config, samples=prepared.calibration,
        probes=probes, dump=dump and dump / "quantized", hooks=[timing], cache=prepared.cache, known=known,
        reporter=reporter,
    )  # fmt: skip
