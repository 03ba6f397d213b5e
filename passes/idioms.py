"""Ideas that ATen has no operator for, in the one spelling that the raising passes leave: made and recognised here.

Quick GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)::

    %1 = mul(x, 1.702)
    %2 = sigmoid(%1)
    %3 = mul(x, %2)

L2 normalization, with the smallest norm to divide by, or without one::

    %1 = linalg_vector_norm(x, 2, dims, keepdim=True)
    %2 = clamp_min(%1, eps)
    %3 = div(x, %2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import Failed, Found, as_number, bind, constant, match, number, op

aten = torch.ops.aten
QUICK_GELU_SLOPE = 1.702

QUICK_GELU = op(
    "aten.mul.Tensor",
    bind("x"),
    op("aten.sigmoid.default", op("aten.mul.Tensor", bind("x"), constant("slope", QUICK_GELU_SLOPE))),
    noun="quick GELU",
)
"""``x · sigmoid(1.702 x)``."""

_VECTOR_NORM = op(
    "aten.linalg_vector_norm.default", bind("x"), constant("order", 2), bind("dims"), constant("keepdim", True),
    constant("dtype", None), name="norm",
)  # fmt: skip
L2_NORMALIZE = (
    op("aten.div.Tensor", bind("x"), _VECTOR_NORM, noun="L2 normalization"),
    op("aten.div.Tensor", bind("x"), op("aten.clamp_min.default", _VECTOR_NORM, number("eps"))),
)
"""``x / ‖x‖`` and ``x / max(‖x‖, eps)``."""


@dataclass(frozen=True)
class L2Normalized:
    """A value divided by its norm.

    Attributes:
        x: The value.
        dims: Axes that the norm is taken over, each ≥ 0, in order.
        eps: The smallest norm to divide by; 0 for none.
        nodes: The calls, operands before readers.
    """

    x: Node
    dims: tuple[int, ...]
    eps: float
    nodes: tuple[Node, ...]


def quick_gelu(program: Program, node: Node) -> Found | Failed:
    """Whether ``node`` is the last call of a quick GELU, of ``x`` in what is found."""
    return match(program, QUICK_GELU, node)


def l2_normalized(program: Program, node: Node) -> L2Normalized | None:
    """The L2 normalization whose last call is ``node``, or None."""
    for pattern in L2_NORMALIZE:
        found = match(program, pattern, node)
        if isinstance(found, Found):
            rank = found["x"].meta["val"].ndim
            dims = tuple(found["dims"] or ())
            if dims and dims == axes(dims, rank):
                eps = as_number(program, found.bound.get("eps", 0.0))
                return L2Normalized(found["x"], dims, eps or 0.0, found.nodes)
    return None


def axes(dims: Any, rank: int) -> tuple[int, ...]:
    """Axes as they are counted from 0, in order; none given, or an empty list, means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(rank))
    return tuple(sorted(int(d) % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)))


def spell_quick_gelu(ir: Program, x: Node, *, before: Node, merges: Sequence[Node]) -> Node:
    """Quick GELU of ``x``, in place of ``before``."""
    scaled = ir.add_call(
        aten.mul.Tensor, (x, QUICK_GELU_SLOPE), before=before, value_of=before, merges=merges
    )  # fmt: skip
    gate = ir.add_call(aten.sigmoid.default, (scaled,), before=before, value_of=before, merges=merges)
    return ir.add_call(aten.mul.Tensor, (x, gate), before=before, value_of=before, merges=merges)


def spell_l2_normalize(
    ir: Program, x: Node, dims: Sequence[int], eps: float, *, before: Node, merges: Sequence[Node]
) -> Node:
    """L2 normalization of ``x``, in place of ``before``; ``eps`` 0 for none."""
    norm = ir.add_call(
        aten.linalg_vector_norm.default, (x, 2, list(dims), True), before=before, value_of=before, merges=merges
    )
    if eps > 0.0 and math.isfinite(eps):
        norm = ir.add_call(aten.clamp_min.default, (norm, eps), before=before, value_of=before, merges=merges)
    return ir.add_call(aten.div.Tensor, (x, norm), before=before, value_of=before, merges=merges)


def is_spelled(program: Program, node: Node) -> bool:
    """Whether ``node`` is the last call of one of these ideas in its one spelling."""
    if dialect.op_name(node) == "aten.mul.Tensor":
        return isinstance(quick_gelu(program, node), Found)
    return dialect.op_name(node) == "aten.div.Tensor" and l2_normalized(program, node) is not None
