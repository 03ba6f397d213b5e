"""ValueRange: what the values of one tensor span, and how much of them survives rounding. Streaming; numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_SMALL, _LARGE = 1e-10, 1e15
"""Between them a square, and the sum of 10⁶ of them, is an ordinary float32."""


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

    def widen(self, values: npt.NDArray[Any]) -> None:
        """Add one sample's values to what the tensor spans, and nothing to what rounding loses.

        Args:
            values: Floating array of any shape.
        """
        if not values.size:
            return
        seen, top = values, _largest(values)
        if not math.isfinite(top):
            seen = values[np.isfinite(values)]
            top = _largest(seen)
        self.largest = max(self.largest, top)
        self.whole = self.whole and bool((seen == np.trunc(seen)).all())

    def update(self, values: npt.NDArray[Any], rounded: npt.NDArray[Any]) -> None:
        """Add one sample's values, and what rounding does to them.

        Args:
            values: Floating array of any shape.
            rounded: Array of the same shape: the values after rounding, or what was computed from rounded operands.
        """
        self.widen(values)
        if not math.isfinite(_largest(values)):
            finite = np.isfinite(values)
            values, rounded = values[finite], rounded[finite]
        if not math.isfinite(_largest(rounded)):
            self.noise = math.inf
            return
        self.signal += _squares(values)
        self.noise += _squares(rounded - values)

    @property
    def kept_db(self) -> float:
        """10·log10(signal / noise): decibels of signal to rounding noise; ``inf`` without noise."""
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 and self.noise < math.inf else -math.inf


def _largest(values: npt.NDArray[Any]) -> float:
    """Largest magnitude, 0 of nothing; infinite or NaN where a value is."""
    return float(max(values.max(), -values.min())) if values.size else 0.0


def _squares(values: npt.NDArray[Any]) -> float:
    """Sum of squares: in float32 where none of them overflows or vanishes there, for speed."""
    flat = values.ravel()
    if not _SMALL < _largest(flat) < _LARGE:
        flat = flat.astype(np.float64)
    return float(np.dot(flat, flat))
