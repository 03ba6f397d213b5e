"""The operators of a graph before and after the passes, as typed data of a bundle. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from vlexport.core.artifact import Frozen

HEAVIEST = 10
"""Calls that are listed one by one."""


class OperatorCount(Frozen):
    """Calls of one operator.

    Attributes:
        name: Plain name (``conv2d``).
        before: Calls in the captured graph.
        after: Calls in the graph that was lowered.
        macs_before: Their multiply-accumulates, dims at their opt.
        macs_after: The same, after the passes.
    """

    name: str
    before: int
    after: int
    macs_before: int = 0
    macs_after: int = 0


class HeavyCall(Frozen):
    """One call: operator, module path and multiply-accumulates."""

    operator: str
    module: str
    macs: int


class Operators(Frozen):
    """What a graph consists of.

    Attributes:
        counts: One row an operator, the commonest first.
        heaviest: Calls of the lowered graph with the most multiply-accumulates, at most :data:`HEAVIEST`.
    """

    counts: tuple[OperatorCount, ...]
    heaviest: tuple[HeavyCall, ...] = ()

    @property
    def before(self) -> int:
        """All calls of the captured graph."""
        return sum(each.before for each in self.counts)

    @property
    def after(self) -> int:
        """All calls of the lowered graph."""
        return sum(each.after for each in self.counts)


def operators_from_counts(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], heaviest: tuple[HeavyCall, ...]
) -> Operators:
    """Rows in one order: by calls, the larger of both sides first, then by name.

    Args:
        before: Operator → calls and multiply-accumulates of the captured graph.
        after: The same of the lowered graph.
        heaviest: In any order.
    """
    names = sorted({*before, *after}, key=lambda n: (-max(before.get(n, (0,))[0], after.get(n, (0,))[0]), n))
    rows = [(name, before.get(name, (0, 0)), after.get(name, (0, 0))) for name in names]
    ranked = sorted(heaviest, key=lambda each: (-each.macs, each.module, each.operator))
    return Operators(
        counts=tuple(
            OperatorCount(name=n, before=b[0], after=a[0], macs_before=b[1], macs_after=a[1]) for n, b, a in rows
        ),
        heaviest=tuple(ranked[:HEAVIEST]),
    )


def whole_operators(parts: Mapping[str, Operators | None]) -> Operators | None:
    """All components together, calls named ``component.module``; a single component's as they are.

    None where one of several is not known.
    """
    found = {name: each for name, each in parts.items() if each is not None}
    if len(found) < len(parts):
        return None
    if len(found) == 1:
        return next(iter(found.values()))
    before: dict[str, tuple[int, int]] = {}
    after: dict[str, tuple[int, int]] = {}
    for each in found.values():
        for row in each.counts:
            calls, macs = before.get(row.name, (0, 0))
            before[row.name] = (calls + row.before, macs + row.macs_before)
            calls, macs = after.get(row.name, (0, 0))
            after[row.name] = (calls + row.after, macs + row.macs_after)
    heavy = [
        call.model_copy(update={"module": f"{name}.{call.module}" if call.module else name})
        for name, each in found.items()
        for call in each.heaviest
    ]
    return operators_from_counts(before, after, tuple(heavy))
