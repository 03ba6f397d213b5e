"""Our quantization operators in Core ML: ``quantize`` and ``dequantize`` of MIL, and constants unpacked on load.

A stored int8 or uint8 tensor becomes ``constexpr_affine_dequantize`` (iOS 17) or ``constexpr_blockwise_shift_scale``
(iOS 18, which also takes int4 and blocks); a bias in int32, which MIL has no constant for, a float constant. Places in
palettes become ``constexpr_lut_to_dense``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch.fx import Node

from vlexport.core.grids import dequantize
from vlexport.ir import dialect, quant_ops
from vlexport.ir.program import Program
from vlexport.ir.text import tensor_digest
from vlexport.targets.coreml import compat

_LOOK_UP = "vlexport.look_up.default"
TRANSLATED = frozenset({"vlexport.quantize.default", "vlexport.dequantize.default", _LOOK_UP})
"""Those with a translation; Core ML finds no ranges at run time."""
ACTIVATIONS_IOS = 17
"""Operators that quantize at run time began with it."""
BLOCKED_IOS = 18
"""int4, blocks, and several palettes a tensor began with it."""

WHAT_INSTEAD = (
    "quantize to int8 or uint8 with stored scales, or ask for a newer system with --set coreml.deployment_target"
)


@lru_cache(maxsize=1)
def register() -> None:
    """Tell coremltools of the translations; once a process."""
    compat.translate("vlexport.quantize", _quantize)
    compat.translate("vlexport.dequantize", _dequantize)
    compat.translate("vlexport.look_up", _look_up)


def quantizes(node: Node) -> bool:
    """Whether a call is one of our quantization operators."""
    return dialect.op_name(node).startswith("vlexport.")


def stored_integers(program: Program, deployment: str) -> int:
    """Elements of weights that are stored in int8 or uint8 and dequantized or looked up; equal ones count once.

    Before iOS 18, places of fewer bits are packed, and counted by the byte.
    """
    found: dict[str, int] = {}
    for node in program.calls("vlexport.dequantize.default", _LOOK_UP):
        stored, numbers = (program.tensor_of(each) for each in node.args[:2])
        if stored is None or numbers is None or stored.dtype is quant_ops.BIAS:
            continue
        bits = 8
        if node.target is quant_ops.LOOK_UP and _number(deployment) < BLOCKED_IOS:
            bits = numbers.shape[1].bit_length() - 1
        found[tensor_digest(stored)] = -(-stored.numel() * bits // 8)
    return sum(found.values())


def why_not(node: Node, deployment: str) -> str:
    """Why Core ML cannot express a quantizing call, or an empty string; for other calls as well.

    Args:
        node: A call.
        deployment: Oldest system, as ``iOS17``.
    """
    if not quantizes(node):
        return ""
    if dialect.op_name(node) not in TRANSLATED:
        return "Core ML finds no range at run time"
    operands = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
    if dialect.op_name(node) == _LOOK_UP:
        if any(operands[name].op != "get_attr" for name in ("input", "tables")):
            return "Core ML wants stored places and tables"
        several = operands["tables"].meta["val"].shape[0] > 1 and _number(deployment) < BLOCKED_IOS
        return f"several palettes a tensor began with iOS{BLOCKED_IOS}" if several else ""
    scale, point = operands["scale"], operands["zero_point"]
    if scale.op != "get_attr" or point.op != "get_attr":
        return "Core ML wants a stored scale and zero point"
    dtype = point.meta["val"].dtype
    if dtype is quant_ops.E4M3:
        return "Core ML has no float8"
    stored = operands["input"].op == "get_attr"
    if dtype is quant_ops.BIAS and not stored:
        return "Core ML quantizes to int8 and uint8; a bias is stored"
    if not stored and _number(deployment) < ACTIVATIONS_IOS:
        return f"quantized values that are not stored began with iOS{ACTIVATIONS_IOS}"
    if (operands.get("block") or operands.get("bits") == 4) and not (stored and _number(deployment) >= BLOCKED_IOS):
        return f"int4 and blocks of stored values began with iOS{BLOCKED_IOS}"
    return ""


def _number(deployment: str) -> int:
    return int("".join(c for c in deployment if c.isdigit()))


def _quantize(mb: Any, name: str, values: tuple[Any, ...]) -> Any:
    """``values`` are MIL variables, and None for an operand that is not given."""
    source, scale, point, *rest = values
    axis = _given(rest, 0)
    return mb.quantize(
        input=source, scale=scale.val, zero_point=point.val, output_dtype=str(point.val.dtype),
        **({} if axis is None else {"axis": axis}), name=name,
    )  # fmt: skip


def _dequantize(mb: Any, name: str, values: tuple[Any, ...]) -> Any:
    source, scale, point, *rest = values
    axis, block, bits = _given(rest, 0), _given(rest, 1) or 0, _given(rest, 2) or 8
    scales, points = scale.val, point.val
    if source.val is None:
        given = {} if axis is None else {"axis": axis}
        return mb.dequantize(input=source, scale=scales, zero_point=points, **given, name=name)
    stored = source.val
    if stored.dtype == np.int32:
        return mb.const(val=dequantize(stored, scales, points, axis=axis), name=name)
    if block or bits == 4:
        return compat.blockwise(mb, stored, scales, points, bits=bits, axis=axis, name=name)
    return compat.unpacked(stored, points, scales, axis=axis, name=name)


def _look_up(mb: Any, name: str, values: tuple[Any, ...]) -> Any:
    places, tables = values
    return compat.by_palettes(places.val, tables.val, name=name)


def _given(rest: list[Any], position: int) -> int | None:
    found = rest[position] if position < len(rest) else None
    value = getattr(found, "val", found)
    return None if value is None else int(value)
