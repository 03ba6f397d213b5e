"""ValueRange: what the values of one tensor span, and how much of them survives rounding. Streaming; numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class ValueRange:
    """What was seen of one tensor, over all samples.

    Attributes:
        largest: Largest magnitude of a finite value.
        whole: Every finite value is an integer.
        signal: Sum of the squares of all finite values.
        noise: Sum of the squared differences that rounding made; ``inf`` where it made a finite value infinite.
    """

    largest: float = 0.0
    whole: bool = True
    signal: float = 0.0
    noise: float = 0.0

    def update(self, values: npt.NDArray[Any], rounded: npt.NDArray[Any]) -> None:
        """Add one sample's values.

        Args:
            values: Floating array of any shape.
            rounded: Array of the same shape: the values after rounding, or what was computed from rounded operands.
        """
        finite = np.isfinite(values)
        everywhere = bool(finite.all())
        seen = values if everywhere else values[finite]
        if not seen.size:
            return
        self.largest = max(self.largest, float(np.abs(seen).max()))
        self.whole = self.whole and bool((seen == np.trunc(seen)).all())
        found = rounded if everywhere else rounded[finite]
        if not np.isfinite(found).all():
            self.noise = math.inf
            return
        # in units of the largest value: the square of a huge one would not fit
        unit = max(float(np.abs(seen).max()), float(np.abs(found).max())) or 1.0
        exact, near = seen.astype(np.float64) / unit, found.astype(np.float64) / unit
        self.signal += float(np.vdot(exact, exact)) * unit * unit
        self.noise += float(np.vdot(near - exact, near - exact)) * unit * unit

    @property
    def kept_db(self) -> float:
        """10·log10(signal / noise): decibels of signal to rounding noise; ``inf`` without noise."""
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 and self.noise < math.inf else -math.inf
