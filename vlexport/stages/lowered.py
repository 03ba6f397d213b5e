"""A target's lowered passes, run on what ``lower`` made before it is written, checked as every pass is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlexport.core.artifact import Artifact
from vlexport.core.bundle_schema import PassRecord
from vlexport.ir.program import Program
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, Hook, run_pipeline
from vlexport.passes.probes import Probe
from vlexport.targets.base import Brief, Target


def lower_and_rewrite(
    target: Target,
    program: Program,
    folder: Path,
    brief: Brief,
    *,
    probes: Sequence[Probe] | None,
    hooks: Sequence[Hook] = (),
    dump: Path | None = None,
) -> tuple[Artifact, tuple[PassRecord, ...]]:
    """Lower a Program, run the target's lowered passes, and write the artifact.

    Args:
        target: Its ``lowered_passes`` are run.
        program: As the passes left it.
        folder: Where the artifact goes.
        brief: What lowering depends on beside the Program.
        probes: Inputs of the gate, on which another gate has seen outputs vary; None switches it off.
        hooks: Watchers.
        dump: Folder for the lowered graph's text after every pass.

    Returns:
        The artifact, and one record per lowered pass.

    Raises:
        CapabilityError: VLX0408, VLX0503, when an optimizer or the target fails.
        InternalError: VLX0403 to VLX0407 when a pass breaks its contract.
        GateError: VLX0401, VLX0406 when a pass changes what the model computes.
    """
    passes = target.lowered_passes(brief.options)
    if not passes:
        return target.lower(program, folder, brief), ()
    level = target.lowered_level()
    records: list[PassRecord] = []

    def rewrite(lowered: Any) -> Any:
        gate = NumericGate(lowered, probes, level=level, sighted=True) if probes is not None else None
        watching = [*hooks, *([DumpHook(dump, level=level)] if dump is not None else [])]
        after, found = run_pipeline(lowered, passes, gate=gate, hooks=watching, level=level)
        records.extend(found)
        return after

    artifact = target.lower(program, folder, replace(brief, rewrite=rewrite))
    return artifact, tuple(records)
