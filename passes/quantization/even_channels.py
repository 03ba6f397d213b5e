"""even_channels: what passes share that make the channels of a value alike: how factors are chosen, and what follows.

Such a pass knows places where each channel could be divided by a factor, and how to rewrite one. Here the factors are
chosen, once for all of them, and the ranges that calibration saw are carried over to what the values are afterwards:
nothing has to be measured again::

    (x - shift) / factor of a channel that spans low … high spans (low - shift) / factor … (high - shift) / factor
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.calibration.table import ChannelRanges, ValueEntry
from vlexport.core.artifact import Frozen
from vlexport.core.scheme import QuantScheme
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.projections.projection import Projection
from vlexport.passes.quantization.migration import LEFT, Migration, Site, channels_of, choose, quantized_rule


@dataclass(frozen=True, eq=False)
class Place:
    """Where channels could be made alike.

    Attributes:
        site: What the choice of factors needs.
        value: Whose channels they are.
        nodes: What a rewrite touches.
        data: For the pass.
    """

    site: Site
    value: Node
    nodes: tuple[Node, ...]
    data: Any = None


@dataclass(frozen=True, eq=False)
class Moved:
    """What a value is after a rewrite: ``(was - shift) / factor``, channel by channel.

    Attributes:
        was: The value that was measured.
        factor: Float64, one a channel of that value; None where its channels are others.
        shift: Likewise; None for none.
    """

    was: Node
    factor: Tensor | None
    shift: Tensor | None = None


class EvenChannels(Pass[Program]):
    """Unlike channels of a value are made alike, and what reads them undoes that.

    Attributes:
        behind: After a run: key of a value of the Program as it is then → its range; no entry where none can be told.
    """

    stage: ClassVar[Stage] = "smooth"
    effect: ClassVar[Effect] = "exact"
    pattern: ClassVar[str]

    def __init__(
        self,
        options: Frozen | None = None,
        *,
        scheme: QuantScheme | None = None,
        ranges: Mapping[str, ValueEntry] | None = None,
        samples: Sequence[tuple[Tensor, ...]] = (),
        keep: Sequence[str] = (),
    ) -> None:
        """Without a scheme, ranges of channels and samples, nothing is found.

        Args:
            options: Typed options.
            scheme: What the target wants quantized.
            ranges: Key of a value → its range, with those of its channels.
            samples: What candidates are tried on, one tensor per input each.
            keep: Patterns of modules that stay in float: nothing is gained by making alike what they read.
        """
        super().__init__(options)
        self.scheme = scheme
        self.ranges = ranges or {}
        self.samples = samples
        self.keep = keep
        self.behind: dict[str, ValueEntry] = {}
        self._chosen: dict[str, Migration] | None = None
        self._moved: dict[Node, Moved] = {}

    @abc.abstractmethod
    def places(self, ir: Program, keys: Mapping[Node, str]) -> Iterator[Place | NearMiss]:
        """Every place, and why others are none; ``keys`` are those of the Program's values."""

    @abc.abstractmethod
    def rewrite(self, ir: Program, place: Place, migration: Migration) -> tuple[str, Mapping[Node, Moved]]:
        """Rewrite one place; what was done in words, and every value that is another one now."""

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        if self.scheme is None or not self.samples:
            return
        places: list[Place] = []
        for each in self.places(ir, value_keys(ir)):
            if isinstance(each, NearMiss):
                yield each
            else:
                places.append(each)
        if self._chosen is None and places:  # on a float64 twin the same is applied, not chosen anew
            self._chosen = choose(ir, [each.site for each in places], self.samples)
        for each in places:
            migration = (self._chosen or {}).get(each.site.key)
            if migration is None:
                why = f"no factor leaves less than {each.site.left:g} of the rounding error"
                yield NearMiss(self.pattern, each.value, why)
            else:
                yield Match(each.value, each.nodes, (each, migration))

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Choose once, then apply one by one: calls stay the nodes that they are."""
        found, keys = list(self.find(ir)), value_keys(ir)
        misses = [each for each in found if isinstance(each, NearMiss)]
        matches = [each for each in found if isinstance(each, Match)]
        self._moved = {}
        changes = [self.apply(ir, match) for match in matches[:limit]]
        self.behind = carried(self.ranges, keys, ir, self._moved)
        return changes, misses

    def apply(self, ir: Program, match: Match) -> Change:
        calls, stored = len(ir.calls()), parameters_stored(ir)
        where = [provenance.module_path(each) for each in match.nodes]
        what, moved = self.rewrite(ir, *match.data)
        self._moved |= moved
        return Change(
            what=what, where=tuple(dict.fromkeys(where)), saved_nodes=calls - len(ir.calls()),
            saved_parameters=stored - parameters_stored(ir),
        )  # fmt: skip

    def site(
        self, key: str, readers: Sequence[Projection], *, may_shift: bool = False, left: float = LEFT
    ) -> Site | str:
        """What the choice of factors needs to know of a value, or why it is not looked at.

        Args:
            key: The value's.
            readers: All that read it.
            may_shift: Whether it and all of them can take a shift.
            left: The error that may be left at most.
        """
        assert self.scheme is not None
        rules = ((each, quantized_rule(self.scheme, each, self.keep)) for each in readers)
        quantized = tuple((each, rule) for each, rule in rules if rule is not None)
        if not quantized:
            return "nothing that reads it is quantized"
        channels = channels_of(self.ranges, key)
        if channels is None:
            return "the ranges of its channels were not measured"
        return Site(key, quantized, *channels, may_shift=may_shift, left=left)


def carried(
    ranges: Mapping[str, ValueEntry], keys: Mapping[Node, str], ir: Program, moved: Mapping[Node, Moved]
) -> dict[str, ValueEntry]:
    """Ranges of a Program after a rewrite.

    Args:
        ranges: Of the Program before, by key; of extremes.
        keys: Those of the Program before: nodes that are still there are the same.
        ir: The Program after.
        moved: Which of its values are others now; of those whose channels were not measured, nothing can be told.
    """
    found = {}
    for node, key in value_keys(ir).items():
        change = moved.get(node)
        entry = ranges.get(keys.get(node if change is None else change.was, ""))
        if entry is not None and change is not None:
            entry = _narrowed(entry, change)
        if entry is None:
            continue
        if node.op == "call_function":
            origin = {"op": dialect.plain_name(node), "module": provenance.module_path(node),
                      "source": provenance.source_line(node)}  # fmt: skip
            entry = entry.model_copy(update={"value": key, **origin})
        found[key] = entry
    return found


def _narrowed(entry: ValueEntry, change: Moved) -> ValueEntry | None:
    factor = change.factor
    if factor is None or entry.channels is None or len(entry.channels.low) != len(factor):
        return None
    shift = change.shift if change.shift is not None else torch.zeros_like(factor)
    ends = (torch.tensor(each, dtype=torch.float64) for each in (entry.channels.low, entry.channels.high))
    low, high = (((each - shift) / factor).tolist() for each in ends)
    reach = (min(low), max(high))
    channels = ChannelRanges(axis=entry.channels.axis, low=tuple(low), high=tuple(high))
    update = {"low": reach[0], "high": reach[1], "measured": reach, "extremes": reach, "channels": channels}
    return entry.model_copy(update={**update, "typical": None})
