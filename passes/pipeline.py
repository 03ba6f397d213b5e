"""The runner: passes in an order that is data, checked before and after, with hooks.

After every pass: ``modified`` is true iff the fingerprint (text and weights) changed, the graph is well formed and kept
its face (names, dtypes), the facts the pass claims hold, and the numeric gate agrees. It runs passes over Programs, and
over what a target lowered them to when it is told that ``level``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlexport.core.bundle_schema import Change, ChangeSummary, GateRecord, NearMissRecord, PassRecord
from vlexport.core.errors import InternalError
from vlexport.core.plugins import answering_for
from vlexport.passes import offered_passes
from vlexport.passes.base import IR, STAGES, NearMiss, Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.level import Level
from vlexport.passes.program_level import PROGRAM

GATE_OFF = GateRecord(worst=0.0, proof="off", probes=0)
_MAX_NEAR_MISSES = 50
Listener = Callable[[Pass[Any], Sequence[NearMiss[Any]]], None]
"""Told of all near misses of a pass, whose nodes lie in the graph that it left; a record keeps the first 50 only."""


class Hook(Protocol):
    """Something that watches passes: a timer, a dumper, a progress bar."""

    def before_pass(self, applied: Pass[Any], program: Any) -> None:
        """Called with the graph that the pass will get."""

    def after_pass(self, applied: Pass[Any], program: Any, record: PassRecord) -> None:
        """Called once the pass was accepted."""


class TimingHook:
    """Seconds per pass, gate included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = 0.0

    def before_pass(self, applied: Pass[Any], program: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def after_pass(self, applied: Pass[Any], program: Any, record: PassRecord) -> None:
        """Stop it."""
        spent = time.perf_counter() - self._started
        self.seconds[applied.name] = self.seconds.get(applied.name, 0.0) + spent


class DumpHook:
    """Writes the graph's text after every pass into a folder: ``00-source.txt``, ``01-canonicalize.txt`` …"""

    def __init__(self, folder: Path, *, level: Level[Any] = PROGRAM) -> None:
        self.folder = folder
        self.level = level
        self._count = 0

    def before_pass(self, applied: Pass[Any], program: Any) -> None:
        """Write the source once."""
        if self._count == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "00-source.txt").write_text(self.level.text(program), encoding="utf-8")

    def after_pass(self, applied: Pass[Any], program: Any, record: PassRecord) -> None:
        """Write the result of a pass."""
        self._count += 1
        (self.folder / f"{self._count:02}-{applied.name}.txt").write_text(self.level.text(program), encoding="utf-8")


def check_order(passes: Sequence[Pass[Any]], facts: Mapping[str, object] = PROGRAM.facts) -> None:
    """Stages never go back, and every required fact is established before and not broken since.

    Args:
        passes: In pipeline order.
        facts: Those of the level the passes work at.

    Raises:
        InternalError: VLX0405.
    """
    holds: set[str] = set()
    reached = 0
    for each in passes:
        for fact in each.requires | each.establishes | each.breaks:
            if fact not in facts:
                raise InternalError("VLX0405", f"pass {each.name} names the fact '{fact}', which has no predicate")
        if STAGES.index(each.stage) < reached:
            raise InternalError("VLX0405", f"pass {each.name} of stage {each.stage} stands behind a later stage")
        missing = each.requires - holds
        if missing:
            raise InternalError("VLX0405", f"pass {each.name} requires {', '.join(sorted(missing))}, not established")
        reached = STAGES.index(each.stage)
        holds = (holds - each.breaks) | each.establishes


def run_pipeline(
    source: IR,
    passes: Sequence[Pass[IR]],
    *,
    gate: NumericGate | None,
    hooks: Iterable[Hook] = (),
    level: Level[Any] = PROGRAM,
    listener: Listener | None = None,
) -> tuple[IR, tuple[PassRecord, ...]]:
    """Run passes in order on a copy of ``source``.

    Args:
        source: Left as it is.
        passes: In pipeline order.
        gate: Made from ``source``; None switches it off.
        hooks: Watchers.
        level: What kind of graph ``source`` is.
        listener: Told of every pass's near misses.

    Returns:
        The last graph and one record per pass.

    Raises:
        InternalError: VLX0403 to VLX0407 when a pass breaks its contract.
        GateError: VLX0401, VLX0406 when a pass changes what the model computes.
    """
    check_order(passes, level.facts)
    hooks = tuple(hooks)
    current = source
    records = []
    for each in passes:
        for hook in hooks:
            hook.before_pass(each, current)
        after, record = run_pass(each, current, gate=gate, level=level, listener=listener)
        for hook in hooks:
            hook.after_pass(each, after, record)
        records.append(record)
        current = after
    return current, tuple(records)


def run_pass(
    applied: Pass[IR],
    before: IR,
    *,
    gate: NumericGate | None,
    level: Level[Any] = PROGRAM,
    listener: Listener | None = None,
) -> tuple[IR, PassRecord]:
    """Run one pass on a copy of ``before`` and check its contract.

    Raises:
        CapabilityError: VLX1003 naming the package, when a plugin's pass breaks it.
    """
    with answering_for(lambda: offered_passes().get(applied.name, ())):
        return _run_checked(applied, before, gate=gate, level=level, listener=listener)


def _run_checked(
    applied: Pass[IR], before: IR, *, gate: NumericGate | None, level: Level[Any], listener: Listener | None
) -> tuple[IR, PassRecord]:
    after: IR = level.copy(before)
    changes, misses = applied.run(after)
    if gate is not None:
        gate.require_untouched(applied)
    verify(after, made_by=applied.name, level=level)
    now = level.face(after)
    for what, was in level.face(before).items():
        found = now[what]
        if (found[: -applied.adds] if applied.adds and isinstance(found, list) else found) != was:
            raise InternalError("VLX0403", f"pass {applied.name} changed {what}", where=applied.name)
    modified = level.fingerprint(after) != level.fingerprint(before)
    if modified != bool(changes):
        said = f"{len(changes)} changes" if changes else "no change"
        raise InternalError(
            "VLX0403", f"pass {applied.name} reports {said}, but its program {'is' if modified else 'is not'} different"
        )
    for fact in sorted(applied.establishes):
        if not level.facts[fact](after):
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
        near_misses=tuple(_near_miss(miss, level) for miss in misses[:_MAX_NEAR_MISSES]),
        gate=verdict,
    )
    if listener is not None:
        listener(applied, misses)
    return after, record


def verify(program: Any, *, made_by: str, level: Level[Any] = PROGRAM) -> None:
    """Check that a graph is well formed: topological order, operators, shapes, provenance, stored tensors.

    Raises:
        InternalError: VLX0403, naming pass and node.
    """
    for where, what in level.problems(program):
        raise InternalError(
            "VLX0403", f"pass {made_by} left an invalid program: {what}", where=where, hint="please report this"
        )


def _near_miss(miss: NearMiss[Any], level: Level[Any]) -> NearMissRecord:
    return NearMissRecord(pattern=miss.pattern, node=level.describe(miss.node), reason=miss.reason)


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
