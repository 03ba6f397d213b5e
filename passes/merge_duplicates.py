"""merge-duplicates: equal calls on equal operands become one; equal stored tensors become one.

Before → after::

    %0 = relu(x)
    %1 = relu(x)          →    %0 = relu(x)
    %2 = add(%0, %1)           %1 = add(%0, %0)

Does not apply when: an operator is opaque, random, or checks something while it runs; constants differ in type (1 is
not 1.0) or in the sign of a zero; two tensors differ in dtype, shape, content or kind. Tensors are compared by digest,
so a tied weight that was stored twice is stored once again.
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import saving
from vlexport.ir.program import Program
from vlexport.ir.text import tensor_digest
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage


class MergeDuplicates(Pass[Program]):
    """Equal calls on equal operands become one; equal stored tensors become one."""

    name: ClassVar[str] = "merge-duplicates"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node, first in duplicates(ir):
            # `first` is not consumed: whatever reads it stays, so that a thousand duplicates of it take one sweep.
            yield Match(node, (node,), first)

    def apply(self, ir: Program, match: Match) -> Change:
        node, first = match.node, match.data
        saved = saving(ir, node)
        if node.op == "get_attr":
            what, where = "duplicate tensor merged", (str(node.target),)
        else:
            what, where = f"duplicate {dialect.plain_name(node)} merged", (provenance.module_path(node),)
            provenance.inherit(first, value_of=first, merges=(first, node))
        ir.replace(node, first)
        return Change(
            what=what, where=where, saved_nodes=saved.calls, saved_parameters=saved.parameters, saved_macs=saved.macs
        )


def duplicates(ir: Program) -> Iterator[tuple[Node, Node]]:
    """Pairs of a node and the first one that computes or stores the same, in graph order."""
    seen: dict[Hashable, Node] = {}
    same: dict[Node, Node] = {}
    for node in ir.graph.nodes:
        key = _key(ir, node, same)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node:
            continue
        same[node] = first
        if node.op != "get_attr" or node.target != first.target:  # two readers of one stored tensor are no duplicates
            yield node, first


def _key(ir: Program, node: Node, same: dict[Node, Node]) -> Hashable | None:
    if not node.users:
        return None
    if node.op == "get_attr":
        name = str(node.target)
        return ("tensor", ir.kinds[name], tensor_digest(ir.tensors[name]))
    if node.op != "call_function" or dialect.is_opaque(node):
        return None
    if dialect.checks_at_run_time(node) or dialect.is_random(node):
        return None
    keys = () if isinstance(node.target, torch._ops.OpOverload) else tuple(sorted(node.kwargs))
    return ("call", node.target, keys, _frozen(dialect.operands(node), same))


def _frozen(value: Any, same: dict[Node, Node]) -> Hashable:
    if isinstance(value, Node):
        return same.get(value, value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, same) for v in value)
    if isinstance(value, torch.SymInt):
        return ("size", str(value.node.expr))
    # By type and text: 1, 1.0 and True are equal and hash alike, and so do 0.0 and -0.0, but they mean other things.
    return (type(value).__name__, repr(value))
