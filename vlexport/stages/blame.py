"""blame: which of several passes changes what a graph computes, and which of its matches does.

The passes of one leg are held to what the graph computed before the first of them. Two binary searches, over passes
and then over the matches of the guilty one, are judged as the numeric gate judges: a prefix counts as one pass, so that
a difference in float32 is proven in float64 before anybody is blamed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlexport.core.bundle_schema import Change
from vlexport.core.errors import CapabilityError, GateError, InternalError, VlexportError
from vlexport.core.numerics import relative_error
from vlexport.passes.base import Effect, Match, NearMiss, Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.level import Failure, Level, Outputs
from vlexport.passes.pipeline import run_pass, verify
from vlexport.passes.probes import Probe, as_array
from vlexport.passes.program_level import PROGRAM
from vlexport.passes.statistic import Statistic

RAISED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What a broken pass of ours may raise; a plugin's comes as VLX1003."""
Say = Callable[[str], None]
Watch = Callable[[], None]


@dataclass(frozen=True)
class Figure:
    """How far a graph lies from the reference.

    Attributes:
        value: The worst over probes and outputs: ``max|a−b| / max|b|``, or the leg's statistic.
        probe: Where it was found.
        output: Its position among the outputs.
    """

    value: float
    probe: str
    output: int


@dataclass(frozen=True)
class Leg:
    """Passes that are held to one reference.

    Attributes:
        start: The graph before the first of them.
        passes: Exact ones in order, or a single approximate one.
        probes: What is run.
        reference: What ``start`` computes on each probe; computed before any pass may touch a weight.
        level: What kind of graph it is.
        statistic: What the approximate pass is judged by.
    """

    start: Any
    passes: Sequence[Pass[Any]]
    probes: Sequence[Probe]
    reference: Sequence[Outputs]
    level: Level[Any] = field(default_factory=lambda: PROGRAM)
    statistic: Statistic | None = None


@dataclass(frozen=True)
class Blamed:
    """A pass that is to blame.

    Attributes:
        culprit: The pass.
        position: Its place among the passes of its leg, from 1.
        match: Which of its matches, from 1; None where it does not work match by match.
        matches: How many it has.
        node: The node that the match is named by, before the rewrite.
        change: What the match did; None where it did not come to its end.
        before: The figure without it; None where the graph could not be run.
        after: The figure with it; None where the graph could not be run.
        reason: What was found, in the words of the gate or of the runner.
        where: The first node whose value differs, or where the contract was broken.
    """

    culprit: Pass[Any]
    position: int
    match: int | None
    matches: int
    node: str
    change: Change | None
    before: Figure | None
    after: Figure | None
    reason: str
    where: str


class Prefix(Pass[Any]):
    """Passes that count as one: all but the last to their end, the last one up to ``limit`` of its matches."""

    name = "prefix"
    stage = "normalize"

    def __init__(self, passes: Sequence[Pass[Any]], statistic: Statistic | None, limit: int | None) -> None:
        super().__init__()
        self.passes, self.limit, self._statistic = passes, limit, statistic
        self.name = passes[-1].name  # type: ignore[misc]
        effect: Effect = "exact" if statistic is None else "approximate"
        self.effect = effect  # type: ignore[misc]

    @property
    def statistic(self) -> Statistic | None:
        """That of its only pass."""
        return self._statistic

    def find(self, ir: Any) -> Iterator[Match[Any] | NearMiss[Any]]:
        """What the last pass finds."""
        return self.passes[-1].find(ir)

    def apply(self, ir: Any, match: Match[Any]) -> Change:
        """As the last pass does."""
        return self.passes[-1].apply(ir, match)

    def run(self, ir: Any, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss[Any]]]:
        """All passes in order."""
        changes: list[Change] = []
        for each in self.passes:
            found, _ = each.run(ir, limit=self.limit if each is self.passes[-1] else None)
            changes += found
        return changes, []


