"""Seeded input values for a Program: probes of the gate, golden vectors, the example inside a saved file.

Floats are standard normal (what normalised images look like), ids stay inside the vocabulary of the embedding that
reads them. Booleans, and whole numbers that no embedding reads, are masks: they hide nothing, or at random, but never
the first place of a row. Of a row that is hidden as a whole, runtimes make different things: PyTorch's attention gives
zeros, the operators of ONNX NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.hiding import hides
from vlexport.ir.program import Program

_KEPT_SHARE = 0.7
_MASK = 2
"""Values of a mask in whole numbers."""
_BYTE = 256
"""Values of a photo's byte."""


def draw(
    program: Program, generator: torch.Generator, dims: Mapping[str, int], *, masks: bool = False
) -> tuple[torch.Tensor, ...]:
    """One value per input, with the dynamic dims set to ``dims``.

    Args:
        program: Its inputs are drawn.
        generator: Source of randomness.
        dims: Size of every dynamic dim.
        masks: Draw booleans at random; otherwise they hide nothing.
    """
    values = []
    for node, spec in zip(program.placeholders, program.signature.inputs, strict=True):
        shape = tuple(dims[d] if isinstance(d, str) else d for d in spec.shape)
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point:
            values.append(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype))
        elif dtype is torch.bool:
            kept = torch.ones(shape, dtype=torch.bool)
            if masks and shape:
                kept = torch.rand(shape, generator=generator) < _KEPT_SHARE
                kept[..., :1] = True
            values.append(~kept if hides(program, node) else kept)
        else:
            rows, photo = vocabulary(program, node), dtype is torch.uint8
            high = (_BYTE if photo else _MASK) if rows is None else rows
            value = torch.randint(0, high, shape, generator=generator, dtype=torch.int64).to(dtype)
            if rows is None and not photo and shape:
                value[..., :1] = 1
            values.append(value)
    return tuple(values)


def vocabulary(program: Program, node: Node) -> int | None:
    """Rows of the smallest embedding that reads ``node`` through views and casts; None when there is none."""
    found: list[int] = []
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if dialect.op_name(user) == "aten.embedding.default":
                found.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
            elif user not in seen and dialect.carries_on(user):
                seen.add(user)
                pending.append(user)
    return min(found, default=None)
