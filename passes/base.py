"""The contract of a pass.

A pass finds matches and near misses, and applies one match at a time; the runner drives it to a fixed point, so a
prefix of its matches can be applied by bisect. Whatever a pass makes carries shape and provenance (``Program.add_call``
sees to it). No class, family or module-path test, and no test of the target, ever stands in a pass.

A pass is generic over the graph it works on: ``Pass[Program]``, or ``Pass[OnnxModel]`` for what a target lowered to.
What differs between them (how a graph is run, what a node is) is a :class:`~vlexport.passes.level.Level`.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal

from torch import Tensor
from torch.fx import Node
from typing_extensions import TypeVar

from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import Change
from vlexport.core.errors import InternalError
from vlexport.passes.statistic import Statistic

API_VERSION = 1
"""Version of this contract. It grows when a pass written for an earlier one would no longer work; a plugin writes the
number that it was written for, and does not import this one."""

IR = TypeVar("IR")
N = TypeVar("N", bound=Hashable, default=Node)
"""What a node is at the level of a pass; a level can describe it. ``Match`` alone means one of a Program."""
Stage = Literal["normalize", "raise", "reparameterize", "tokens", "narrow", "smooth", "precision", "legalize"]
STAGES: tuple[Stage, ...] = (
    "normalize", "raise", "reparameterize", "tokens", "narrow", "smooth", "precision", "legalize",
)  # fmt: skip
Effect = Literal["exact", "approximate"]
MAX_SWEEPS = 1000
"""Sweeps after which a pass counts as endless; each sweep applies every match that does not overlap another."""


class NoOptions(Frozen):
    """A pass without options."""


@dataclass(frozen=True)
class Match(Generic[N]):
    """A place where a pass applies.

    Attributes:
        node: The node whose value the rewrite will compute; names the match in messages.
        nodes: All nodes that the rewrite consumes; matches that share one are applied in different sweeps.
        data: What ``find`` learnt and ``apply`` needs. It may hold nodes of ``nodes`` only: others may be gone by then.
    """

    node: N
    nodes: tuple[N, ...]
    data: Any = None


@dataclass(frozen=True)
class NearMiss(Generic[N]):
    """A place where a pass nearly applies.

    Attributes:
        pattern: What was looked for (``conv → batch_norm``).
        node: The node at which it failed.
        reason: Why not, in words a user can act on (``the convolution's output is used by 2 others``).
    """

    pattern: str
    node: N
    reason: str


class Pass(abc.ABC, Generic[IR]):
    """One transformation of a graph.

    Class attributes:
        name: Id, verb + object (``fold-constants``).
        stage: Where it stands in the pipeline.
        effect: ``exact`` passes are proven by running; ``approximate`` ones are judged by their ``statistic``.
        requires: Facts that must hold before.
        establishes: Facts that hold after; the runner evaluates them.
        breaks: Facts that may no longer hold after.
        Options: Typed options.
        tools: Names of outside packages, as pip knows them, whose version decides what the pass does.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    effect: ClassVar[Effect] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[Frozen]] = NoOptions
    tools: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Frozen | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @property
    def statistic(self) -> Statistic | None:
        """What an approximate pass promises of every output; None for exact ones."""
        return None

    @property
    def adds(self) -> int:
        """How many outputs the pass puts behind the graph's own."""
        return 0

    @property
    def witnesses(self) -> Sequence[tuple[Any, ...]]:
        """Further inputs on which the gate judges an approximate pass, known once it has run."""
        return ()

    def unpromised(self, ir: IR, values: tuple[Any, ...]) -> tuple[int, ...]:
        """Rows of a probe of which an approximate pass promises nothing, once it has run.

        Args:
            ir: The graph before the pass.
            values: The probe's, one per input.
        """
        return ()

    @abc.abstractmethod
    def find(self, ir: IR) -> Iterator[Match[Any] | NearMiss[Any]]:
        """Every place where the pass applies, or nearly does. Changes nothing."""

    @abc.abstractmethod
    def apply(self, ir: IR, match: Match[Any]) -> Change:
        """Rewrite one match in place, consuming only ``match.nodes`` and what becomes unread by it."""

    def run(self, ir: IR, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss[Any]]]:
        """Apply until nothing matches, or ``limit`` matches were applied.

        Raises:
            InternalError: VLX0404 when no fixed point is reached.
        """
        changes: list[Change] = []
        for _ in range(MAX_SWEEPS):
            misses: list[NearMiss[Any]] = []
            matches: list[Match[Any]] = []
            for found in self.find(ir):
                if isinstance(found, Match):
                    matches.append(found)
                else:
                    misses.append(found)
            if not matches:
                return changes, misses
            consumed: set[Hashable] = set()
            for match in matches:
                if limit is not None and len(changes) >= limit:
                    return changes, misses
                if consumed.isdisjoint(match.nodes):
                    consumed.update(match.nodes)
                    changes.append(self.apply(ir, match))
        raise InternalError(
            "VLX0404", f"pass {self.name} still matches after {MAX_SWEEPS} sweeps",
            hint="please report it; the pass undoes its own work",
        )  # fmt: skip


class SampledPass(Pass[IR]):
    """A pass that measures on calibration samples before it decides.

    Args:
        options: Typed options.
        samples: One tensor per input each; may be iterated any number of times, and is empty without ``--calib``.
    """

    def __init__(self, options: Frozen | None = None, *, samples: Iterable[tuple[Tensor, ...]] = ()) -> None:
        super().__init__(options)
        self.samples = samples


__all__ = [
    "API_VERSION", "IR", "MAX_SWEEPS", "STAGES", "Change", "Effect", "Match", "N", "NearMiss", "NoOptions", "Pass",
    "SampledPass", "Stage",
]  # fmt: skip
