"""One component of a build: passes and gate, lowering, golden vectors. What one graph needs and nothing of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlexport.core.artifact import Array, DimRange, Frozen
from vlexport.core.bundle_schema import Component, CostRecord, Golden, PassRecord
from vlexport.core.config import BuildConfig
from vlexport.frontends.source import Source
from vlexport.ir.cost import cost
from vlexport.ir.draw import draw
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.probes import Probe, make_probes
from vlexport.stages.lowered import lower_and_rewrite
from vlexport.stages.write_bundle import write_golden
from vlexport.targets.base import Target

GOLDEN_STEP = 2
"""Golden vectors lie so far above the smallest size: capture traces with batch 2, which would hide a baked-in size."""


@dataclass(frozen=True)
class Optimized:
    """A Program after its passes.

    Attributes:
        program: What is lowered.
        records: One per pass.
        probes: Inputs of the gate; None where it is off.
        notes: What the user should know of the gate.
    """

    program: Program
    records: tuple[PassRecord, ...]
    probes: Sequence[Probe] | None
    notes: tuple[str, ...]


def optimize_component(
    source: Source,
    passes: Sequence[Pass[Program]],
    *,
    config: BuildConfig,
    sample: Mapping[str, Array] | None,
    dump: Path | None,
    hooks: Sequence[Hook] = (),
) -> Optimized:
    """Run passes on a source, each checked by the numeric gate unless the config switches it off.

    Args:
        source: The model.
        passes: In order, the target's at the end.
        config: Seed and gate.
        sample: A calibration sample with batch dim, by input name.
        dump: Folder for the graph's text after every pass.
        hooks: Watchers.

    Raises:
        VlexportError: VLX04xx.
    """
    specs = source.program.signature.inputs
    calibration = [torch.from_numpy(sample[spec.name]) for spec in specs] if sample is not None else None
    probes = make_probes(source.program, calibration=calibration, seed=config.seed)
    gate = NumericGate(source.program, probes) if config.numeric_gate else None
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    program, records = run_pipeline(source.program, passes, gate=gate, hooks=watching)
    return Optimized(program, tuple(records), probes if gate is not None else None, _blind(gate, source))


def lower_component(
    target: Target,
    source: Source,
    optimized: Optimized,
    *,
    bundle: Path,
    folder: Path,
    name: str,
    options: Frozen,
    config: BuildConfig,
    dump: Path | None,
    hooks: Sequence[Hook] = (),
) -> Component:
    """Write artifact and golden vectors of a component.

    Args:
        target: What it is lowered for.
        source: Computes the golden outputs.
        optimized: What is lowered.
        bundle: Folder of the bundle.
        folder: The artifact's, in it.
        name: Of the component.
        options: Of the target.
        config: Threads and seed.
        dump: Folder for the lowered graph's text after every pass.
        hooks: Watchers.

    Raises:
        VlexportError: VLX04xx, VLX0503.
    """
    artifact, lowered = lower_and_rewrite(
        target, optimized.program, folder, options=options, threads=config.threads, probes=optimized.probes,
        hooks=hooks, dump=dump,
    )  # fmt: skip
    signature = optimized.program.signature
    golden, smallest = write_goldens(
        bundle, name, dims=signature.dims, run=source.run,
        draw=lambda sizes, masks: drawn(source.program, config.seed + 1, sizes, masks=masks),
    )  # fmt: skip
    return Component(
        artifact=artifact,
        dims=signature.dims,
        preprocess=source.preprocess,
        labels=source.labels,
        golden=golden,
        golden_smallest=smallest,
        passes=(*optimized.records, *lowered),
        cost=cost_record(optimized.program),
    )


def drawn(program: Program, seed: int, sizes: Mapping[str, int], *, masks: bool = False) -> dict[str, Array]:
    """Seeded inputs of a Program by name, with its dynamic dims at ``sizes``; see :func:`vlexport.ir.draw.draw`."""
    values = draw(program, torch.Generator().manual_seed(seed), sizes, masks=masks)
    return {spec.name: value.numpy() for spec, value in zip(program.signature.inputs, values, strict=True)}


def write_goldens(
    bundle: Path,
    name: str,
    *,
    dims: Mapping[str, DimRange],
    draw: Callable[[Mapping[str, int], bool], dict[str, Array]],
    run: Callable[[Mapping[str, Array]], dict[str, Array]],
) -> tuple[Golden, Golden | None]:
    """Golden vectors with every dynamic dim two above its smallest size, or at its largest, and at the smallest.

    Args:
        bundle: Folder of the bundle.
        name: Folder below ``golden/``.
        dims: Dynamic dims; without any, there are no vectors at the smallest size.
        draw: Inputs for sizes of the dims, with random or full masks.
        run: Computes the outputs.
    """
    larger = draw(
        {n: r.min + GOLDEN_STEP if r.max is None else min(r.min + GOLDEN_STEP, r.max) for n, r in dims.items()}, True
    )
    golden = write_golden(bundle, name, larger, run(larger))
    if not dims:
        return golden, None
    smallest = draw({dim: r.min for dim, r in dims.items()}, False)
    return golden, write_golden(bundle, name, smallest, run(smallest), suffix="-smallest")


def cost_record(program: Program) -> CostRecord:
    """What one run of a Program costs, as data of a bundle."""
    found = cost(program)
    return CostRecord(macs=found.macs, parameters=found.parameters, size_bytes=found.size_bytes, opaque=found.opaque)


def _blind(gate: NumericGate | None, source: Source) -> tuple[str, ...]:
    """A note for outputs that the gate's probes do not move."""
    names = [source.program.signature.outputs[i].name for i in (gate.blind if gate is not None else ())]
    if not names:
        return ()
    return (f"the numeric gate cannot see {', '.join(names)}: it does not change from probe to probe; give --calib",)
