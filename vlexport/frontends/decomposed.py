"""Models that PyTorch's own tools quantized: ``quantized_decomposed`` becomes our operators.

Before → after::

    %0 = quantized_decomposed.quantize_per_tensor(x, 0.02, 3, 0, 255, u8)       %0 = quantize(x, @scale, @zero_point)
    %1 = quantized_decomposed.dequantize_per_tensor(%0, 0.02, 3, 0, 255, u8) →  %1 = dequantize(%0, @scale, @zero_point)

Theirs multiply by 1 / scale, ours divide, as ONNX does: a value at a tie may become the neighbouring integer. What is
quantized from stored tensors alone is computed here, by theirs, bit for bit.

Refused: ranges found at run time, scales that are no stored tensors, dtypes that no target has, and where a value is
quantized at run time limits narrower than the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.errors import CaptureError
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import DEQUANTIZE, QUANTIZE, STORED

NAMESPACE = "quantized_decomposed."
OPERATORS = frozenset(
    {"quantize_per_tensor.default", "quantize_per_tensor.tensor", "quantize_per_tensor.tensor2"}
    | {"dequantize_per_tensor.default", "dequantize_per_tensor.tensor", "dequantize_per_tensor.tensor2"}
    | {"quantize_per_channel.default", "dequantize_per_channel.default"}
)
"""What is understood of it."""
NOTE = "the model is quantized already, and stays so; a value at a tie may become the neighbouring integer"


def understands(node: Node) -> bool:
    """Whether a call is one that :func:`own_quantization` replaces."""
    name = dialect.op_name(node)
    return name.startswith(NAMESPACE) and name.removeprefix(NAMESPACE) in OPERATORS


def own_quantization(program: Program) -> int:
    """Replace every call of :data:`OPERATORS`, in place; returns how many there were.

    Raises:
        CaptureError: VLX0307 naming the call and what is not understood about it.
    """
    found = [node for node in program.calls() if understands(node)]
    for node in found:
        operands = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
        if dialect.op_name(node).startswith(f"{NAMESPACE}quantize"):
            _quantize(program, node, operands)
        else:
            _dequantize(program, node, operands)
    return len(found)


def _quantize(program: Program, node: Node, operands: dict[str, Any]) -> None:
    stored = program.tensor_of(operands["input"])
    if stored is not None:
        target: Any = node.target
        values = [each if (held := program.tensor_of(each)) is None else held for each in dialect.operands(node)]
        made = program.add_tensor(f"{operands['input'].target}_quantized", target(*values), before=node, kind="buffer")
        program.replace(node, made)
        return
    low, high = (_number(program, node, operands[name]) for name in ("quant_min", "quant_max"))
    dtype = _dtype(node, operands)
    info = torch.iinfo(dtype)
    if (low, high) != (info.min, info.max):
        raise _refused(node, f"its limits are {low:g} and {high:g}, those of {dtype} are {info.min} and {info.max}")
    scale, point = _scale_and_point(program, node, operands, dtype, torch.float32)
    made = program.add_call(QUANTIZE, (operands["input"], scale, point, *_axis(operands)), before=node, value_of=node)
    program.replace(node, made)


def _dequantize(program: Program, node: Node, operands: dict[str, Any]) -> None:
    scale, point = _scale_and_point(program, node, operands, _dtype(node, operands), node.meta["val"].dtype)
    given = (operands["input"], scale, point, *_axis(operands))
    program.replace(node, program.add_call(DEQUANTIZE, given, before=node, value_of=node))


def _axis(operands: dict[str, Any]) -> tuple[int, ...]:
    return (operands["axis"],) if "axis" in operands else ()


def _dtype(node: Node, operands: dict[str, Any]) -> torch.dtype:
    found: torch.dtype = operands["dtype"]
    if found not in STORED or found.is_floating_point:
        raise _refused(node, f"no target stores {found}")
    return found


def _scale_and_point(
    program: Program, node: Node, operands: dict[str, Any], dtype: torch.dtype, floats: torch.dtype
) -> tuple[Node, Node]:
    """Stored beside the call, in the dtypes of the integers and of the floats."""
    scale, point = (operands.get(f"{name}s", operands.get(name)) for name in ("scale", "zero_point"))
    scales = _values(program, node, scale)
    points = torch.zeros_like(scales) if point is None else _values(program, node, point)
    if not (scales > 0.0).all():
        raise _refused(node, "a scale is not positive")
    stem = provenance.module_path(node).replace(".", "_") or "quantized"
    return (
        program.add_tensor(f"{stem}_scale", scales.to(floats), before=node, kind="buffer"),
        program.add_tensor(f"{stem}_zero_point", points.to(dtype), before=node, kind="buffer"),
    )


def _values(program: Program, node: Node, given: Any) -> Tensor:
    if isinstance(given, (int, float)):
        return torch.tensor(given, dtype=torch.float64)
    stored = program.tensor_of(given)
    if stored is None:
        raise _refused(node, "its scale is found at run time")
    whole = "per_channel" not in dialect.op_name(node)
    return stored.double().reshape(()) if whole else stored.double()


def _number(program: Program, node: Node, given: Any) -> float:
    return float(_values(program, node, given))


def _refused(node: Node, why: str) -> CaptureError:
    return CaptureError(
        "VLX0307", f"the model is quantized already, in a way that is not kept: {dialect.op_name(node)}: {why}",
        where=provenance.describe(node),
        hint="give the model from before quantization, and choose a precision with --precision",
    )  # fmt: skip
