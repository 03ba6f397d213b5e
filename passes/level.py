"""What the runner and the gate must know about one kind of graph.

A pass is a contract; the runner that checks it and the gate that proves it are the same for a Program and for what a
target lowers it to. Only this differs: how a graph is copied, printed, checked and run, and how a node is described.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

from vlexport.core.artifact import Array
from vlexport.passes.base import IR
from vlexport.passes.probes import Probe

Outputs = tuple[Any, ...]
"""One array or tensor per output, in the signature's order."""
Differs = Callable[[Array, Array], bool]
"""Whether a value (first) is no longer that of the graph before (second)."""


@dataclass(frozen=True)
class Failure:
    """A graph that does not run on a probe.

    Attributes:
        reason: One line of what the runtime said.
        where: The node, described; empty where the runtime does not tell.
        error: What was raised.
    """

    reason: str
    where: str
    error: Exception


class Level(abc.ABC, Generic[IR]):
    """One kind of graph.

    Class attributes:
        runs_float64: Every graph has a float64 twin that runs. Then a pass that does less to the twin is the culprit;
            where it is not so, that only proves nothing.
    """

    runs_float64: ClassVar[bool]

    @property
    @abc.abstractmethod
    def facts(self) -> Mapping[str, Callable[[IR], bool]]:
        """Name → predicate: what passes at this level may require, establish and break."""

    @abc.abstractmethod
    def copy(self, ir: IR) -> IR:
        """A graph of its own with the same weights, shared."""

    @abc.abstractmethod
    def text(self, ir: IR) -> str:
        """The graph as stable text."""

    @abc.abstractmethod
    def fingerprint(self, ir: IR) -> str:
        """Digest of the text and of every weight's content."""

    @abc.abstractmethod
    def face(self, ir: IR) -> dict[str, object]:
        """What no pass may change, by the phrase that names it in a message."""

    @abc.abstractmethod
    def problems(self, ir: IR) -> Iterator[tuple[str, str]]:
        """(node described, what is wrong) of everything that makes the graph invalid."""

    @abc.abstractmethod
    def describe(self, node: Any) -> str:
        """One phrase for messages: operator and where in the user's model it comes from."""

    @abc.abstractmethod
    def weights(self, ir: IR) -> list[tuple[str, Any]]:
        """Name and content of every weight in use."""

    @abc.abstractmethod
    def digest(self, weight: Any, *, fresh: bool = False) -> str:
        """SHA-256 of a weight; ``fresh`` ignores a digest that was kept."""

    @abc.abstractmethod
    def size_bytes(self, ir: IR) -> int:
        """Bytes of all weights in use."""

    @abc.abstractmethod
    def double(self, ir: IR) -> IR | None:
        """A float64 twin, or None where there can be none."""

    @abc.abstractmethod
    def run(self, ir: IR, probes: Sequence[Probe]) -> Iterator[Outputs | Failure]:
        """Outputs, or why there are none, probe by probe."""

    def places(self, before: IR, after: IR, probe: Probe) -> Iterator[tuple[str, Array, Array]]:
        """Every value that is made in another way than before: the node described, what it makes of the values before
        the pass, and what was made there. Nothing at a level that cannot tell.
        """
        return iter(())

    @abc.abstractmethod
    def first_difference(self, before: IR, after: IR, probe: Probe, differs: Differs) -> str:
        """The first node of ``after`` whose value differs from that in ``before``, described."""
