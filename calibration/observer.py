"""Observer: all that is kept of one tensor's values, in one pass and in constant memory. Numpy.

It keeps what every method of :mod:`vlexport.calibration.methods` needs, so that one run of the data serves all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vlexport.calibration.histogram import Histogram
from vlexport.core.artifact import Array

MOMENTUM = 0.9
"""What a moving average keeps of its value at each run; the rest is the new one's."""


class NotFiniteError(ValueError):
    """An array holds NaN or infinity. For whoever knows which sample and which node it belongs to."""


@dataclass
class Observer:
    """What was seen of one tensor.

    Attributes:
        channel_axis: Dim whose entries are told apart, or None.
        with_histogram: Whether values are counted; without, ranges are of extremes alone.
        minimum: Least value.
        maximum: Largest value.
        average_low: Moving average of the least value of each run.
        average_high: The same of the largest.
        runs: Arrays seen.
        elements: Values seen.
        histogram: Their counts.
        channel_low: Least value of each channel; empty without ``channel_axis``.
        channel_high: The same of the largest.
    """

    channel_axis: int | None = None
    with_histogram: bool = True
    minimum: float = np.inf
    maximum: float = -np.inf
    average_low: float = 0.0
    average_high: float = 0.0
    runs: int = 0
    elements: int = 0
    histogram: Histogram = field(default_factory=Histogram)
    channel_low: Array = field(default_factory=lambda: np.zeros(0))
    channel_high: Array = field(default_factory=lambda: np.zeros(0))

    def update(self, values: npt.NDArray[Any]) -> None:
        """Add the values of one run.

        Args:
            values: Floating array; the same number of channels each time.

        Raises:
            NotFiniteError: It holds NaN or infinity; then nothing was added.
        """
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NotFiniteError("NaN" if np.isnan(low) else "infinity")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        keep = MOMENTUM if self.runs else 0.0
        self.average_low = keep * self.average_low + (1.0 - keep) * low
        self.average_high = keep * self.average_high + (1.0 - keep) * high
        self.runs += 1
        self.elements += values.size
        if self.with_histogram:
            self.histogram.update(values, max(high, -low))
        if self.channel_axis is not None:
            lows, highs = channel_range(values, self.channel_axis)
            first = not self.channel_low.size
            self.channel_low = lows if first else np.minimum(self.channel_low, lows)
            self.channel_high = highs if first else np.maximum(self.channel_high, highs)


def channel_range(values: npt.NDArray[Any], axis: int) -> tuple[Array, Array]:
    """Least and largest value of each entry of a dim: of a weight's output channels, of an activation's features.

    Args:
        values: Array, not empty.
        axis: The dim; counted from the end if negative.

    Returns:
        Two arrays as long as the dim, of the values' dtype.
    """
    others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    return values.min(axis=others), values.max(axis=others)
