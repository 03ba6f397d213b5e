"""Operators that quantize: ``vlexport::quantize``, ``dequantize``, ``choose_qparams`` and ``look_up``.

Importing this module declares them to torch; whoever reads an archive that may hold them imports it first. They say
what ONNX says, and run in PyTorch, so that a quantized Program can be checked like any other::

    quantize(x, scale, zero_point, axis)              saturate(round_half_to_even(x / scale) + zero_point)
    dequantize(q, scale, zero_point, axis, block)     (q - zero_point) · scale
    choose_qparams(x)                                 scale and zero point of uint8, from the range of x at run time
    look_up(places, tables)                           tables[g, places]: a stored tensor by its palettes

``scale`` and ``zero_point`` are tensors. The zero point's dtype is that of the integers: int8, uint8, int32 (a bias),
or float8_e4m3fn, whose zero point is 0. The scale's dtype is that of the floats. ``axis`` is the dim that they run
along, None for one scale. With ``block`` they hold one value for so many neighbours on that dim. ``bits=4`` says of
int8 that a target stores it as int4; values lie in -8 to 7. Tables are floats ``(groups, 2**bits)``, places uint8:
equal shares of dim 0 have a table each, in order.

Source: ONNX operator specification, QuantizeLinear 21, DequantizeLinear 21 and DynamicQuantizeLinear 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlexport.core.grids import E4M3_LARGEST

BIAS = torch.int32
E4M3 = torch.float8_e4m3fn
STORED = (torch.int8, torch.uint8, BIAS, E4M3)
"""Dtypes of quantized tensors."""

_library = torch.library.Library("vlexport", "DEF")
_library.define("quantize(Tensor input, Tensor scale, Tensor zero_point, int? axis=None) -> Tensor")
_library.define(
    "dequantize(Tensor input, Tensor scale, Tensor zero_point, int? axis=None, int block=0, int bits=8) -> Tensor"
)
_library.define("choose_qparams(Tensor input) -> (Tensor, Tensor)")
_library.define("look_up(Tensor input, Tensor tables) -> Tensor")


def _quantize(input: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:  # noqa: A002
    """int32 divides in float64, the others in the dtype of the floats."""
    kind = torch.float64 if zero_point.dtype is BIAS else torch.promote_types(input.dtype, torch.float32)
    steps = input.to(kind) / _along(scale, input.ndim, axis, 0).to(kind)
    if zero_point.dtype is E4M3:
        return steps.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(zero_point.dtype)
    info = torch.iinfo(zero_point.dtype)
    points = _along(zero_point, input.ndim, axis, 0).to(kind)
    return (steps.round().nan_to_num(0.0) + points).clamp(info.min, info.max).to(zero_point.dtype)


def _dequantize(
    input: Tensor,  # noqa: A002
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    block: int = 0,
    bits: int = 8,
) -> Tensor:
    if input.dtype is E4M3:
        return input.to(scale.dtype) * _along(scale, input.ndim, axis, block)
    wide = torch.int64 if input.dtype is BIAS else torch.int32
    steps = input.to(wide) - _along(zero_point, input.ndim, axis, block).to(wide)
    return steps.to(scale.dtype) * _along(scale, input.ndim, axis, block)


def _choose_qparams(input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
    low = input.amin().clamp(max=0.0)
    high = input.amax().clamp(min=0.0)
    scale = (high - low) / 255.0
    scale = torch.where(scale > 0.0, scale, torch.ones_like(scale))
    point = (-low / scale).round().clamp(0.0, 255.0)
    return scale, point.to(torch.uint8)


def _look_up(input: Tensor, tables: Tensor) -> Tensor:  # noqa: A002
    places = input.reshape(tables.shape[0], -1).long().clamp(max=tables.shape[1] - 1)  # no place lies outside
    return tables.gather(1, places).reshape(input.shape)


def _along(values: Tensor, dims: int, axis: int | None, block: int) -> Tensor:
    """One value a channel or block, so that it broadcasts along ``axis``; a scalar stays one."""
    if axis is None:
        return values
    if block:
        return values.repeat_interleave(block, axis)
    shape = [1] * dims
    shape[axis] = -1
    return values.reshape(shape)


def _fake_quantize(input: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:  # noqa: A002
    return torch.empty_like(input, dtype=zero_point.dtype)


def _fake_dequantize(
    input: Tensor,  # noqa: A002
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    block: int = 0,
    bits: int = 8,
) -> Tensor:
    return torch.empty_like(input, dtype=scale.dtype)


def _fake_choose_qparams(input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
    return input.new_empty(()), input.new_empty((), dtype=torch.uint8)


def _fake_look_up(input: Tensor, tables: Tensor) -> Tensor:  # noqa: A002
    return torch.empty_like(input, dtype=tables.dtype)


for _name, _kernel, _fake in (
    ("quantize", _quantize, _fake_quantize),
    ("dequantize", _dequantize, _fake_dequantize),
    ("choose_qparams", _choose_qparams, _fake_choose_qparams),
    ("look_up", _look_up, _fake_look_up),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlexport::{_name}", _fake, lib=_library)

OPERATORS = frozenset({"quantize", "dequantize", "choose_qparams", "look_up"})
"""Names of the operators, each with the overload ``default``."""
QUANTIZE = torch.ops.vlexport.quantize.default
DEQUANTIZE = torch.ops.vlexport.dequantize.default
CHOOSE_QPARAMS = torch.ops.vlexport.choose_qparams.default
LOOK_UP = torch.ops.vlexport.look_up.default
