"""Grid: the integers that a quantized tensor may hold, and how floats become them. Numpy, no torch.

The rules are those of ONNX QuantizeLinear and DequantizeLinear::

    q = saturate(round_half_to_even(x / scale) + zero_point)        x' = (q - zero_point) · scale

The division is made in float32, for int32 in float64: a product with 1/scale would round otherwise at the ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlexport.core.artifact import Array


@dataclass(frozen=True)
class Grid:
    """The integers from ``low`` to ``high``, stored as ``dtype``.

    Attributes:
        name: What recipes and reports call it.
        dtype: numpy dtype name of the storage.
        low: Least value.
        high: Largest value.
    """

    name: str
    dtype: str
    low: int
    high: int

    @property
    def levels(self) -> int:
        """How many values there are."""
        return self.high - self.low + 1


INT8 = Grid("int8", "int8", -128, 127)
UINT8 = Grid("uint8", "uint8", 0, 255)
INT7 = Grid("int7", "int8", -64, 63)
"""int8 of which a product with uint8 fits, added to its neighbour's, into 16 bits: 2 · 255 · 64 < 2¹⁵."""
UINT7 = Grid("uint7", "uint8", 0, 127)
INT4 = Grid("int4", "int8", -8, 7)
INT32 = Grid("int32", "int32", -(2**31), 2**31 - 1)
E4M3_LARGEST = 448.0
"""Largest finite value of float8_e4m3fn, which is no grid. Source: Micikevicius et al., FP8 Formats, 2022."""
GRIDS: dict[str, Grid] = {each.name: each for each in (INT8, UINT8, INT7, UINT7, INT4, INT32)}


def quantize(
    values: Array, scale: Array, zero_point: Array, grid: Grid, *, axis: int | None = None, block: int = 0
) -> Array:
    """Floats as integers of a grid.

    Args:
        values: Floating array.
        scale: Positive; a scalar, with ``axis`` one value a channel, with ``block`` as many dims as ``values``.
        zero_point: The integer that stands for 0, shaped like ``scale``.
        grid: Where results lie; what would lie outside saturates.
        axis: Dim of ``values`` that ``scale`` runs along.
        block: So many neighbours on that dim share a scale; 0 for none.

    Returns:
        Array of the grid's dtype. NaN becomes the zero point.
    """
    kind: Any = np.float64 if grid.levels > 1 << 16 else np.float32
    steps = np.asarray(values, kind) / _along(scale, np.ndim(values), axis, block).astype(kind)
    points = _along(zero_point, np.ndim(values), axis, block).astype(np.int64)
    inside = np.clip(np.nan_to_num(np.rint(steps)), grid.low - points, grid.high - points)
    stored: Array = (inside.astype(np.int64) + points).astype(grid.dtype)
    return stored


def dequantize(
    stored: Array, scale: Array, zero_point: Array, *, axis: int | None = None, block: int = 0
) -> npt.NDArray[np.float32]:
    """Integers of a grid as float32; operands as in :func:`quantize`."""
    points = _along(zero_point, np.ndim(stored), axis, block).astype(np.int64)
    steps = np.asarray(stored, np.int64) - points
    return steps.astype(np.float32) * _along(scale, np.ndim(stored), axis, block).astype(np.float32)


def _along(values: Array, dims: int, axis: int | None, block: int) -> Array:
    """One value a channel or block as an array that broadcasts along ``axis``; a scalar stays one."""
    found = np.asarray(values)
    if axis is None:
        return found
    if block:
        return np.repeat(found, block, axis)
    shape = [1] * dims
    shape[axis] = -1
    return found.reshape(shape)
