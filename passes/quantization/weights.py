"""Stored operands as integers or float8: what a decision makes of a weight, for artifacts and for what is tried."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vlexport.calibration.scales import float8, half_scale, symmetric
from vlexport.core.grids import GRIDS, quantize
from vlexport.core.palettes import PALETTES, palettize
from vlexport.core.scheme import E4M3
from vlexport.ir import quant_ops


def as_steps(weight: Tensor, kind: str, *, block: int = 0, scales: str = "float32") -> tuple[Tensor, Tensor, Tensor]:
    """A weight as steps, scales and zero points, which are 0.

    Args:
        weight: Floating, channels first.
        kind: Name of a grid, or ``e4m3``.
        block: So many neighbours on dim 1 share a scale; 0 gives every entry of dim 0 one.
        scales: Type whose numbers the scales shall be.
    """
    array = weight.detach().double().numpy()
    shape = (array.shape[0], array.shape[1] // block, block) if block else (array.shape[0], -1)
    groups = array.reshape(shape)
    low, high = groups.min(-1), groups.max(-1)
    scale = float8(low, high) if kind == E4M3 else symmetric(low, high, GRIDS[kind]).scale
    scale = half_scale(scale) if scales == "float16" else scale
    made = torch.from_numpy(scale)
    point = torch.zeros(scale.shape).to(dtype_of(kind))
    if kind == E4M3:
        return quant_ops.QUANTIZE(weight.detach().float(), made, point, 0), made, point
    axis = 1 if block else 0
    return torch.from_numpy(quantize(array, scale, point.numpy(), GRIDS[kind], axis=axis, block=block)), made, point


def rounded_weight(weight: Tensor, kind: str, *, block: int = 0, scales: str = "float32") -> Tensor:
    """A weight after rounding, as float32 of its shape; arguments as of :func:`as_steps`, or of :func:`by_palettes`."""
    return packed(weight, kind, block=block, scales=scales)()


def packed(weight: Tensor, kind: str, *, block: int = 0, scales: str = "float32") -> Callable[[], Tensor]:
    """The same for one that is wanted many times: it is rounded once, and kept in the size of its steps."""
    if kind in PALETTES:
        return partial(quant_ops.LOOK_UP, *by_palettes(weight, kind, group=block, scales=scales))
    steps = as_steps(weight, kind, block=block, scales=scales)
    return partial(quant_ops.DEQUANTIZE, *steps, 1 if block else 0, block)


def by_palettes(weight: Tensor, kind: str, *, group: int = 0, scales: str = "float32") -> tuple[Tensor, Tensor]:
    """A weight as places in tables, a table for so many output channels or for all; for ``look_up``."""
    places, tables = palettize(weight.detach().double().numpy(), kind, group=group, scales=scales)
    return torch.from_numpy(places), torch.from_numpy(tables)


def dtype_of(kind: str) -> torch.dtype:
    """What the steps of a grid, or float8, are stored in."""
    if kind == E4M3:
        return quant_ops.E4M3
    found: torch.dtype = getattr(torch, GRIDS[kind].dtype)
    return found
