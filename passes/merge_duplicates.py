"""merge-duplicates: equal calls on equal operands become one; equal stored tensors become one.

Before → after::

    %1 = relu(x)
    %2 = relu(x)          →    %1 = relu(x)
    %3 = add(%1, %2)           %3 = add(%1, %1)

Does not apply when: an operator is random or checks something while it runs; two tensors differ in dtype, shape,
content or kind. Tensors are compared by digest, so a tied weight that was stored twice is stored once again.
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
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
            yield Match(node, (node, first), first)

    def apply(self, ir: Program, match: Match) -> Change:
        node, first = match.node, match.data
        where = (provenance.module_path(node),) if node.op == "call_function" else (str(node.target),)
        elements = 0
        if node.op == "get_attr" and node.target != first.target:
            elements = ir.tensors[str(node.target)].numel()
        name = "tensor" if node.op == "get_attr" else dialect.op_name(node).removeprefix("aten.").partition(".")[0]
        calls = ir.replace(node, first)
        return Change(what=f"duplicate {name} merged", where=where, saved_nodes=calls, saved_parameters=elements)


def duplicates(ir: Program) -> Iterator[tuple[Node, Node]]:
    """Pairs of a node and an earlier one that computes or stores the same."""
    seen: dict[Hashable, Node] = {}
    same: dict[Node, Node] = {}
    for node in ir.graph.nodes:
        key = _key(ir, node, same)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            same[node] = first
            yield node, first


def _key(ir: Program, node: Node, same: dict[Node, Node]) -> Hashable | None:
    if node.op == "get_attr":
        if not node.users:
            return None
        name = str(node.target)
        return ("tensor", ir.kinds[name], tensor_digest(ir.tensors[name]))
    if node.op != "call_function" or dialect.checks_at_run_time(node) or dialect.is_random(node):
        return None
    return ("call", node.target, _frozen(node.args, same), _frozen(sorted(node.kwargs.items()), same))


def _frozen(value: Any, same: dict[Node, Node]) -> Hashable:
    if isinstance(value, Node):
        return same.get(value, value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, same) for v in value)
    if isinstance(value, torch.SymInt):
        return ("size", str(value.node.expr))
    # 1, 1.0 and True are equal and hash alike, and do not mean the same to an operator.
    return (type(value).__name__, value if isinstance(value, Hashable) else repr(value))
