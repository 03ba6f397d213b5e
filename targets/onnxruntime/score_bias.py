"""score_bias: what is added to the scores of attention, as com.microsoft.Attention takes it.

The oldest ONNX Runtime that we write for reads it only in full, (batch, heads, length, length); with less, it reads
past the end of it. So dims of size 1 are expanded; layers that share one share that, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir

from vlexport.targets.onnx.attention_site import Site
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnx.rewriting import insert, stored

_NOTHING = -1e9
"""What is masked by this or less weighs nothing behind the softmax, whatever the scores."""


def content(value: onnx_ir.Value) -> np.ndarray | None:
    """A stored bias; None for a computed one."""
    return None if value.const_value is None else np.asarray(value.const_value.numpy())


def is_causal(bias: np.ndarray) -> bool:
    """Whether a stored bias lets each position look at itself and those before it, and does nothing else."""
    length = bias.shape[-1]
    if length < 2 or bias.shape[-2:] != (length, length) or bias.size != length * length:
        return False  # a number a key, or a triangle over heads and keys
    square = bias.reshape(length, length)
    later = np.triu(np.ones((length, length), bool), 1)
    return bool((square[~later] == 0).all() and (square[later] <= _NOTHING).all())


def may_mask_whole_rows(bias: onnx_ir.Value) -> bool:
    """Whether a position may be left with nothing to look at."""
    known = content(bias)
    return known is None or bool(np.isneginf(known).all(-1).any())


def is_same_for_all_heads(bias: onnx_ir.Value) -> bool:
    """Whether it has no dim of heads."""
    return bias.shape is not None and (len(bias.shape) < 3 or bias.shape[-3] == 1)


def expanded(
    model: OnnxModel, found: Site, queries: onnx_ir.Value, keys: onnx_ir.Value, before: onnx_ir.Node
) -> onnx_ir.Value:
    """The bias over batch, heads and both lengths.

    Args:
        model: Changed in place.
        found: What it is added to.
        queries: Has as many positions as there are queries: (batch, length, depth).
        keys: The same of keys.
        before: Nodes are put in front of this one.
    """
    bias = found.bias
    assert bias is not None
    assert bias.shape is not None
    assert queries.shape is not None
    assert keys.shape is not None
    wanted = (queries.shape[0], found.heads, queries.shape[1], keys.shape[1])
    own = [1] * (4 - len(bias.shape)) + list(bias.shape)
    short = [mine == 1 and full != 1 for mine, full in zip(own, wanted, strict=True)]
    if not any(short) and len(bias.shape) == 4:
        return bias
    sizes = [each if grows else 1 for each, grows in zip(wanted, short, strict=True)]
    named = all(isinstance(each, int) for each in sizes)
    name = f"{bias.name}_over_{'_'.join(map(str, sizes)) if named else queries.name}"
    made = next((user for user, _ in bias.uses() if user.name == name and user.op_type == "Expand"), None)
    if made is None:
        values = (queries, keys)
        shape = _stored_shape(model, name, sizes) if named else _shape(model, found, values, sizes, before, name)
        made = insert(model, before, "Expand", [bias, shape], origin=found.softmax, name=name)
        made.outputs[0].type = bias.type
    return made.outputs[0]


def dead_rows(model: OnnxModel, found: Site, before: onnx_ir.Node) -> onnx_ir.Value:
    """Positions that have nothing to look at: (batch or 1, length, 1)."""
    bias = found.bias
    assert bias is not None
    assert bias.shape is not None
    name, rank = f"{bias.name}_masked", len(bias.shape)
    last = next((user for user, _ in bias.uses() if user.name == f"{name}_most"), None)
    if last is None:
        axis = stored(model, f"{name}_axis", np.array([-1], np.int64))
        last = insert(model, before, "ReduceMax", [bias, axis], origin=found.softmax, name=f"{name}_most")
        last.outputs[0].type = bias.type
        most = last.outputs[0]
        if rank > 2:
            heads = stored(model, f"{name}_heads", np.array([rank - 3], np.int64))
            most = insert(model, before, "Squeeze", [most, heads], origin=found.softmax, name=f"{name}_row").outputs[0]
            most.type = bias.type
        test = insert(
            model, before, "IsInf", [most], attributes={"detect_positive": 0}, origin=found.softmax, name=f"{name}_all"
        )
        test.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.BOOL)
    while last.op_type != "IsInf":
        last = next(user for user, _ in last.outputs[0].uses())
    return last.outputs[0]


def _stored_shape(model: OnnxModel, name: str, sizes: Sequence[object]) -> onnx_ir.Value:
    return stored(model, f"{name}_shape", np.array(sizes, np.int64))


def _shape(
    model: OnnxModel, found: Site, values: tuple[onnx_ir.Value, onnx_ir.Value], sizes: Sequence[object],
    before: onnx_ir.Node, name: str,
) -> onnx_ir.Value:  # fmt: skip
    """The same where a size is known at run time alone: that of queries or, in the last dim, of keys."""
    parts: list[onnx_ir.Value] = []
    for axis, (size, at) in enumerate(zip(sizes, (0, 0, 1, 1), strict=True)):
        value = values[axis == 3]
        if isinstance(size, int):
            parts.append(stored(model, f"{name}_size_{axis}", np.array([size], np.int64)))
            continue
        cut = {"start": at, "end": at + 1}
        made = insert(model, before, "Shape", [value], attributes=cut, origin=found.softmax, name=f"{name}_dim_{axis}")
        parts.append(made.outputs[0])
    whole = insert(model, before, "Concat", parts, attributes={"axis": 0}, origin=found.softmax, name=f"{name}_shape")
    for each in (*parts, whole.outputs[0]):
        each.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    return whole.outputs[0]
