"""A target's lowered passes, run on what ``lower`` made before it is written, checked as every pass is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlexport.core.artifact import Artifact
from vlexport.core.bundle_schema import PassRecord
from vlexport.core.cache import Cache
from vlexport.core.isolate import reused_children
from vlexport.core.progress import Reporter
from vlexport.ir.program import Program
from vlexport.passes.base import Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.probes import Probe
from vlexport.stages.lowering_cache import Made, lowering_key, made_once
from vlexport.targets.base import Brief, Target


def lower_and_rewrite(
    target: Target,
    program: Program,
    folder: Path,
    brief: Brief,
    *,
    probes: Sequence[Probe] | None,
    passes: Sequence[Pass[Any]] = (),
    hooks: Sequence[Hook] = (),
    dump: Path | None = None,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> tuple[Artifact, tuple[PassRecord, ...]]:
    """Lower a Program, run the target's lowered passes, and write the artifact; or find it in the cache.

    Args:
        target: What lowers.
        program: As the passes left it.
        folder: Where the artifact goes.
        brief: What lowering depends on beside the Program.
        probes: Inputs of the gate, on which another gate has seen outputs vary; None switches it off.
        passes: The target's lowered passes, at its ``lowered_level``.
        hooks: Watchers; they see nothing of an artifact from the cache.
        dump: Folder for the lowered graph's text after every pass; given, the cache is not asked.
        cache: Where the artifact may be found, and is kept; None makes it in any case.
        reporter: Told of what came from the cache.

    Returns:
        The artifact, and one record per lowered pass.

    Raises:
        CapabilityError: VLX0408, VLX0503, when an optimizer or the target fails.
        InternalError: VLX0403 to VLX0407 when a pass breaks its contract.
        GateError: VLX0401, VLX0406 when a pass changes what the model computes.
    """

    def make() -> Made:
        return _made(target, program, folder, brief, probes, passes, hooks, dump)

    key = None
    if cache is not None and dump is None:
        key = lowering_key(
            "lower", target, program, brief, passes=passes, probes=probes
        )  # fmt: skip
    made = made_once(cache, key, folder, make, what="artifact", reporter=reporter)
    return made.artifact, made.records


def _made(
    target: Target,
    program: Program,
    folder: Path,
    brief: Brief,
    probes: Sequence[Probe] | None,
    passes: Sequence[Pass[Any]],
    hooks: Sequence[Hook],
    dump: Path | None,
) -> Made:
    if not passes:
        return Made(artifact=target.lower(program, folder, brief))
    level = target.lowered_level()
    records: list[PassRecord] = []

    def rewrite(lowered: Any) -> Any:
        gate = NumericGate(lowered, probes, level=level, sighted=True) if probes is not None else None
        watching = [*hooks, *([DumpHook(dump, level=level)] if dump is not None else [])]
        after, found = run_pipeline(lowered, passes, gate=gate, hooks=watching, level=level)
        records.extend(found)
        return after

    with reused_children(target.session_entry if probes is not None else ""):
        artifact = target.lower(program, folder, replace(brief, rewrite=rewrite))
    return Made(artifact=artifact, records=tuple(records))
