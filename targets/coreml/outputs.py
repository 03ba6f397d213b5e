"""Outputs that are inputs, or one value twice: Core ML gives a value one name, so each becomes a value of its own."""

from __future__ import annotations

import torch
from torch.fx import Node

from vlexport.ir.program import Program

aten = torch.ops.aten


def shared_outputs(program: Program) -> tuple[int, ...]:
    """Positions of outputs that are no call's value, or one that an earlier output has."""
    results = program.results
    return tuple(i for i, node in enumerate(results) if node.op != "call_function" or node in results[:i])


def with_own_outputs(program: Program) -> Program:
    """A copy in which every output is computed by a call of its own, ``value · 1`` where there was none."""
    positions = shared_outputs(program)
    if not positions:
        return program
    changed = program.copy()
    results = list(changed.results)
    for i in positions:
        results[i] = _own(changed, results[i])
    changed.output.args = (tuple(results),)
    return changed


def _own(program: Program, node: Node) -> Node:
    calls = program.calls()
    source = node if node.op == "call_function" or not calls else calls[-1]
    dtype = node.meta["val"].dtype
    if dtype is torch.bool:
        return program.add_call(aten.logical_or.default, (node, node), before=program.output, value_of=source)
    return program.add_call(
        aten.mul.Tensor, (node, 1.0 if dtype.is_floating_point else 1), before=program.output, value_of=source
    )