def outputs_of(graph: Any, probes: Sequence[Probe], level: Level[Any] = PROGRAM) -> list[Outputs]:
    """What a graph computes on each probe; the runtime's error where it does not run."""
    found = []
    for each in level.run(graph, probes):
        if isinstance(each, Failure):
            raise each.error
        found.append(each)
    return found


def legs_of(passes: Sequence[Pass[Any]]) -> list[list[Pass[Any]]]:
    """Passes in groups: an approximate one stands alone, for what it gives is what later ones are held to."""
    groups: list[list[Pass[Any]]] = []
    for each in passes:
        alone = each.effect == "approximate" or (groups and groups[-1][-1].effect == "approximate")
        if alone or not groups:
            groups.append([each])
        else:
            groups[-1].append(each)
    return groups


def blame(leg: Leg, say: Say) -> tuple[Any, Blamed | None]:
    """The graph behind all passes of a leg, and who is to blame if it differs from the one before them.

    Raises:
        InternalError: VLX0403 for an approximate pass that declares no statistic.
    """
    if leg.passes[0].effect == "approximate" and leg.statistic is None:
        raise InternalError("VLX0403", f"pass {leg.passes[0].name} is approximate and declares no statistic")
    states, broken = [leg.start], None
    for position, each in enumerate(leg.passes, 1):
        found = _ran(leg, each, states[-1])
        if isinstance(found, VlexportError):
            broken = _broken(leg, position, states[-1], found)
            break
        states.append(found)
    if broken is not None and isinstance(broken[1], GateError):  # weights were edited: nothing can be compared any more
        return states[-1], broken[0]
    guilty = _guilty(leg, states, say)
    return states[-1], guilty or (broken[0] if broken is not None else None)


def _ran(leg: Leg, each: Pass[Any], before: Any) -> Any:
    """The graph behind a pass, or the contract that it broke; edited weights come before all else."""
    untouched = NumericGate(before, (), level=leg.level, sighted=True)
    after: Any
    try:
        after, _ = run_pass(each, before, gate=None, level=leg.level)
    except (CapabilityError, GateError, InternalError) as error:
        after = error
    except RAISED as error:
        first = (str(error).strip().splitlines() or [""])[0]
        after = InternalError("VLX0403", f"{type(error).__name__}: {first}")
    try:
        untouched.require_untouched(each)
    except GateError as error:
        return error
    return after


def _guilty(leg: Leg, states: Sequence[Any], say: Say) -> Blamed | None:
    """The first pass behind which the graph differs, and its match."""
    low, high = 0, len(states) - 1
    if high == 0:
        return None
    names = [each.name for each in leg.passes]
    reason = _judged(leg, high, None, states[high])
    say(f"{names[0]} to {names[high - 1]}: {'differs' if reason else 'agrees'}")
    if reason is None:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        found = _judged(leg, middle, None, states[middle])
        say(f"{names[0]} to {names[middle - 1]}: {'differs' if found else 'agrees'}")
        low, high, reason = (low, middle, found) if found else (middle, high, reason)
    return _guilty_match(leg, high, states, reason, say)


def _guilty_match(leg: Leg, position: int, states: Sequence[Any], reason: GateError, say: Say) -> Blamed:
    culprit, before, after = leg.passes[position - 1], states[position - 1], states[position]
    changes, nodes = applied(culprit, leg.level.copy(before), leg.level)
    if not nodes or culprit.run(leg.level.copy(before), limit=0)[0]:  # it works on the whole graph at once
        return Blamed(
            culprit, position, None, len(changes), "", changes[0] if len(changes) == 1 else None,
            figure(leg, before), figure(leg, after), reason.message, reason.where,
        )  # fmt: skip
    low, high, without = 0, len(changes), before
    while high - low > 1:
        middle = (low + high) // 2
        part = leg.level.copy(before)
        culprit.run(part, limit=middle)
        found = _judged(leg, position, middle, part)
        say(f"{culprit.name}, matches 1 to {middle} of {len(changes)}: {'differs' if found else 'agrees'}")
        if found:
            high, after, reason = middle, part, found
        else:
            low, without = middle, part
    return Blamed(
        culprit, position, high, len(changes), nodes[high - 1], changes[high - 1],
        figure(leg, without), figure(leg, after), reason.message, reason.where,
    )  # fmt: skip


