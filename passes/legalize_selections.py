"""legalize-selections: tokens chosen, dropped and merged with top-k, gather and one-hot products.

Before → after, each drawn where it is written, in ``passes/tokens``::

    complement_rules   a complement by sorting         →  masked weights, or a top-k of what is not chosen
    order_rules        sort, argsort                   →  topk with a constant k
    sample_rows        lookup in a flattened batch     →  gather
    scatter_rules      scatter_reduce, index_put, …    →  a product with a one-hot matrix
    fixed_writes       slice_scatter, select_scatter   →  cat, or where

Models that reduce their tokens by a fixed number hold these. TensorRT and Core ML lower scatters that reduce, full
sorts and lookups in a flattened batch badly or not at all; what is written here all of them have.

A rule stands before those that would take a part of what it matches.

Does not apply when: a length that decides a shape depends on the input; more than 3840 places of a sort are read; a
stable sort is longer than 1024; a one-hot matrix would have more than 4 million elements for one sample; values written
to one place may be several (only a reduction says what then holds); places are not known to lie where they must.
Numerical effect: none but that sums may run in another order, and that equals may be picked in another order where the
sort was not asked to be stable. What is summed has to be finite.
Source: ONNX's TopK, ScatterElements; TensorRT's operator reference (TopK, Scatter).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from vlexport.ir import provenance
from vlexport.ir.cost import node_macs, parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.tokens import complement_rules, fixed_writes, order_rules, sample_rows, scatter_rules


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        pattern: What near misses call it.
        find: The calls that it would take, why it takes none, or None where nothing looks like it.
        write: Rewrites what ``find`` found at a node, and says what was done.
    """

    pattern: str
    find: Callable[[Program, Node], tuple[Node, ...] | str | None]
    write: Callable[[Program, Node], str]


RULES = (
    Rule("sum over a complement", complement_rules.find_sum, complement_rules.write_sum),
    Rule("complement", complement_rules.find_places, complement_rules.write_places),
    Rule("sort → topk", order_rules.find, order_rules.write),
    Rule("lookup → gather", sample_rows.find, sample_rows.write),
    Rule("scatter → one-hot", scatter_rules.find, scatter_rules.write),
    Rule("write → pieces", fixed_writes.find, fixed_writes.write),
)


class LegalizeSelections(Pass[Program]):
    """Tokens chosen, dropped and merged with top-k, gather and one-hot products."""

    name: ClassVar[str] = "legalize-selections"
    stage: ClassVar[Stage] = "tokens"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        taken: set[Node] = set()
        for rule in RULES:
            for node in ir.calls():
                found = rule.find(ir, node) if node not in taken else None
                if isinstance(found, str):
                    yield NearMiss(rule.pattern, node, found)
                elif found is not None and taken.isdisjoint(found):
                    taken.update(found)
                    yield Match(node, found, rule)

    def apply(self, ir: Program, match: Match) -> Change:
        rule: Rule = match.data
        before, stored, where = set(ir.calls()), parameters_stored(ir), (provenance.module_path(match.node),)
        what = rule.write(ir, match.node)
        made = [node for node in ir.calls() if node not in before]  # what goes computes no products
        return Change(
            what=what,
            where=where,
            saved_nodes=len(before) - len(ir.calls()),
            saved_parameters=stored - parameters_stored(ir),
            saved_macs=-sum(node_macs(ir, node, {}) for node in made),
        )
