"""The end of a bisection: the artifact against the source Program, and against the Program that was lowered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlexport.core.artifact import Array, Artifact, Session
from vlexport.core.bundle import artifact_folder, check_files
from vlexport.core.bundle_schema import Bundle
from vlexport.core.errors import CapabilityError
from vlexport.core.numerics import relative_error
from vlexport.ir.program import Program
from vlexport.passes.probes import Probe, as_array
from vlexport.stages.blame import outputs_of
from vlexport.stages.order import Order
from vlexport.stages.write_bundle import golden_tolerance
from vlexport.targets.base import Target


@dataclass(frozen=True)
class ArtifactFinding:
    """How an artifact compares with the source.

    Attributes:
        differs: Whether it lies beyond the bound.
        error: ``max|a−b| / max|b|``, the worst over probes and outputs.
        bound: As for golden vectors.
        probe: Where it was worst.
        output: Likewise.
        words: One phrase.
        agrees_with_program: It is what the lowered Program computes: the passes together have moved it.
        cure: An option of opening it with which it agrees, as ``--set`` takes it.
        note: Why it was not compared; empty where it was.
    """

    differs: bool
    error: float = 0.0
    bound: float = 0.0
    probe: str = ""
    output: str = ""
    words: str = ""
    agrees_with_program: bool = False
    cure: str = ""
    note: str = ""


@dataclass(frozen=True)
class _Worst:
    error: float
    probe: str
    output: str


def compare_artifact(
    order: Order, source: Program, program: Program, artifact: Artifact, folder: Path, probes: Sequence[Probe]
) -> ArtifactFinding:
    """Run an artifact on the probes.

    Args:
        order: Target, options, precision.
        source: The Program that it should compute.
        program: The Program that was lowered.
        artifact: In ``folder``.
        folder: Where it lies.
        probes: Inputs; rows that hang on a selection are left to the gate, so probes that have such are left out.

    Raises:
        CapabilityError: VLX0505, VLX0506 when the runtime refuses it.
    """
    target = order.target
    probe = target.probe_for(order.brief)
    if not probe.available:
        return ArtifactFinding(False, note=f"the artifact was made and not run: {probe.reason}")
    names = [[spec.name for spec in specs] for specs in (artifact.inputs, artifact.outputs)]
    if names != [[s.name for s in specs] for specs in (source.signature.inputs, source.signature.outputs)]:
        return ArtifactFinding(False, note="the artifact was not compared: its inputs or outputs are other ones")
    decided = [each for each in probes if not each.undecided]
    if not decided:
        return ArtifactFinding(False, note="the artifact was not compared: every probe hangs on a selection")
    threads = order.config.threads
    bound = golden_tolerance(target.computes_in(order.brief))
    with target.open(folder, artifact, threads=threads) as session:
        worst = _distance(session, source, decided)
        if worst.error <= bound:
            return ArtifactFinding(
                False, worst.error, bound, words=f"artifact ({worst.error:.1e}, bound {bound:.0e})"
            )  # fmt: skip
        drifted = _distance(session, program, decided).error <= bound
    cure = "" if drifted else _cure(target, order, artifact, folder, source, decided, bound)
    said = f"output {worst.output} of the artifact differs from the source by {worst.error:.1e} on the {worst.probe}"
    return ArtifactFinding(True, worst.error, bound, worst.probe, worst.output, said, drifted, cure)


def compare_built(
    order: Order, bundle: tuple[Path, Bundle], name: str, source: Program, program: Program, probes: Sequence[Probe]
) -> ArtifactFinding:
    """The same for the artifact of a bundle.

    Raises:
        CapabilityError: VLX0505, VLX0506.
        GateError: VLX0602 when the bundle was altered.
    """
    folder, found = bundle
    check_files(folder, found)
    component = found.components.get(name)
    if component is None or found.target != order.target.id:
        return ArtifactFinding(False, words="artifact was not compared: it is of another target or model")
    place = folder / artifact_folder(found.components, name)
    return compare_artifact(order, source, program, component.artifact, place, probes)


def _cure(
    target: Target, order: Order, artifact: Artifact, folder: Path, source: Program, probes: Sequence[Probe],
    bound: float,
) -> str:  # fmt: skip
    """The first option of opening the artifact that makes it agree: then the runtime is to blame, not the graph."""
    options = order.brief.options
    for name, values in target.tunables(options).items():
        for value in values:
            changed = target.check_options({**options.model_dump(), name: value})
            try:
                with target.open(folder, target.retuned(artifact, changed), threads=order.config.threads) as session:
                    if _distance(session, source, probes).error <= bound:
                        return f"{target.id}.{name}={value}"
            except CapabilityError:
                continue
    return ""


def _distance(session: Session, program: Program, probes: Sequence[Probe]) -> _Worst:
    """``max|a−b| / max|b|``, the worst over probes and outputs."""
    signature = program.signature
    worst = _Worst(-1.0, "", "")
    for probe, expected in zip(probes, outputs_of(program, probes), strict=True):
        inputs: Mapping[str, Array] = {
            spec.name: as_array(value) for spec, value in zip(signature.inputs, probe.values, strict=True)
        }
        found = session.run(inputs)
        for spec, value in zip(signature.outputs, map(as_array, expected), strict=True):
            same = found[spec.name].dtype == value.dtype
            error = relative_error(found[spec.name], value) if same else math.inf
            if not error <= worst.error:
                worst = _Worst(error, probe.name, spec.name)
    return replace(worst, error=max(worst.error, 0.0))
