"""Whether a call of a quantization operator (``ir/quant_ops``) holds together: dtypes, axis, and shapes of scales.

torch's own operators check their operands; ours are checked here where a graph comes from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.quant_ops import STORED

_BITS = (4, 8)


def problem(node: Node) -> str:
    """Why a call cannot be computed; empty for a sound one and for any other operator."""
    name = dialect.op_name(node)
    if name == "vlexport.choose_qparams.default":
        value = _tensor(node.args[0]) if node.args else None
        return "" if value is not None and value.is_floating_point() else "it takes a tensor of floats"
    if name == "vlexport.look_up.default":
        return _look_up_problem(*map(_tensor, dialect.operands(node)[:2]))
    if name not in ("vlexport.quantize.default", "vlexport.dequantize.default"):
        return ""
    given = dialect.operands(node)
    value, scale, point = map(_tensor, given[:3])
    if value is None or scale is None or point is None:
        return "its value, scale or zero point is no tensor"
    stored = point.dtype if name == "vlexport.quantize.default" else value.dtype
    floats = (value, scale) if name == "vlexport.quantize.default" else (scale,)
    if stored not in STORED or point.dtype is not stored or not all(each.is_floating_point() for each in floats):
        return f"it does not take {value.dtype} with a scale of {scale.dtype} and a zero point of {point.dtype}"
    axis, block, bits = (*given[3:], 0, 8)[:3]
    if bits not in _BITS:
        return f"bits are {bits}, not 4 or 8"
    wanted = _shape(value, axis, block)
    if isinstance(wanted, str):
        return wanted
    shapes = {tuple(scale.shape), tuple(point.shape)}
    if shapes - {wanted} and not (axis is None and scale.numel() == point.numel() == 1):
        return f"scale and zero point have shapes {sorted(map(str, shapes))}, {wanted} is wanted"
    return ""


def _look_up_problem(places: torch.Tensor | None, tables: torch.Tensor | None) -> str:
    if places is None or tables is None or places.dtype is not torch.uint8 or not tables.is_floating_point():
        return "it takes places in uint8, and tables of floats"
    if tables.ndim != 2 or not places.ndim or places.shape[0] % tables.shape[0]:
        return f"tables of shape {tuple(tables.shape)} do not divide places of shape {tuple(places.shape)}"
    return ""


def _tensor(operand: Any) -> torch.Tensor | None:
    value = operand.meta.get("val") if isinstance(operand, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _shape(value: torch.Tensor, axis: Any, block: Any) -> tuple[Any, ...] | str:
    """The shape of a scale, or why there is none."""
    if axis is None:
        return () if block == 0 else "it has blocks and no axis"
    if not -value.ndim <= axis < value.ndim:
        return f"axis {axis} is none of {value.ndim}"
    size = value.shape[axis]
    if block == 0:
        return (size,)
    if block < 0 or not isinstance(size, int) or size % block:
        return f"blocks of {block} do not divide {size}"
    return tuple(size // block if i == axis % value.ndim else each for i, each in enumerate(value.shape))
