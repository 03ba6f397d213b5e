"""Confidence intervals for rates and paired differences, exact or by score. Never bootstrap: no scipy needed.

A bootstrap of zero disagreements has zero width and lies; every interval here has a width for any finite ``n``.
Counts may be fractional, which is how :func:`samples_needed` asks "the same rates, but more samples".
"""

from __future__ import annotations

import math
from collections.abc import Callable

Z95 = 1.959963984540054
"""The two-sided 95 % quantile of the normal distribution."""

_BISECTIONS = 100  # halves a unit interval down to the spacing of float64


def _root(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls from ≥ 0 at ``low`` to ≤ 0 at ``high`` crosses zero."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _check(n: float, *counts: float) -> None:
    if n < 0 or min(counts) < 0 or sum(counts) > n * (1 + 1e-12):
        raise ValueError(f"counts {counts} do not fit {n} samples")


def wilson(k: float, n: float, *, z: float = Z95) -> tuple[float, float]:
    """Score interval of a rate.

    Equation:
        (p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n), with p = k/n.

    Args:
        k: Number of successes, 0 ≤ k ≤ n.
        n: Number of samples.
        z: Normal quantile of the confidence level, two-sided.

    Returns:
        Lower and upper bound, as fractions; (0, 1) when ``n`` is 0.

    Raises:
        ValueError: The counts are negative or exceed ``n``.

    Source:
        Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    _check(n, k)
    if n == 0:
        return 0.0, 1.0
    p = k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - min(p, 1.0)) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if k == 0 else max(0.0, low)), (1.0 if k >= n else min(1.0, high))


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction.

    Args:
        x: Upper limit of integration, 0 to 1.
        a: First shape, > 0.
        b: Second shape, > 0.

    Source:
        Abramowitz and Stegun 26.5.8; Lentz's evaluation. Relative error about 1e-13.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on this side only
        return 1 - incomplete_beta(1 - x, b, a)
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 100_000):  # about sqrt(max(a, b)) rounds are taken
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d, c = 1 + term * d, 1 + term / c
            d, c = 1 / (d if abs(d) > tiny else tiny), (c if abs(c) > tiny else tiny)
            change = d * c
            value *= change
        if abs(change - 1) < 1e-15:
            break
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) * value / a


def clopper_pearson(k: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate: its coverage is never below ``confidence``.

    Equation:
        lower: I_p(k, n − k + 1) = α/2; upper: I_p(k + 1, n − k) = 1 − α/2, with α = 1 − confidence.

    Args:
        k: Number of successes, 0 ≤ k ≤ n.
        n: Number of samples.
        confidence: Two-sided confidence level.

    Returns:
        Lower and upper bound, as fractions; (0, 1) when ``n`` is 0.

    Raises:
        ValueError: The counts are negative or exceed ``n``.

    Source:
        Clopper and Pearson, Biometrika 26 (1934), 404-413.
    """
    _check(n, k)
    tail = (1 - confidence) / 2
    low = _root(lambda p: tail - incomplete_beta(p, k, n - k + 1), 0.0, 1.0) if k > 0 else 0.0
    high = _root(lambda p: 1 - tail - incomplete_beta(p, k + 1, n - k), 0.0, 1.0) if k < n else 1.0
    return low, high


def _tango_statistic(b: float, c: float, n: float, difference: float) -> float:
    """Score statistic of the paired difference; the nuisance rate is its constrained maximum-likelihood estimate."""
    linear = -b - c + (2 * n - b + c) * difference
    constant = -c * difference * (1 - difference)
    q = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    distance = b - c - n * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def tango(b: float, c: float, n: float, *, z: float = Z95) -> tuple[float, float]:
    """Score interval of the difference of two rates measured on the same samples.

    Equation:
        all δ with |b − c − nδ| ≤ z·sqrt(n(2q + δ(1 − δ))), where q is the root of
        2n·q² + (−b − c + (2n − b + c)δ)·q − cδ(1 − δ) = 0: the rate of c's cell, estimated under δ.
        With b = c = 0 it is ±z²/(n + z²).

    Args:
        b: Samples that only the first (the reference) gets right.
        c: Samples that only the second (ours) gets right.
        n: All samples, agreeing ones included.
        z: Normal quantile of the confidence level, two-sided.

    Returns:
        Lower and upper bound of (b − c)/n, as fractions; (−1, 1) when ``n`` is 0.

    Raises:
        ValueError: The counts are negative or exceed ``n``.

    Source:
        Tango, Statistics in Medicine 17 (1998), 891-908, solved by bisection.
    """
    _check(n, b, c)
    if n == 0:
        return -1.0, 1.0
    estimate = (b - c) / n
    # The statistic falls as the difference grows.
    low = _root(lambda d: _tango_statistic(b, c, n, d) - z, -1.0, estimate)
    high = _root(lambda d: _tango_statistic(b, c, n, d) + z, estimate, 1.0)
    return low, high


def samples_needed(
    interval: Callable[[float], tuple[float, float]],
    decided: Callable[[float, float], bool],
    *,
    n: int,
    limit: int = 10**9,
) -> int | None:
    """The smallest sample count that decides a question if the observed rates stay as they are.

    Args:
        interval: Gives (low, high) for a sample count, rates unchanged; it narrows as the count grows.
        decided: Whether an interval (low, high) answers the question.
        n: Samples seen so far; the answer is not below it.
        limit: Where to give up.

    Returns:
        The count, or None when ``limit`` samples would not do (the rate lies on the threshold).
    """
    enough = max(n, 1)
    if decided(*interval(enough)):
        return enough
    while not decided(*interval(enough)):
        if enough >= limit:
            return None
        enough = min(2 * enough, limit)
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if decided(*interval(middle)):
            enough = middle
        else:
            too_few = middle
    return enough