def _judged(leg: Leg, position: int, limit: int | None, after: Any) -> GateError | None:
    """What the gate has against a prefix; None where it agrees."""
    gate = NumericGate(leg.start, leg.probes, level=leg.level, sighted=True)
    gate.kept = list(leg.reference)
    prefix = Prefix(leg.passes[:position], leg.statistic, limit)
    if leg.level.fingerprint(after) == leg.level.fingerprint(leg.start):
        return None
    try:
        gate.check(prefix, leg.start, after)
    except GateError as error:
        return error
    return None


def figure(leg: Leg, graph: Any) -> Figure | None:
    """How far a graph lies from the leg's reference, by its statistic, or by ``max|a−b| / max|b|``; None if it does not
    run, or gives outputs of another number.
    """
    found: list[Figure] = []
    statistic = leg.statistic
    for probe, ours, kept in zip(leg.probes, leg.level.run(graph, leg.probes), leg.reference, strict=True):
        if isinstance(ours, Failure) or len(ours) != len(kept):
            return None
        for position, (a, b) in enumerate(zip(map(as_array, ours), map(as_array, kept), strict=True)):
            value = relative_error(a, b) if statistic is None else statistic.of(a, b)
            found.append(Figure(value, probe.name, position))
    higher_is_worse = statistic is None or statistic.name == "max_relative"
    return (max if higher_is_worse else min)(found, key=lambda each: each.value, default=None)


def applied(
    culprit: Pass[Any], graph: Any, level: Level[Any], *, watch: Watch | None = None, nodes: list[str] | None = None
) -> tuple[list[Change], list[str]]:
    """Run a pass on a graph and note every match that it applies.

    Args:
        culprit: The pass.
        graph: Changed in place.
        level: Describes nodes.
        watch: Called after every match.
        nodes: Where the matches are noted, so that they are known even if the pass raises.

    Returns:
        Its changes, and the node of each match as it was before the rewrite; none for a pass that does not apply
        match by match.
    """
    nodes = [] if nodes is None else nodes

    def noted(ir: Any, match: Match[Any]) -> Change:
        nodes.append(level.describe(match.node))
        change = culprit.apply(ir, match)
        if watch is not None:
            watch()
        return change

    twin = copy.copy(culprit)
    vars(twin)["apply"] = noted  # `run` is the pass's own, and calls whatever the instance has
    changes, _ = twin.run(graph)
    return changes, nodes


class _EditedError(Exception):
    """A match wrote into a weight."""


def _broken(leg: Leg, position: int, before: Any, error: VlexportError) -> tuple[Blamed, VlexportError]:
    """A pass that breaks its contract, and the match that does, where that can be told."""
    culprit, level = leg.passes[position - 1], leg.level
    digests = {name: level.digest(weight, fresh=True) for name, weight in level.weights(before)}
    weights = level.weights(before)
    graph, nodes = level.copy(before), list[str]()

    def watch() -> None:
        if isinstance(error, GateError) and any(level.digest(w, fresh=True) != digests[n] for n, w in weights):
            raise _EditedError
        if not isinstance(error, GateError):
            verify(graph, made_by=culprit.name, level=level)

    match, changes = None, list[Change]()
    try:
        changes, _ = applied(culprit, graph, level, watch=watch, nodes=nodes)
    except (*RAISED, VlexportError, _EditedError):
        match = len(nodes) or None
    blamed = Blamed(
        culprit, position, match, max(len(nodes), len(changes)), nodes[-1] if match else "", None, None, None,
        error.message, error.where,
    )  # fmt: skip
    return blamed, error
