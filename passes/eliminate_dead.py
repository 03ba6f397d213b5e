"""eliminate-dead: what nobody reads goes, and with it the tensors that only it read.

Before → after::

    %1 = relu(x)
    %2 = mul(x, 2)          →    %1 = relu(x)
    return %1                    return %1

Does not apply when: the call checks something while it runs (an assertion on a size).
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import saving
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage


class EliminateDead(Pass[Program]):
    """What nobody reads goes, and with it the tensors that only it read."""

    name: ClassVar[str] = "eliminate-dead"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"
    establishes: ClassVar[frozenset[str]] = frozenset({"no-dead-calls"})

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in reversed(ir.calls()):
            if not node.users and not dialect.checks_at_run_time(node):
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        what = f"unread {dialect.plain_name(node)} removed"
        where = (provenance.module_path(node),)
        saved = saving(ir, node)
        ir.erase_dead(node)
        return Change(
            what=what, where=where, saved_nodes=saved.calls, saved_parameters=saved.parameters, saved_macs=saved.macs
        )
