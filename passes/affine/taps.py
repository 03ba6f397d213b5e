"""Where a kernel reads along one axis, and how a convolution is padded so that it reads there.

A map along one axis is ``y[i] = Σ w[t] · x0[stride · i + t]`` for the offsets ``t`` of its taps, where ``x0`` is ``x``
with zeros on both sides for ever. Padding is then no part of a map: it follows from the taps and from ``reach``, which
says how many results there are: ``(length + reach − 1) // stride + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Taps:
    """``start``, ``start + step``, … ; ``count`` offsets. A single one has step 1."""

    start: int = 0
    step: int = 1
    count: int = 1

    @property
    def last(self) -> int:
        """The largest offset."""
        return self.start + self.step * (self.count - 1)

    @property
    def span(self) -> int:
        """From the first offset to the last."""
        return self.step * (self.count - 1)

    def joined(self, other: Taps) -> Taps:
        """The fewest evenly spaced offsets that hold both: a kernel of dilation 2 and a centre need no more taps."""
        return _evenly(
            (self, other), self.start - other.start, min(self.start, other.start), max(self.last, other.last)
        )

    def behind(self, inner: Taps, stride: int) -> Taps:
        """Offsets of this kernel behind one that has offsets ``inner`` and makes steps of ``stride``."""
        scaled = Taps(self.start * stride, self.step * stride if self.count > 1 else 1, self.count)
        return _evenly((scaled, inner), 0, scaled.start + inner.start, scaled.last + inner.last)

    def place(self, wider: Taps) -> slice:
        """Where these offsets stand among those of ``wider``, which holds them."""
        first = (self.start - wider.start) // wider.step
        by = self.step // wider.step if self.count > 1 else 1
        return slice(first, first + by * (self.count - 1) + 1, by)


def _evenly(parts: Sequence[Taps], apart: int, first: int, last: int) -> Taps:
    step = math.gcd(abs(apart), *(part.step for part in parts if part.count > 1)) or 1
    count = (last - first) // step + 1
    return Taps(first, step if count > 1 else 1, count)


def results(length: int, reach: int, stride: int) -> int:
    """How many results an axis of ``length`` has."""
    return (length + reach - 1) // stride + 1


def reaches(length: int | None, reach: int, stride: int) -> range:
    """Every reach with as many results; for a length that the input decides only the one that always has."""
    if length is None or stride == 1:
        return range(reach, reach + 1)
    count = results(length, reach, stride)
    return range(stride * (count - 1) + 1 - length, stride * count - length + 1)


def padded(taps: Taps, allowed: range) -> tuple[Taps, int] | None:
    """The fewest taps around ``taps``, and the padding of both sides, that give one of the ``allowed`` reaches.

    More taps than ``taps`` are needed where one side would need more padding than the other.
    """
    best: tuple[Taps, int] | None = None
    for step in {taps.step, 1}:
        first = -taps.start + max(0, -(-taps.start // step)) * step
        for padding in range(first, first + 8 * step, step):
            for reach in allowed:
                span = 2 * padding - reach
                if span < taps.last + padding or span % step:
                    continue
                count = span // step + 1
                if best is None or count < best[0].count:
                    best = Taps(-padding, step if count > 1 else 1, count), padding
    return best


def is_zero_outside(taps: Taps, reach: int, stride: int, length: int | None) -> tuple[bool, bool]:
    """Whether the map, read before its first result and behind its last one, only meets zeros.

    Only then may a kernel with zero padding stand behind it and be merged.
    """
    if length is None:
        return taps.last < stride, reach + taps.start >= 0
    return taps.last < stride, stride * results(length, reach, stride) + taps.start >= length
