"""Everything that reads a norm's result, seen through what treats each channel for itself.

A scale and a shift per channel can go past a view that leaves the axis of the channels alone or only moves it, past a
choice of tokens, and past a mean over tokens: ``f(g · x + b) = g · f(x) + b`` for each of them.
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
        projections: Linears and convolutions over the channels, each once.
        passed: Views and means on the way, in the order of the graph.
    """

    projections: tuple[Projection, ...]
    passed: tuple[Node, ...]


def readers_of(ir: Program, norm: Node) -> Readers | tuple[Node, str]:
    """The projections that read ``norm``, or the first node that is none, and why."""
    projections: dict[Node, Projection] = {}
    passed: dict[Node, None] = {}
    pending = [(norm, int(norm.meta["val"].ndim) - 1)]
    while pending:
        node, axis = pending.pop()
        for user in node.users:
            if user.op == "output":
                return node, f"the {dialect.plain_name(node)}'s value is an output"
            if user in projections or user in passed:
                continue
            moved = channels_behind(user, node, axis)
            if moved is not None:
                passed[user] = None
                pending.append((user, moved))
                continue
            found = projection_of(ir, user)
            if isinstance(found, str):
                return user, found or f"the {dialect.plain_name(node)}'s output is read by {dialect.plain_name(user)}"
            reason = _why_no_reader(ir, found, node, axis)
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


def _why_no_reader(ir: Program, found: Projection, value: Node, axis: int) -> str:
    others = [place for place, each in enumerate(dialect.operands(found.node)) if each is value and place != found.x]
    if others:
        return f"the {dialect.plain_name(value)}'s output is the {dialect.plain_name(found.node)}'s other operand"
    rank = int(value.meta["val"].ndim)
    if axis != (found.channel_axis if found.is_convolution else rank - 1):
        return f"the {dialect.plain_name(found.node)}'s channels lie on another axis than the norm's"
    return why_kept(ir, found)


def channels_behind(node: Node, value: Node, axis: int) -> int | None:
    """The axis of the channels in ``node``; None where it does more than move ``value``, pick from it, or average it.

    Args:
        node: What reads ``value``.
        value: Has its channels on ``axis``.
        axis: ≥ 0. On another one than the last, only a permute and a choice among several results are seen through.
    """
    name = dialect.op_name(node)
    if name == "operator.getitem":
        return axis - 1 if dialect.op_name(value) == "aten.unbind.int" else axis
    if node.args[:1] != (value,):
        return None
    rank = int(value.meta["val"].ndim)
    named: dict[str, Any] = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=False))
    if name == "aten.permute.default":
        return [int(dim) % rank for dim in named["dims"]].index(axis)
    if axis != rank - 1 or not _keeps_last(node, value, name, named):
        return None
    made = node.meta["val"]
    return axis if isinstance(made, (list, tuple)) else int(made.ndim) - 1


def _keeps_last(node: Node, value: Node, name: str, named: dict[str, Any]) -> bool:
    rank = int(value.meta["val"].ndim)
    if name == "aten.reshape.default":
        sizes = [each.meta["val"].shape[-1] if each.meta["val"].ndim else 0 for each in (value, node)]
        return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1] and sizes[0] > 1
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
