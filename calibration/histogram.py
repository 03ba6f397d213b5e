"""Histogram: exact counts of a stream of arrays in constant memory. Numpy.

Bins are as wide as a power of two, and begin at its multiples. The width follows from the largest magnitude seen; when
that grows, neighbours are merged by twos. Because dividing by a power of two is exact, and so is merging, the counts
are at every moment those of one histogram over all values at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

HALF = 2048
"""Bins on either side of 0: the side that reaches further fills 1024 to 2048 of them."""
_LEAST_EXPONENT = -100
_CHUNK = 1 << 16
"""Elements at a time: what is computed on the way stays in the processor's cache."""

Counts = npt.NDArray[np.int64]


def _no_counts() -> Counts:
    return np.zeros(2 * HALF, np.int64)


@dataclass
class Histogram:
    """How often values fell into bins.

    Attributes:
        exponent: A bin is ``2**exponent`` wide; None as long as nothing but 0 was seen.
        counts: int64[4096]; entry ``HALF + k`` counts ``k·width <= x < (k+1)·width``. Zeros are counted apart until
            there is a width, and as ``k = 0`` from then on.
        zeros: Values that are exactly 0.
    """

    exponent: int | None = None
    counts: Counts = field(default_factory=_no_counts)
    zeros: int = 0

    def update(self, values: npt.NDArray[Any], reach: float) -> None:
        """Count values.

        Args:
            values: Finite floating array of any shape.
            reach: Their largest magnitude.
        """
        if reach == 0.0:
            self.zeros += values.size
            if self.exponent is not None:
                self.counts[HALF] += values.size
            return
        self._widen(max(math.frexp(reach)[1] - HALF.bit_length() + 1, _LEAST_EXPONENT))
        assert self.exponent is not None
        factor = math.ldexp(1.0, -self.exponent)
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            steps = np.multiply(chunk, factor, dtype=np.float64 if chunk.dtype == np.float64 else np.float32)
            np.floor(steps, out=steps)
            if self.exponent > 0:  # a negative value that vanished when divided
                steps[(steps == 0.0) & (chunk < 0.0)] = -1.0
            self.counts += np.bincount(steps.astype(np.int64) + HALF, minlength=2 * HALF)
            self.zeros += chunk.size - int(np.count_nonzero(chunk))

    @property
    def width(self) -> float:
        """Width of a bin; 0 as long as nothing but 0 was seen."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return self.zeros if self.exponent is None else int(self.counts.sum())

    def folded(self) -> Counts:
        """Counts of magnitudes: int64[2048], entry ``k`` for ``k·width`` to ``(k+1)·width``."""
        return self.counts[HALF:] + self.counts[HALF - 1 :: -1]

    def quantile(self, share: float) -> float:
        """The value that a share of all values does not exceed, to within the width of a bin.

        Args:
            share: 0 to 1.
        """
        return (_position(self.counts, share) - HALF) * self.width if self.exponent is not None else 0.0

    def magnitude(self, share: float) -> float:
        """The magnitude that a share of all values does not exceed, to within the width of a bin."""
        return _position(self.folded(), share) * self.width if self.exponent is not None else 0.0

    def _widen(self, exponent: int) -> None:
        """Make bins at least ``2**exponent`` wide."""
        if self.exponent is None:
            self.exponent = exponent
            self.counts[HALF] += self.zeros
            return
        shift = exponent - self.exponent
        if shift <= 0:
            return
        self.exponent = exponent
        before, self.counts = self.counts, _no_counts()
        size = 1 << min(shift, HALF.bit_length() - 1)
        left = HALF // size
        self.counts[HALF - left : HALF + left] = before.reshape(-1, size).sum(1)


def _position(counts: Counts, share: float) -> float:
    """Where a share of all counts ends, in bins from the first, as if values lay evenly in their bin."""
    running = np.cumsum(counts)
    wanted = share * float(running[-1])
    index = int(np.searchsorted(running, wanted, side="left"))
    if running[index] == 0:  # a share of 0 ends before the first value
        index = int(np.flatnonzero(counts)[0])
    inside = (wanted - float(running[index] - counts[index])) / float(counts[index])
    return index + min(max(inside, 0.0), 1.0)
