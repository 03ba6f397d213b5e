"""What a Program costs: multiply-accumulates, parameters and bytes.

One MAC is one multiplication with its addition, as papers and timm count them; elementwise work, norms and softmax
count nothing. Opaque ops are listed, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program


@dataclass(frozen=True)
class Cost:
    """Cost of one run.

    Attributes:
        macs: Multiply-accumulates at the given dims.
        parameters: Elements of all floating tensors in use.
        size_bytes: Bytes of all tensors in use.
        opaque: Names of ops whose MACs are unknown.
    """

    macs: int
    parameters: int
    size_bytes: int
    opaque: tuple[str, ...]


def cost(program: Program, dims: Mapping[str, int] | None = None) -> Cost:
    """Cost with every dynamic dim at its ``opt``, or at ``dims``."""
    dims = dims or {}
    return Cost(
        macs=sum(node_macs(program, node, dims) for node in program.calls()),
        parameters=sum(t.numel() for t in program.used_tensors().values() if t.is_floating_point()),
        size_bytes=program.size_bytes,
        opaque=tuple(sorted({dialect.op_name(n) for n in program.calls() if dialect.is_opaque(n)})),
    )


def node_macs(program: Program, node: Node, dims: Mapping[str, int]) -> int:
    """MACs of one call; 0 for anything without a rule."""
    row = dialect.info(node)
    if row is None or row.macs is None:
        return 0
    operands: list[Sequence[int]] = [
        program.sizes(a.meta["val"].shape, dims)
        for a in node.args
        if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)
    ]
    return row.macs(operands, program.sizes(node.meta["val"].shape, dims))
