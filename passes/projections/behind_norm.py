"""Everything that reads a norm's result, seen through what treats each channel for itself.

A scale and a shift per channel of the last axis can go past a view that leaves this axis alone, past a choice of
tokens, and past a mean over tokens: ``f(g · x + b) = g · f(x) + b`` for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.projections.projection import Projection, projection_of, why_kept

_BY_DIM = (
    "aten.select.int", "aten.slice.Tensor", "aten.narrow.default", "aten.flip.default", "aten.roll.default",
    "aten.index_select.default", "aten.mean.dim", "aten.unbind.int", "aten.split.Tensor",
    "aten.split_with_sizes.default", "aten.chunk.default", "aten.squeeze.dim", "aten.squeeze.dims",
)  # fmt: skip
_DIMS = ("dim", "dims")


@dataclass(frozen=True)
class Readers:
    """Who reads a value in the end.

    Attributes:
        projections: Linears, each once.
        passed: Views and means on the way, in the order of the graph.
    """

    projections: tuple[Projection, ...]
    passed: tuple[Node, ...]


def readers_of(ir: Program, norm: Node) -> Readers | tuple[Node, str]:
    """The projections that read ``norm``, or the first node that is none, and why."""
    projections: dict[Node, Projection] = {}
    passed: dict[Node, None] = {}
    pending = [norm]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "output":
                return node, f"the {dialect.plain_name(node)}'s value is an output"
            if user in projections or user in passed:
                continue
            if keeps_channels(user, node):
                passed[user] = None
                pending.append(user)
                continue
            found = projection_of(ir, user)
            if isinstance(found, str):
                return user, found or f"the {dialect.plain_name(node)}'s output is read by {dialect.plain_name(user)}"
            reason = _why_no_reader(ir, found, node)
            if reason:
                return user, reason
            projections[user] = found
    if not projections:
        return norm, "no linear reads it"
    order = {node: i for i, node in enumerate(ir.graph.nodes)}
    return Readers(
        tuple(sorted(projections.values(), key=lambda each: order[each.node])),
        tuple(sorted(passed, key=order.__getitem__)),
    )


def _why_no_reader(ir: Program, found: Projection, value: Node) -> str:
    if found.is_convolution:
        return f"the {dialect.plain_name(value)}'s output is read by a convolution, whose channels lie on another axis"
    others = [place for place, each in enumerate(dialect.operands(found.node)) if each is value and place != found.x]
    if others:
        return f"the {dialect.plain_name(value)}'s output is the {dialect.plain_name(found.node)}'s other operand"
    return why_kept(ir, found)


def keeps_channels(node: Node, value: Node) -> bool:
    """Whether ``node`` takes elements of ``value``, or means over them, and leaves the last axis as it is."""
    name = dialect.op_name(node)
    if name == "operator.getitem":
        return True
    if node.args[:1] != (value,):
        return False
    rank = int(value.meta["val"].ndim)
    named: dict[str, Any] = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=False))
    if name == "aten.reshape.default":
        sizes = [each.meta["val"].shape[-1] if each.meta["val"].ndim else 0 for each in (value, node)]
        return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1] and sizes[0] > 1
    if name == "aten.permute.default":
        return int(named["dims"][-1]) % rank == rank - 1
    if name == "aten.unsqueeze.default":
        return int(named["dim"]) % (rank + 1) != rank
    if name == "aten.expand.default":
        return bool(node.meta["val"].shape[-1] == value.meta["val"].shape[-1])
    if name not in _BY_DIM:
        return False
    dims = next((named[each] for each in _DIMS if each in named), None)
    if dims is None or dims == [] or (name == "aten.mean.dim" and not _keeps_dtype(node, value)):
        return False
    return all(int(dim) % rank != rank - 1 for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _keeps_dtype(node: Node, value: Node) -> bool:
    found: torch.dtype = node.meta["val"].dtype
    return bool(found == value.meta["val"].dtype)
