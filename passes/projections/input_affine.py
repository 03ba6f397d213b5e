"""Arithmetic per channel between an input of the graph and the convolutions that read it: ``f · x + o``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import as_number, same_shape

_MUL, _DIV = ("aten.mul.Tensor", "aten.mul.Scalar"), ("aten.div.Tensor", "aten.div.Scalar")
_ADD, _SUB = ("aten.add.Tensor", "aten.add.Scalar"), ("aten.sub.Tensor", "aten.sub.Scalar")
_REVERSED = {"aten.rsub.Tensor": "aten.sub.Tensor", "aten.rsub.Scalar": "aten.sub.Scalar"}
STEPS = (*_MUL, *_DIV, *_ADD, *_SUB, *_REVERSED)
_MOVES = (
    "aten.permute.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.flip.default", "aten.slice.Tensor",
    "aten.select.int", "aten.index_select.default", "aten.pad.default", "aten.constant_pad_nd.default",
)  # fmt: skip
"""What may stand in front: an image is turned, cut, padded, or its colours are put in another order."""


@dataclass(frozen=True)
class InputAffine:
    """Steps from a value close to an input to what the convolutions read.

    Attributes:
        root: The value.
        steps: The calls, first to last.
        factor: Float64 of shape (C,).
        offset: Likewise, added after the factor.
    """

    root: Node
    steps: tuple[Node, ...]
    factor: Tensor
    offset: Tensor


def input_affine(ir: Program, last: Node, axis: int) -> InputAffine | None:
    """The steps that end at ``last``; None where they do not begin at an input, or change shape or dtype.

    Args:
        ir: The Program.
        last: What convolutions read.
        axis: Of its channels.
    """
    nodes: list[Node] = []
    node: Any = last
    while isinstance(node, Node) and dialect.op_name(node) in STEPS and (node is last or len(node.users) == 1):
        step = _step(ir, node, axis)
        if step is None:
            break
        nodes.insert(0, node)
        node = step.value
    if not nodes or not _is_input(node):
        return None
    mine, made = node.meta["val"], last.meta["val"]
    if not same_shape(mine.shape, made.shape) or mine.dtype != made.dtype:
        return None
    channels = int(made.shape[axis])
    found = InputAffine(
        node, tuple(nodes), torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    )
    for each in nodes:
        step = _step(ir, each, axis)
        assert step is not None
        found = replace(
            found, factor=found.factor * step.factor, offset=found.offset * step.factor + step.offset
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class _Step:
    """``factor · value + offset``, of one call."""

    value: Node
    factor: Tensor
    offset: Tensor


def _step(ir: Program, node: Node, axis: int) -> _Step | None:
    name = dialect.op_name(node)
    left, right, *rest = dialect.operands(node)
    if name in _REVERSED:
        left, right, name = right, left, _REVERSED[name]
    alpha = float(rest[0]) if rest else 1.0
    size, rank = int(node.meta["val"].shape[axis]), int(node.meta["val"].ndim)
    one, zero = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    by = _vector(ir, right, axis, rank, size)
    if isinstance(left, Node) and by is not None:
        if name in _MUL:
            return _Step(left, one * by, zero)
        if name in _DIV:
            return _Step(left, one / by, zero) if bool(by.all()) else None
        return _Step(left, one, by * (alpha if name in _ADD else -alpha))
    of = _vector(ir, left, axis, rank, size)
    if not isinstance(right, Node) or of is None or name in _DIV:
        return None
    if name in _MUL:
        return _Step(right, one * of, zero)
    return _Step(right, one * (alpha if name in _ADD else -alpha), zero + of)


def _vector(ir: Program, operand: Any, axis: int, rank: int, size: int) -> Tensor | None:
    """A number, or a stored tensor that has one for each channel, as float64 of shape (C,)."""
    number = as_number(ir, operand)
    if number is not None:
        return torch.full((size,), number, dtype=torch.float64)
    tensor = ir.tensor_of(operand)
    if tensor is None or not tensor.is_floating_point() or tensor.ndim > rank:
        return None
    sizes = [1] * (rank - tensor.ndim) + list(tensor.shape)
    if any(each != 1 for i, each in enumerate(sizes) if i != axis) or sizes[axis] != size:
        return None
    return tensor.double().flatten()


def _is_input(node: Any) -> bool:
    """Whether a value is an input, perhaps cast, cut, turned or padded."""
    while isinstance(node, Node) and node.op == "call_function":
        if dialect.op_name(node) not in _MOVES and not dialect.is_cast(node):
            return False
        node = node.args[0]
    return isinstance(node, Node) and node.op == "placeholder"
