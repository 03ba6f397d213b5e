"""One component of a build: passes and gate, lowering, golden vectors. What one graph needs and nothing of the rest.

Passes come in two parts: those that every target shares, run once, and each target's own behind narrowing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlexport.core.account import Account
from vlexport.core.artifact import Array, DimRange
from vlexport.core.bundle_schema import Component, CostRecord, Golden, PassRecord
from vlexport.core.cache import Cache
from vlexport.core.config import BuildConfig
from vlexport.core.errors import GateError
from vlexport.core.numerics import relative_error
from vlexport.core.progress import Reporter
from vlexport.frontends.source import Source
from vlexport.ir.cost import cost
from vlexport.ir.draw import draw
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.passes import CLEAN_UP
from vlexport.passes.base import Pass
from vlexport.passes.gate import FLOAT32_BOUND, NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.probes import Probe, as_array, make_probes
from vlexport.passes.selection import KERNELS, Tipped, tipped_choices
from vlexport.stages.account import Refusals, accounts, fusion_accounts
from vlexport.stages.choices import HALF_PRECISIONS, precision_passes_of
from vlexport.stages.lowered import lower_and_rewrite
from vlexport.stages.operators import operators_of
from vlexport.stages.write_bundle import TIPPING_SLACK, golden_tolerance, write_golden
from vlexport.targets.base import Brief, Target

GOLDEN_STEP = 2
"""Golden vectors lie so far above the smallest size: capture traces with batch 2, which would hide a baked-in size."""


@dataclass(frozen=True)
class Optimized:
    """A Program after its passes.

    Attributes:
        program: What they made of it.
        records: One per pass.
        probes: Inputs of the gate; None where it is off.
        notes: What the user should know of the gate.
        account: What became of the model's own modules in the passes that no target owns.
        reference: What the artifact is held to where a pass of the stage tokens changed what is computed; None means
            the source. How far it lies from the source is that pass's statistic, and for the user's gates to judge.
    """

    program: Program
    records: tuple[PassRecord, ...]
    probes: Sequence[Probe] | None
    notes: tuple[str, ...]
    account: tuple[Account, ...] = ()
    reference: Program | None = None

    def held_to(self, source: Source) -> Source:
        """The Source whose outputs the artifact owes."""
        return source if self.reference is None else replace(source, program=self.reference)


def optimize_component(
    source: Source,
    passes: Sequence[Pass[Program]],
    *,
    config: BuildConfig,
    samples: Sequence[Mapping[str, Array]],
    dump: Path | None,
    hooks: Sequence[Hook] = (),
) -> Optimized:
    """Run passes on a source, each checked by the numeric gate unless the config switches it off.

    Args:
        source: The model.
        passes: In order; no target's own.
        config: Seed and gate.
        samples: Calibration samples with batch dim, by input name; the first of them is a probe.
        dump: Folder for the graph's text after every pass.
        hooks: Watchers.

    Raises:
        VlexportError: VLX04xx.
    """
    probes = _probes(source.program, samples, config.seed)
    gate = NumericGate(source.program, probes) if config.numeric_gate else None
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    refusals = Refusals()
    program, records = run_pipeline(source.program, passes, gate=gate, hooks=watching, listener=refusals)
    program, further = run_pipeline(program, clean_up(passes), gate=gate, hooks=watching)
    records = (*records, *(record for record in further if record.changes))
    account = accounts(source.program, program, refusals)
    notes, reference = (*_unreal(gate, source), *_blind(gate, source)), None
    changed = [r.name for r in records if r.stage == "tokens" and r.effect == "approximate" and r.changes]
    if changed:
        reference = program
        notes = (*notes, f"golden vectors are those of the program behind {' and '.join(changed)}, not the source's")
    return Optimized(program, tuple(records), probes if gate is not None else None, notes, account, reference)


def clean_up(passes: Sequence[Pass[Program]]) -> list[Pass[Program]]:
    """Those of the passes that run once more behind all of them; recorded where they change something."""
    return [each for name in CLEAN_UP for each in passes if each.name == name]


def specialize_component(
    shared: Optimized,
    source: Source,
    *,
    dims: Mapping[str, DimRange],
    again: Sequence[Pass[Program]],
    precision: str,
    config: BuildConfig,
    samples: Sequence[Mapping[str, Array]],
    dump: Path | None,
    hooks: Sequence[Hook] = (),
) -> Optimized:
    """Go on from what all targets share to what those of the same dims and precision share: narrow, then type.

    Args:
        shared: The result of :func:`optimize_component`.
        source: The model, narrowed.
        dims: Dims to narrow; sizes that become constants are worth the passes in ``again``.
        again: Passes to repeat after narrowing; recorded where they change something.
        config: Seed and gate.
        precision: What the target wants the Program typed to.
        samples: Calibration samples with batch dim that fit the narrowed dims, by input name; ranges are measured on
            them and on the probes.
        dump: Folder for the graph's text after every pass.
        hooks: Watchers.

    Raises:
        VlexportError: VLX04xx.
    """
    program, probes, reference = shared.program, shared.probes, shared.reference
    if dims:
        program = narrowed(program, dims)
        reference = program if reference is not None else None
        if probes is not None:
            probes = _probes(source.program, samples, config.seed)
            require_same(program, shared.program, probes, what=f"narrowing {', '.join(dims)}")
    typed: Sequence[Pass[Program]] = ()
    if precision in HALF_PRECISIONS:
        seen = [p.values for p in probes or _probes(source.program, samples, config.seed)]
        seen += [in_order(source.program, sample) for sample in samples[1:]]  # the first one is a probe
        typed = precision_passes_of(config, precision, seen)
    wanted = [*(again if dims else ()), *typed]
    program, records = _gone_on(program, wanted, probes, dump, hooks)
    told = [r for r, each in zip(records, wanted, strict=True) if r.changes or each not in again]
    records = (*shared.records, *told)
    return replace(shared, program=program, records=records, probes=probes, reference=reference)


def legalize_component(
    optimized: Optimized, passes: Sequence[Pass[Program]], *, dump: Path | None, hooks: Sequence[Hook] = ()
) -> Optimized:
    """Run a target's own passes on what targets of the same dims and precision share.

    Raises:
        VlexportError: VLX04xx.
    """
    program, records = _gone_on(optimized.program, passes, optimized.probes, dump, hooks)
    return replace(optimized, program=program, records=(*optimized.records, *records))


def _gone_on(
    program: Program,
    passes: Sequence[Pass[Program]],
    probes: Sequence[Probe] | None,
    dump: Path | None,
    hooks: Sequence[Hook],
) -> tuple[Program, Sequence[PassRecord]]:
    """Further passes, judged from here on."""
    if not passes:
        return program, ()
    gate = NumericGate(program, probes, sighted=True) if probes is not None else None
    watching = [*hooks, *([DumpHook(dump)] if dump is not None else [])]
    return run_pipeline(program, passes, gate=gate, hooks=watching)


def require_same(found: Program, wanted: Program, probes: Sequence[Probe], *, what: str) -> None:
    """Refuse a Program that computes something else than another.

    Raises:
        GateError: VLX0401.
    """
    for probe in probes:
        pairs = zip(found.run(*probe.values), wanted.run(*probe.values), strict=True)
        worst = max((relative_error(as_array(a), as_array(b)) for a, b in pairs), default=0.0)
        if not worst <= FLOAT32_BOUND:
            raise GateError(
                "VLX0401", f"{what} changed what the model computes: {worst:.1e} on the {probe.name}",
                where="--dynamic", hint="please report this",
            )  # fmt: skip


def lower_component(
    target: Target,
    source: Source,
    optimized: Optimized,
    brief: Brief,
    *,
    bundle: Path,
    folder: Path,
    name: str,
    seed: int,
    passes: Sequence[Pass[Any]],
    dump: Path | None,
    hooks: Sequence[Hook] = (),
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> Component:
    """Write artifact and golden vectors of a component.

    Args:
        target: What it is lowered for.
        source: Computes the golden outputs.
        optimized: What is lowered.
        brief: What lowering depends on beside the Program.
        bundle: Folder of the bundle.
        folder: The artifact's, in it.
        name: Of the component.
        seed: Of the golden vectors.
        passes: The target's lowered passes.
        dump: Folder for the lowered graph's text after every pass.
        hooks: Watchers.
        cache: Where the artifact may be found.
        reporter: Told of what came from there.

    Raises:
        VlexportError: VLX04xx, VLX0503.
    """
    brief = replace(brief, name=name, labels=source.labels, preprocess=source.preprocess)
    probes = _lowered_probes(optimized) if passes else optimized.probes
    artifact, lowered = lower_and_rewrite(
        target, optimized.program, folder, brief, probes=probes, passes=passes, hooks=hooks, dump=dump, cache=cache,
        reporter=reporter,
    )  # fmt: skip
    signature, owed = optimized.program.signature, optimized.held_to(source)
    bound = golden_tolerance(target.computes_in(brief))
    golden, smallest = write_goldens(
        bundle, name, tolerance=bound, dims=signature.dims, run=owed.run,
        draw=lambda sizes, masks: drawn(owed.program, seed + 1, sizes, masks=masks),
        tipped=lambda inputs: tipped_choices(
            owed.program, in_order(owed.program, inputs), in_integers=bound / TIPPING_SLACK
        ),
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
        account=(*optimized.account, *fusion_accounts(lowered)),
        operators=operators_of(source.program, optimized.program),
    )


def _lowered_probes(optimized: Optimized) -> Sequence[Probe] | None:
    """The probes for what is lowered, at the batch that it has by now (tokens may be frozen for one of their own).

    Rows are undecided where other kernels tip over what the Program chooses.
    """
    if optimized.probes is None:
        return None
    program = optimized.program

    def fitted(probe: Probe) -> Probe:
        batched = [_of_batch(v, s.shape) for v, s in zip(probe.values, program.signature.inputs, strict=True)]
        undecided = probe.undecided if all(a is b for a, b in zip(batched, probe.values, strict=True)) else ()
        tipped = tipped_choices(program, batched, nudge=KERNELS, beyond=FLOAT32_BOUND / 2)
        return replace(probe, values=tuple(batched), undecided=tuple(sorted({*undecided, *tipped.rows})))

    return [fitted(each) for each in optimized.probes]


def _of_batch(value: torch.Tensor, shape: Sequence[int | str]) -> torch.Tensor:
    """A value with as many rows as a fixed dim 0 asks for: the first ones, or all of them again and again."""
    if not shape or not isinstance(shape[0], int) or shape[0] == value.shape[0]:
        return value
    return value[torch.arange(shape[0]) % value.shape[0]]


def _probes(program: Program, samples: Sequence[Mapping[str, Array]], seed: int) -> list[Probe]:
    calibration = in_order(program, samples[0]) if samples else None
    return make_probes(program, calibration=calibration, seed=seed)


def in_order(program: Program, sample: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
    """A sample's arrays as tensors, in the order of the Program's inputs."""
    return tuple(torch.from_numpy(sample[spec.name]) for spec in program.signature.inputs)


def drawn(program: Program, seed: int, sizes: Mapping[str, int], *, masks: bool = False) -> dict[str, Array]:
    """Seeded inputs of a Program by name, with its dynamic dims at ``sizes``; see :func:`vlexport.ir.draw.draw`."""
    values = draw(program, torch.Generator().manual_seed(seed), sizes, masks=masks)
    return {spec.name: value.numpy() for spec, value in zip(program.signature.inputs, values, strict=True)}


def write_goldens(
    bundle: Path,
    name: str,
    *,
    tolerance: float,
    dims: Mapping[str, DimRange],
    draw: Callable[[Mapping[str, int], bool], dict[str, Array]],
    run: Callable[[Mapping[str, Array]], dict[str, Array]],
    tipped: Callable[[Mapping[str, Array]], Tipped] = lambda _: Tipped(),
) -> tuple[Golden, Golden | None]:
    """Golden vectors with every dynamic dim two above its smallest size, or at its largest, and at the smallest.

    Args:
        bundle: Folder of the bundle.
        name: Folder below ``golden/``.
        tolerance: What an artifact may differ by, as ``max|a−b| / max|b|``.
        dims: Dynamic dims; without any, there are no vectors at the smallest size.
        draw: Inputs for sizes of the dims, with random or full masks.
        run: Computes the outputs.
        tipped: Which rows choose otherwise, or move far, once the last digits of the inputs move.
    """

    def written(inputs: dict[str, Array], suffix: str = "") -> Golden:
        hangs = tipped(inputs)
        return write_golden(
            bundle, name, inputs, run(inputs), suffix=suffix, tolerance=tolerance, tipping=hangs.rows,
            moved=hangs.moved,
        )  # fmt: skip

    larger = draw(
        {n: r.min + GOLDEN_STEP if r.max is None else min(r.min + GOLDEN_STEP, r.max) for n, r in dims.items()}, True
    )
    golden = written(larger)
    if not dims:
        return golden, None
    return golden, written(draw({dim: r.min for dim, r in dims.items()}, False), "-smallest")


def cost_record(program: Program) -> CostRecord:
    """What one run of a Program costs, as data of a bundle."""
    found = cost(program)
    return CostRecord(macs=found.macs, parameters=found.parameters, size_bytes=found.size_bytes, opaque=found.opaque)


def _unreal(gate: NumericGate | None, source: Source) -> tuple[str, ...]:
    """A note for outputs that the model itself makes NaN or infinite, with the stored tensors that may be the cause."""
    shares = gate.unreal if gate is not None else {}
    if not shares:
        return ()
    names = [source.program.signature.outputs[i].name for i in shares]
    said = ", ".join(f"{name} in {share:.0%}" for name, share in zip(names, shares.values(), strict=True))
    broken = [name for name, each in source.program.used_tensors().items() if each.isnan().any()]
    cause = f"; NaN is stored in {', '.join(broken[:3])}" if broken else ""
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return (f"the model itself, before any pass, gives NaN or infinity on the probes of the gate: {said}{cause}{more}",)


def _blind(gate: NumericGate | None, source: Source) -> tuple[str, ...]:
    """A note for outputs that the gate's probes do not move."""
    names = [source.program.signature.outputs[i].name for i in (gate.blind if gate is not None else ())]
    if not names:
        return ()
    return (f"the numeric gate cannot see {', '.join(names)}: it does not change from probe to probe; give --calib",)
