"""Near misses by reason: forty blocks that miss for one reason are one line, with the places behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlexport.core.bundle_schema import PassRecord

_SHOWN = 3


@dataclass(frozen=True)
class MissGroup:
    """Places where a pass nearly applied, and did not for the same reason.

    Attributes:
        applied: Name of the pass.
        pattern: What it looked for.
        reason: Why not.
        nodes: Operator, module path and source line of each place, in the graph's order.
    """

    applied: str
    pattern: str
    reason: str
    nodes: tuple[str, ...]


def grouped_misses(records: Iterable[PassRecord]) -> tuple[MissGroup, ...]:
    """All near misses of some passes, those with most places first within a pass."""
    found: list[MissGroup] = []
    for record in records:
        places: dict[tuple[str, str], list[str]] = {}
        for miss in record.near_misses:
            places.setdefault((miss.pattern, miss.reason), []).append(miss.node)
        groups = [MissGroup(record.name, pattern, why, tuple(nodes)) for (pattern, why), nodes in places.items()]
        found += sorted(groups, key=lambda each: -len(each.nodes))
    return tuple(found)


def places_phrase(nodes: Sequence[str]) -> str:
    """The first places and how many more there are."""
    more = len(nodes) - _SHOWN
    return ", ".join(nodes[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def miss_lines(records: Iterable[PassRecord], *, every: bool = False) -> list[str]:
    """Lines for the terminal, behind the line of the pass; ``every`` place on a line of its own, or the first ones."""
    lines = []
    for each in grouped_misses(records):
        lines.append(f"         not {each.pattern} ×{len(each.nodes)}: {each.reason}")
        places = each.nodes if every else (places_phrase(each.nodes),)
        lines += [f"           at {place}" for place in places]
    return lines
