"""The runner: passes in an order that is data, checked before and after, with hooks.

After every pass: ``modified`` is true iff the fingerprint (text and weights) changed, the dialect check holds, the
facts the pass claims hold, and the numeric gate agrees.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlexport.core.bundle_schema import Change, ChangeSummary, GateRecord, NearMissRecord, PassRecord
from vlexport.core.errors import InternalError
from vlexport.ir import dialect, provenance
from vlexport.ir.facts import FACTS
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, text
from vlexport.passes.base import STAGES, NearMiss, Pass
from vlexport.passes.gate import NumericGate

GATE_OFF = GateRecord(worst=0.0, proof="off", probes=0)
_MAX_NEAR_MISSES = 50


class Hook(Protocol):
    """Something that watches passes: a timer, a dumper, a progress bar."""

    def before_pass(self, applied: Pass[Program], program: Program) -> None:
        """Called with the Program that the pass will get."""

    def after_pass(self, applied: Pass[Program], program: Program, record: PassRecord) -> None:
        """Called once the pass was accepted."""


class TimingHook:
    """Seconds per pass, gate included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = 0.0

    def before_pass(self, applied: Pass[Program], program: Program) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def after_pass(self, applied: Pass[Program], program: Program, record: PassRecord) -> None:
        """Stop it."""
        spent = time.perf_counter() - self._started
        self.seconds[applied.name] = self.seconds.get(applied.name, 0.0) + spent


class DumpHook:
    """Writes the Program's text after every pass into a folder: ``00-source.txt``, ``01-canonicalize.txt`` …"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def before_pass(self, applied: Pass[Program], program: Program) -> None:
        """Write the source once."""
        if self._count == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "00-source.txt").write_text(text(program), encoding="utf-8")

    def after_pass(self, applied: Pass[Program], program: Program, record: PassRecord) -> None:
        """Write the result of a pass."""
        self._count += 1
        (self.folder / f"{self._count:02}-{applied.name}.txt").write_text(text(program), encoding="utf-8")


def check_order(passes: Sequence[Pass[Any]]) -> None:
    """Stages never go back, and every required fact is established before and not broken since.

    Raises:
        InternalError: VLX0405.
    """
    holds: set[str] = set()
    reached = 0
    for each in passes:
        for fact in each.requires | each.establishes | each.breaks:
            if fact not in FACTS:
                raise InternalError("VLX0405", f"pass {each.name} names the fact '{fact}', which has no predicate")
        if STAGES.index(each.stage) < reached:
            raise InternalError("VLX0405", f"pass {each.name} of stage {each.stage} stands behind a later stage")
        missing = each.requires - holds
        if missing:
            raise InternalError("VLX0405", f"pass {each.name} requires {', '.join(sorted(missing))}, not established")
        reached = STAGES.index(each.stage)
        holds = (holds - each.breaks) | each.establishes


def run_pipeline(
    source: Program, passes: Sequence[Pass[Program]], *, gate: NumericGate | None, hooks: Iterable[Hook] = ()
) -> tuple[Program, tuple[PassRecord, ...]]:
    """Run passes in order on a copy of ``source``.

    Args:
        source: Left as it is.
        passes: In pipeline order.
        gate: Made from ``source``; None switches it off.
        hooks: Watchers.

    Returns:
        The last Program and one record per pass.

    Raises:
        InternalError: VLX0403 to VLX0407 when a pass breaks its contract.
        GateError: VLX0401, VLX0406 when a pass changes what the model computes.
    """
    check_order(passes)
    hooks = tuple(hooks)
    current = source
    records = []
    for each in passes:
        for hook in hooks:
            hook.before_pass(each, current)
        after, record = run_pass(each, current, gate=gate)
        for hook in hooks:
            hook.after_pass(each, after, record)
        records.append(record)
        current = after
    return current, tuple(records)


def run_pass(applied: Pass[Program], before: Program, *, gate: NumericGate | None) -> tuple[Program, PassRecord]:
    """Run one pass on a copy of ``before`` and check its contract."""
    after = before.copy()
    changes, misses = applied.run(after)
    if gate is not None:
        gate.require_untouched(applied)
    verify(after, made_by=applied.name)
    if _face(after) != _face(before):
        raise InternalError("VLX0403", f"pass {applied.name} changed the names or dtypes of inputs or outputs")
    modified = fingerprint(after) != fingerprint(before)
    if modified != bool(changes):
        said = f"{len(changes)} changes" if changes else "no change"
        raise InternalError(
            "VLX0403", f"pass {applied.name} reports {said}, but its program {'is' if modified else 'is not'} different"
        )
    for fact in sorted(applied.establishes):
        if not FACTS[fact](after):
            raise InternalError("VLX0407", f"pass {applied.name} did not establish '{fact}'", where=applied.name)
    verdict = GATE_OFF
    if gate is not None:
        verdict = gate.check(applied, before, after) if modified else GateRecord(worst=0.0, proof="identical", probes=0)
    record = PassRecord(
        name=applied.name,
        stage=applied.stage,
        effect=applied.effect,
        options=applied.options.model_dump(mode="json"),
        changes=_summaries(changes),
        near_misses=tuple(map(_near_miss, misses[:_MAX_NEAR_MISSES])),
        gate=verdict,
    )
    return after, record


def verify(program: Program, *, made_by: str) -> None:
    """Check that a Program is well formed: topological order, dialect, shapes, provenance, stored tensors.

    Raises:
        InternalError: VLX0403, naming pass and node.
    """
    seen = set()
    for node in program.graph.nodes:
        found = list(dialect.problems(node))
        found += [
            f"it reads {operand.name} before it is made" for operand in node.all_input_nodes if operand not in seen
        ]
        if node.op == "get_attr" and node.target not in program.tensors:
            found.append(f"tensor {node.target} is not stored")
        if node.op == "call_function" and not provenance.origins(node):
            found.append("it has no origins")
        if found:
            raise InternalError(
                "VLX0403", f"pass {made_by} left an invalid program: {found[0]}", where=provenance.describe(node),
                hint="please report this",
            )  # fmt: skip
        seen.add(node)
    if len(program.results) != len(program.signature.outputs):
        raise InternalError("VLX0403", f"pass {made_by} changed the number of outputs")


def _face(program: Program) -> list[tuple[str, str]]:
    """What a user of the graph addresses: names and dtypes of inputs and outputs, in order."""
    return [(spec.name, spec.dtype) for spec in (*program.signature.inputs, *program.signature.outputs)]


def _near_miss(miss: NearMiss) -> NearMissRecord:
    return NearMissRecord(pattern=miss.pattern, node=provenance.describe(miss.node), reason=miss.reason)


def _summaries(changes: Sequence[Change]) -> tuple[ChangeSummary, ...]:
    grouped: dict[str, list[Change]] = {}
    for change in changes:
        grouped.setdefault(change.what, []).append(change)
    return tuple(
        ChangeSummary(
            what=what,
            count=len(same),
            where=tuple(sorted({path for change in same for path in change.where if path})),
            saved_nodes=sum(c.saved_nodes for c in same),
            saved_parameters=sum(c.saved_parameters for c in same),
            saved_macs=sum(c.saved_macs for c in same),
        )
        for what, same in sorted(grouped.items())
    )
