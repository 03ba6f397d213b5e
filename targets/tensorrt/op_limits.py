"""Limits of TensorRT's operators that a type cannot express: one small function each, beside its source.

A function takes a node and says why TensorRT refuses it, or returns an empty string. Every one of them was seen to fire
and not to fire by compiling single-node models with tensorrt-rtx 1.7.1.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir

from vlexport.core.artifact import Array

Limit = Callable[[onnx_ir.Node], str]

MAX_RANK = 8
"""Source: TensorRT API, Dims64::MAX_DIMS."""
MAX_TOP_K = 3840
"""Source: TensorRT operators documentation, TopK: k <= 3840."""

CONSTANT_INPUTS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
         "ReduceProd", "ReduceSum", "ReduceSumSquare", "Squeeze", "Unsqueeze"), (1, "axes"),
    ),
    "CumSum": (1, "axis"),
    "OneHot": (1, "depth"),
}  # fmt: skip
"""Operator → an input that must be known when the engine is built. Source: onnx-tensorrt, docs/operators.md."""


def too_many_dims(node: onnx_ir.Node) -> str:
    """A value of more than eight dims."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.shape is not None and len(value.shape) > MAX_RANK:
            return f"{value.name} has {len(value.shape)} dims, TensorRT takes up to {MAX_RANK}"
    return ""


def unknown_input(node: onnx_ir.Node) -> str:
    """An operand that must be constant and is computed."""
    position, role = CONSTANT_INPUTS.get(node.op_type, (0, ""))
    if not role or len(node.inputs) <= position or node.inputs[position] is None:
        return ""
    return "" if _is_constant(node.inputs[position]) else f"its {role} must be constant"


def top_k(node: onnx_ir.Node) -> str:
    """More elements than a TopK layer keeps; a computed K is checked by the runtime."""
    found = _constant(node, 1)
    k = 0 if found is None else int(found.flatten()[0])
    return f"k is {k}, TensorRT takes up to {MAX_TOP_K}" if k > MAX_TOP_K else ""


def resize(node: onnx_ir.Node) -> str:
    """Antialiasing. Source: onnx-tensorrt, docs/operators.md."""
    return "antialiasing is not supported" if _integer(node, "antialias") else ""


def pooling(node: onnx_ir.Node) -> str:
    """Dilations, and indices as a second output. Source: onnx-tensorrt, docs/operators.md."""
    found = node.attributes.get("dilations")
    if found is not None and any(each != 1 for each in found.as_ints()):
        return "dilations other than 1 are not supported"
    return _only_first_output(node)


def layer_norm(node: onnx_ir.Node) -> str:
    """Mean and deviation as outputs. Source: onnx-tensorrt, docs/operators.md."""
    return _only_first_output(node)


def reduction(node: onnx_ir.Node) -> str:
    """Scattering that sums. Source for ScatterND: onnx-tensorrt, docs/operators.md; for ScatterElements on TensorRT for
    RTX: the parser of tensorrt-rtx 1.7.1.
    """
    found = node.attributes.get("reduction")
    kind = found.as_string() if found is not None else "none"
    return "" if kind == "none" else f"reduction '{kind}' is not supported"


def zero_point(node: onnx_ir.Node) -> str:
    """Asymmetric quantization. Source: onnx-tensorrt, docs/operators.md: the zero point must be 0."""
    found = _constant(node, 2)
    if found is None or not found.any():
        return ""
    return "its zero point is not 0: TensorRT takes symmetric quantization only"


LIMITS: dict[str, Limit] = {
    "AveragePool": pooling,
    "DequantizeLinear": zero_point,
    "LayerNormalization": layer_norm,
    "LpPool": pooling,
    "MaxPool": pooling,
    "QuantizeLinear": zero_point,
    "Resize": resize,
    "ScatterND": reduction,
    "TopK": top_k,
}
RTX_LIMITS: dict[str, Limit] = {"ScatterElements": reduction}
"""What TensorRT for RTX refuses beside them: TensorRT itself has a plugin for it."""
EVERYWHERE: tuple[Limit, ...] = (too_many_dims, unknown_input)


def _only_first_output(node: onnx_ir.Node) -> str:
    used = any(value.name and (value.uses() or value.is_graph_output()) for value in node.outputs[1:])
    return "only its first output is supported" if used else ""


def _integer(node: onnx_ir.Node, name: str) -> int:
    found = node.attributes.get(name)
    return found.as_int() if found is not None else 0


def _is_constant(value: onnx_ir.Value | None) -> bool:
    if value is None:
        return True
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _constant(node: onnx_ir.Node, position: int) -> Array | None:
    value = node.inputs[position] if len(node.inputs) > position else None
    found = onnx_ir.convenience.get_const_tensor(value) if value is not None else None
    return found.numpy() if found is not None else None
