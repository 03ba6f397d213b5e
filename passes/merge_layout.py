"""merge-layout: reshapes and permutes in a row become as few as say the same.

Before → after::

    %1 = permute(x, [0,2,3,1])      → f32[batch,8,8,64]
    %2 = reshape(%1, [-1,64,64])                              %1 = permute(x, [0,2,3,1])  → f32[batch,8,8,64]
    %3 = reshape(%2, [-1,8,8,64])                      →
    %4 = permute(%3, [0,3,1,2])     → f32[batch,64,8,8]       (gone: %4 is x)
    %5 = unsqueeze(%4, 1)                                     %5 = unsqueeze(x, 1)

Any chain of reshape, permute, unsqueeze and squeeze is one order of the atoms of its axes
(``passes/layout/axis_maps``). The shortest chain with that order replaces it: nothing, one reshape (or unsqueeze,
squeeze), one permute, or two or three of them. A permute that only moves axes of size 1 is a reshape.

Equation: a chain of bijections of index tuples is a bijection; two chains with the same one are equal.

It stands before the passes that recognise attention and norms, which then meet one layout operator where there were
three; what moves across other operators comes behind them (``eliminate-permutes``).

Does not apply when: the program would not have fewer operators, because another one reads what lies between; a merged
reshape would need two or more sizes that depend on the input; the reshapes cut an axis at places of which neither
refines the other, with a permute between.
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.layout.views import (
    Call,
    Chain,
    calls_of,
    chains_to,
    emit,
    entries_of,
    is_layout,
    operand_of,
    shape_of,
)

_PATTERN = "layout → layout"


class MergeLayout(Pass[Program]):
    """Reshapes and permutes in a row become as few as say the same."""

    name: ClassVar[str] = "merge-layout"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if not is_layout(node) or not is_layout(operand_of(node)) or _is_inside(node):
                continue
            chains = chains_to(node)[1:]
            best = max(
                ((gain, c, calls) for c in chains for gain, calls in _gains(c)), key=lambda g: g[0], default=None
            )
            if best is not None and best[0] > 0:
                yield Match(node, best[1].nodes, best[2])
            elif reason := _why_not(chains):
                yield NearMiss(_PATTERN, node, reason)

    def apply(self, ir: Program, match: Match) -> Change:
        node, calls = match.node, match.data
        names = [dialect.plain_name(n) for n in match.nodes]
        where = tuple(provenance.module_path(n) for n in match.nodes)
        first = operand_of(match.nodes[0])
        new = emit(ir, calls, first, before=node, value_of=node, merges=match.nodes[:-1])
        saved = ir.replace(node, new) - len(calls)
        now = dialect.plain_name(new) if calls else "nothing"
        now = f"{len(calls)} operators" if len(calls) > 1 else now
        return Change(what=f"{' and '.join(sorted(set(names)))} merged into {now}", where=where, saved_nodes=saved)


def _is_inside(node: Node) -> bool:
    """Whether a longer chain is looked at anyway."""
    return len(node.users) == 1 and is_layout(next(iter(node.users)))


def _gains(chain: Chain) -> Iterator[tuple[int, list[Call]]]:
    """For each way to write a chain: how many operators fewer, and the calls."""
    for spelling in chain.spellings:
        calls = calls_of(spelling, shape_of(chain.source), entries_of(chain.last))
        if calls is not None:
            yield min(chain.private, len(chain.nodes)) - len(calls), calls


def _why_not(chains: list[Chain]) -> str:
    """Why a chain that could be shorter stays; empty where it could not."""
    for chain in chains:
        if not chain.spellings:
            return "its reshapes cut one axis at places of which neither refines the other"
        shortest = len(chain.spellings[0])
        if shortest >= len(chain.nodes):
            continue
        if not any(True for _ in _gains(chain)):
            return "the merged reshape would have two sizes that depend on the input"
        shared = next((n for n in reversed(chain.nodes[:-1]) if len(n.users) != 1), None)
        if shared is not None:
            return f"the {dialect.plain_name(shared)}'s output is used by {len(shared.users) - 1} other(s)"
    return ""
