"""Stored operands as integers: what a decision makes of a weight, a scale an output channel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlexport.calibration.scales import Scaling, symmetric
from vlexport.core.artifact import Array
from vlexport.core.grids import Grid, dequantize, quantize


def weight_integers(weight: Tensor, grid: Grid) -> tuple[Array, Scaling]:
    """A weight as integers, symmetric, with a scale for each entry of dim 0.

    Args:
        weight: Floating, output channels on dim 0.
        grid: Where the integers lie.

    Returns:
        Integers in the weight's shape, and how they were made.
    """
    array = weight.detach().double().numpy()
    flat = array.reshape(array.shape[0], -1)
    made = symmetric(flat.min(1), flat.max(1), grid)
    return quantize(array, made.scale, made.zero_point, grid, axis=0), made


def rounded_weight(weight: Tensor, grid: Grid) -> Tensor:
    """A weight after rounding, as float32 of its shape."""
    integers, made = weight_integers(weight, grid)
    return torch.from_numpy(np.ascontiguousarray(dequantize(integers, made.scale, made.zero_point, axis=0)))
