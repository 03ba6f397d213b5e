"""Method: how a range follows from what was seen of a tensor. Numpy.

==================  ==================================================================================================
``min-max``         from the least value to the largest
``moving-average``  the moving average of both over the runs, for samples that come in a typical order
``percentile``      all values but the outermost: ``percentile`` percent lie inside, as many are cut on either side
``entropy``         magnitudes up to the threshold whose 128 levels lose least information: the divergence
                    ``KL(P‖Q)`` of Migacz, 8-bit Inference with TensorRT, GTC 2017; 256 levels where nothing is negative
``mse``             the range whose expected squared error, of what is cut off and of rounding, is least
==================  ==================================================================================================

Values that are exactly 0 lose nothing by any range, so entropy and mse leave them out. No range reaches beyond what
was seen.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from vlexport.calibration.histogram import HALF, Histogram
from vlexport.calibration.observer import MOMENTUM, Observer
from vlexport.core.artifact import Frozen

MethodName = Literal["min-max", "moving-average", "percentile", "entropy", "mse"]
BOUNDS = 256
"""How many bounds mse tries on either side, at least."""
_REVISION = 1
"""Counts changes of what a method gives; part of its hash."""

Floats = npt.NDArray[np.float64]


class Method(Frozen):
    """A method with its options.

    Attributes:
        name: See above.
        percentile: Of ``percentile``: how many percent of all values lie inside the range.
        symmetric: The range reaches as far below 0 as above it, as a grid without zero point does.
    """

    name: MethodName = "min-max"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    symmetric: bool = False

    @property
    def in_order(self) -> bool:
        """Whether the order of samples plays a part."""
        return self.name == "moving-average"

    @property
    def needs_histogram(self) -> bool:
        """Whether extremes alone do not tell the range."""
        return self.name in ("percentile", "entropy", "mse")

    def digest(self, *, batch: int = 1) -> str:
        """SHA-256 of all that decides the range beside the values; ``batch`` samples a run, where runs play a part."""
        parts = (self.model_dump_json(), HALF, BOUNDS, MOMENTUM, batch if self.in_order else 1, _REVISION)
        return hashlib.sha256(str(parts).encode()).hexdigest()


def range_of(seen: Observer, method: Method) -> tuple[float, float]:
    """The range that a method gives.

    Args:
        seen: Of at least one value; with a histogram where the method needs one.
        method: How.

    Returns:
        Lower and upper bound, within what was seen (for ``symmetric``, within the largest magnitude).
    """
    low, high = _chosen(seen, method)
    low, high = max(low, seen.minimum), min(high, seen.maximum)
    if method.symmetric:
        reach = max(abs(low), abs(high))
        return -reach, reach
    return low, high


def _chosen(seen: Observer, method: Method) -> tuple[float, float]:
    counts = seen.histogram
    if method.name == "min-max" or seen.minimum == seen.maximum:
        return seen.minimum, seen.maximum
    if method.name == "moving-average":
        return seen.average_low, seen.average_high
    if method.name == "percentile":
        outside = (1.0 - method.percentile / 100.0) / 2.0
        return counts.quantile(outside), counts.quantile(1.0 - outside)
    if method.name == "entropy":
        reach = _entropy(counts, levels=256 if seen.minimum >= 0.0 and not method.symmetric else 128)
        return -reach, reach
    return _mse(counts, symmetric=method.symmetric)


# -- entropy -----------------------------------------------------------------------------------------------------------


def _entropy(histogram: Histogram, *, levels: int) -> float:
    """The magnitude up to which ``levels`` levels keep most of the distribution."""
    counts = histogram.folded().astype(np.float64)
    counts[0] -= histogram.zeros
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used <= levels:
        return used * histogram.width
    kept = np.arange(used, levels - 1, -1)  # of equals the widest
    return int(kept[int(np.argmin(divergences(counts, kept, levels)))]) * histogram.width


def divergences(counts: Floats, kept: npt.NDArray[np.int64], levels: int) -> Floats:
    """``KL(P‖Q)`` for every threshold: what ``levels`` levels tell of the distribution wrongly.

    P are the first ``kept`` bins, the last of them with all that lies beyond; Q are the same bins after ``levels``
    equal parts were made one level each, whose count is spread over the bins where P is not 0. Since Q is the same all
    over a level, ``Σ P log Q`` is a sum over levels, and running sums give the rest.

    Args:
        counts: One count a bin, of magnitudes; not all 0.
        kept: Bins inside each threshold, at least ``levels``.
        levels: Levels.

    Returns:
        One divergence a threshold.
    """
    total = counts.sum()
    sums, holders, logs = (np.append(0.0, np.cumsum(each)) for each in (counts, counts > 0.0, _times_log(counts)))
    edges = np.arange(levels + 1) * kept[:, None] // levels
    inside = np.diff(sums[edges], axis=1)
    spread = np.diff(holders[edges], axis=1)
    beyond = total - sums[kept]
    last = counts[kept - 1]
    spread[:, -1] += (last == 0.0) & (beyond > 0.0)
    p = inside.copy()
    p[:, -1] += beyond
    q = inside / np.maximum(spread, 1.0) / np.maximum(sums[kept], 1.0)[:, None]
    of_p = (logs[kept - 1] + _times_log(last + beyond)) / total - np.log(total)
    found: Floats = of_p - (p * np.log(np.maximum(q, _ABSENT))).sum(1) / total
    return np.where(sums[kept] > 0.0, found, np.inf)


def _times_log(values: Floats) -> Floats:
    """x·log x, 0 of 0."""
    found: Floats = values * np.log(np.where(values > 0.0, values, 1.0))
    return found


_ABSENT = 1e-9
"""Probability of what Q says never occurs; P may say otherwise only of its last bin."""


# -- mean squared error ------------------------------------------------------------------------------------------------


def _mse(histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Bounds of the least expected squared error, each the far edge of a bin."""
    positive = histogram.counts[HALF:].astype(np.float64)
    negative = histogram.counts[HALF - 1 :: -1].astype(np.float64)
    positive[0] -= histogram.zeros
    both = positive + negative
    if symmetric:
        bounds, cut, inside = _cut(both)
        error = cut + _rounding(both, inside, 2.0 * bounds / 255.0)
        best = float(bounds[int(np.argmin(error))]) * histogram.width
        return -best, best
    highs, cut_high, inside_high = _cut(positive)
    lows, cut_low, inside_low = _cut(negative)
    step = (lows[:, None] + highs[None, :]) / 255.0
    error = cut_low[:, None] + cut_high[None, :]
    error = error + _rounding(both, inside_low[:, None] + inside_high[None, :], step)
    at_low, at_high = np.unravel_index(int(np.argmin(error)), error.shape)
    return -float(lows[at_low]) * histogram.width, float(highs[at_high]) * histogram.width


