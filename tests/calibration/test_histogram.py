"""Histogram: the counts of a stream are those of all values at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlexport.calibration.histogram import HALF, Histogram

floats = st.floats(-(2.0**30), 2.0**30, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 2.0, 2.0**20])
arrays = hnp.arrays(np.float32, st.integers(1, 20), elements=floats)


def seen(*parts: np.ndarray) -> Histogram:
    found = Histogram()
    for part in parts:
        found.update(part, float(np.abs(part).max()))
    return found


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(arrays, min_size=1, max_size=6))
def test_counts_are_those_of_all_values_at_once_when_they_come_in_parts(parts: list[np.ndarray]) -> None:
    streamed, whole = seen(*parts), seen(np.concatenate(parts))
    assert (streamed.exponent, streamed.zeros) == (whole.exponent, whole.zeros)
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    assert streamed.total == sum(part.size for part in parts)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(arrays)
def test_counts_are_those_of_numpy_when_its_edges_are_the_same(values: np.ndarray) -> None:
    found = seen(values)
    if not values.any():
        assert (found.exponent, found.zeros, found.width) == (None, values.size, 0.0)
        return
    edges = np.arange(-HALF, HALF + 1) * found.width
    exact = values.astype(np.float64)
    wanted, _ = np.histogram(exact, edges)
    np.testing.assert_array_equal(found.counts, wanted)
    assert np.abs(values).max() >= HALF / 2 * found.width or found.exponent == -100, "bins are not wider than they need"


def test_range_grows_by_many_powers_of_two_when_a_later_value_is_huge() -> None:
    first = np.array([1e-20, -1e-20, 0.0, 3e-20], np.float32)
    later = np.array([3e38, -3e38], np.float32)
    found = seen(first, later)
    assert found.total == 6
    assert (found.counts[HALF], found.counts[HALF - 1]) == (3, 1)
    np.testing.assert_array_equal(found.counts, seen(np.concatenate([first, later])).counts)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.3, 0.5, 0.99, 0.9999, 1.0])
def test_quantile_is_within_a_bin_of_numpys_when_values_are_many(share: float) -> None:
    values = np.random.default_rng(0).standard_t(3, size=(40, 5000)).astype(np.float32)
    found = seen(*values)
    # numpy interpolates between neighbours, so it may stand anywhere between the two values around the share
    low, high = (float(np.quantile(values, share, method=m)) for m in ("lower", "higher"))
    assert low - found.width <= found.quantile(share) <= high + found.width
    low, high = (float(np.quantile(np.abs(values), share, method=m)) for m in ("lower", "higher"))
    assert low - found.width <= found.magnitude(share) <= high + found.width


def test_half_and_double_precision_are_counted_when_given() -> None:
    values = np.random.default_rng(1).normal(size=1000)
    for dtype in (np.float16, np.float64):
        cast = values.astype(dtype)
        found = seen(cast)
        wanted, _ = np.histogram(cast.astype(np.float64), np.arange(-HALF, HALF + 1) * found.width)
        np.testing.assert_array_equal(found.counts, wanted)


def test_memory_does_not_grow_when_samples_do() -> None:
    rng = np.random.default_rng(2)

    def peak(runs: int) -> int:
        found = Histogram()
        tracemalloc.start()
        for _ in range(runs):
            values = rng.normal(size=30_000).astype(np.float32)
            found.update(values, float(np.abs(values).max()))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(64) <= 1.05 * peak(4)
