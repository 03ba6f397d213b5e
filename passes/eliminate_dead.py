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
        what = f"unread {dialect.op_name(match.node).removeprefix('aten.').partition('.')[0]} removed"
        where = (provenance.module_path(match.node),)
        before = sum(t.numel() for t in ir.used_tensors().values())
        saved_nodes = ir.erase_dead(match.node)
        after = sum(t.numel() for t in ir.used_tensors().values())
        return Change(what=what, where=where, saved_nodes=saved_nodes, saved_parameters=before - after)