def _cut(side: Floats) -> tuple[Floats, Floats, Floats]:
    """Bounds to try on one side of 0 in bins, the widest first; what is lost beyond each, and how much lies inside."""
    found = np.flatnonzero(side)
    if not found.size:
        return np.zeros(1), np.zeros(1), np.zeros(1)
    used = int(found[-1]) + 1
    bounds = np.arange(used, 0, -max(used // BOUNDS, 1)).astype(np.float64)
    # Sums over the bins from each bound on, of 1, x and x²: together the sum of (x - bound)².
    ones, firsts, seconds = (total[-1] - total for total in _moments(side))
    at = bounds.astype(np.int64)
    lost = seconds[at] - 2.0 * bounds * firsts[at] + bounds**2 * ones[at]
    return bounds, np.maximum(lost, 0.0), float(side.sum()) - ones[at]


def _rounding(both: Floats, inside: Floats, step: Floats) -> Floats:
    """Expected squared error of rounding what lies inside to steps: x² for what becomes 0, else step² / 12."""
    ones, _, seconds = _moments(both)
    edges = np.arange(ones.size)
    small = np.minimum(np.interp(step / 2.0, edges, ones), inside)
    found: Floats = np.interp(step / 2.0, edges, seconds) + (inside - small) * step**2 / 12.0
    return found


def _moments(counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Running sums up to each edge of 1, x and x², in bins, as if values lay evenly in theirs."""
    k = np.arange(counts.size)
    means = (1.0, k + 0.5, k**2 + k + 1.0 / 3.0)
    ones, firsts, seconds = (np.append(0.0, np.cumsum(counts * mean)) for mean in means)
    return ones, firsts, seconds
