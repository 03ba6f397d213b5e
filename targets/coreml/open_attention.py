"""Attention whose batch has a range, where coremltools takes the batches of its operands for different sizes.

coremltools gives every reshape to an open size a new symbol, and its attention of iOS 18 wants one for queries, keys
and values. Its product of matrices does not ask.
Source: coremltools 9.0, converters/mil/mil/ops/defs/iOS18/transformers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect

aten = torch.ops.aten
_MOVES = ("aten.permute.default", "aten.unbind.int", "aten.expand.default", "operator.getitem", "aten.split.Tensor",
          "aten.split_with_sizes.default", "aten.slice.Tensor", "aten.select.int")  # fmt: skip


def is_uneven(attention: Node) -> bool:
    """Whether coremltools sees several sizes where there is one.

    The operands' batches come from several reshapes, or a mask of that batch is chosen from two numbers: of that choice
    coremltools records no shape.
    """
    operands: list[Any] = list(attention.args[:3])
    shapes = [each.meta["val"].shape for each in operands]
    if not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape[:-2]):
        return False
    return len({_origin(each) for each in operands}) > 1 or _is_chosen(dialect.operands(attention)[3])


def _is_chosen(mask: Any) -> bool:
    """Whether a mask of open size is a ``where``, or will be spelled as one."""
    if mask is None or not any(isinstance(size, torch.SymInt) for size in mask.meta["val"].shape):
        return False
    while dialect.op_name(mask) in (*_MOVES, "aten.reshape.default", "aten.unsqueeze.default"):
        mask = mask.all_input_nodes[0]
    return mask.meta["val"].dtype is torch.bool or dialect.op_name(mask).startswith("aten.where.")


def _origin(node: Node) -> Node | None:
    """The reshape that an operand's sizes were made by; None where they are the input's own."""
    while node.op == "call_function":
        if dialect.op_name(node) == "aten.reshape.default":
            return node
        row = dialect.info(node)
        if dialect.op_name(node) not in _MOVES and (row is None or row.category != "elementwise"):
            return None
        node = node.all_input_nodes[0]
    return None


def as_products(emit: Callable[..., Any], query: Node, key: Node, value: Node, mask: Node | None, scale: float) -> Node:
    """``softmax(scale · q kᵀ + mask) v``, call by call."""
    factor = emit(aten.full.default, [], scale, dtype=query.meta["val"].dtype)
    rank = key.meta["val"].ndim
    turned = emit(aten.permute.default, key, [*range(rank - 2), rank - 1, rank - 2])
    scores = emit(aten.matmul.default, emit(aten.mul.Tensor, query, factor), turned)
    if mask is not None:
        scores = emit(aten.add.Tensor, scores, mask)
    made: Node = emit(aten.matmul.default, emit(aten.softmax.int, scores, -1), value)
    return made
