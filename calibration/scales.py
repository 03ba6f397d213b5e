"""Scale and zero point from a range: the grid spans the range, and 0 lies on it exactly.

Affine: ``scale = (high - low) / (grid.high - grid.low)``, ``zero_point = round(grid.low - low / scale)``, the range
widened to hold 0. Symmetric: ``scale = max(|low|, |high|) / grid.high``, zero point in the middle of the grid's zero:
0 for a signed grid; for an unsigned one the middle value, so that uint8 with 128 says what int8 with 0 does.
A range that is nothing but 0 gets the scale 1. float8 has no grid: ``scale = max(|low|, |high|) / 448``, no zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlexport.core.artifact import Array
from vlexport.core.grids import Grid

_LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""Below it, runtimes that flush subnormal numbers would divide by 0."""
_LARGEST = float(np.finfo(np.float32).max)
E4M3_LARGEST = 448.0
"""Largest finite value of float8_e4m3fn. Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022."""
_LEAST_HALF = np.float16(2.0**-14)
"""Smallest normal float16: below it scales lose digits."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """How floats become integers.

    Attributes:
        scale: float32, positive; a scalar or one value a channel.
        zero_point: Of the grid's dtype, shaped like ``scale``.
        grid: Where the integers lie.
    """

    scale: npt.NDArray[np.float32]
    zero_point: Array
    grid: Grid


def affine(low: float | Array, high: float | Array, grid: Grid) -> Scaling:
    """A grid that spans ``low`` to ``high``.

    Args:
        low: Finite in float32; scalar or one a channel.
        high: Finite, shaped like ``low`` and nowhere below it.
        grid: Where the integers lie.

    Raises:
        ValueError: A bound is not finite in float32, or ``low`` lies above ``high``.
    """
    bottom, top = _checked(low, high)
    bottom, top = np.minimum(bottom, 0.0), np.maximum(top, 0.0)
    width = top - bottom
    step = np.where(width > 0.0, width, 1.0) / (grid.high - grid.low)
    point = np.where(width > 0.0, np.rint(grid.low - bottom / step), max(grid.low, 0))
    scale = _usable(width / (grid.high - grid.low), width)
    return Scaling(scale, np.clip(point, grid.low, grid.high).astype(grid.dtype), grid)


def symmetric(low: float | Array, high: float | Array, grid: Grid) -> Scaling:
    """A grid that reaches as far on either side of 0 as the range does on its wider one; operands as in :func:`affine`.

    The least value of a signed grid is not needed: -127 to 127 of int8.
    """
    bottom, top = _checked(low, high)
    reach = np.maximum(np.abs(bottom), np.abs(top))
    middle = 0 if grid.low < 0 else (grid.low + grid.high + 1) // 2
    scale = _usable(reach / (grid.high - middle), reach)
    return Scaling(scale, np.full(reach.shape, middle).astype(grid.dtype), grid)


def float8(low: float | Array, high: float | Array) -> npt.NDArray[np.float32]:
    """A scale at which float8_e4m3fn reaches as far as the range does; operands as in :func:`affine`."""
    bottom, top = _checked(low, high)
    reach = np.maximum(np.abs(bottom), np.abs(top))
    return _usable(reach / E4M3_LARGEST, reach)


def half_scale(scale: Array | np.float32) -> npt.NDArray[np.float32]:
    """The next number of float16 that is no smaller, and normal: nothing saturates that did not before.

    A channel whose values all lie below 0.008 gets fewer steps; its values are no larger than the rounding of others.

    Raises:
        ValueError: A scale lies beyond float16.
    """
    made = np.asarray(scale, np.float32)
    if (made > np.finfo(np.float16).max).any():
        raise ValueError("a scale lies beyond float16")
    half = made.astype(np.float16)
    half = np.where(half.astype(np.float32) < made, np.nextafter(half, np.float16(np.inf)), half)
    return np.maximum(half, _LEAST_HALF).astype(np.float32)


def _checked(low: float | Array, high: float | Array) -> tuple[Array, Array]:
    bottom, top = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not all((np.abs(each) <= _LARGEST).all() for each in (bottom, top)):
        raise ValueError("a range with a bound that is not finite in float32 has no scale")
    if (bottom > top).any():
        raise ValueError("the lower bound of a range lies above its upper bound")
    return bottom, top


def _usable(scale: Array, width: Array) -> npt.NDArray[np.float32]:
    """As float32, never 0; 1 where there is nothing to span."""
    return np.where(width > 0.0, np.maximum(scale, _LEAST_SCALE), 1.0).astype(np.float32)
