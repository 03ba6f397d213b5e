"""Palettes: every value goes to the nearest entry, and the table errs hardly more than the best one that there is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlexport.core.grids import GRIDS, dequantize, quantize
from vlexport.core.palettes import PALETTES, looked_up, palettize


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def squared_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found.astype(np.float64) - wanted).sum())


def least_error(values: np.ndarray, count: int) -> float:
    """Of the best table of so many entries, over all ways to cut the sorted values into stretches."""
    ordered = np.sort(values.astype(np.float64).ravel())
    ones, firsts, seconds = (np.append(0.0, np.cumsum(ordered**power)) for power in range(3))
    ends = np.arange(ordered.size + 1)
    size = np.maximum(ones[:, None] - ones[None, :], 1e-300)
    cost = (seconds[:, None] - seconds[None, :]) - (firsts[:, None] - firsts[None, :]) ** 2 / size
    cost[ends[:, None] < ends[None, :]] = np.inf
    best = cost[:, 0]
    for _ in range(count - 1):
        best = (cost + best[None, :]).min(1)
    return float(best[-1])


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**16), rows=st.sampled_from([2, 4]), group=st.sampled_from([0, 1, 2]),
    kind=st.sampled_from(sorted(PALETTES)), half=st.booleans(), power=st.integers(1, 5),
)  # fmt: skip
def test_nearest_entry_of_its_own_group_stands_for_each_value(
    seed: int, rows: int, group: int, kind: str, half: bool, power: int
) -> None:
    values = weights(rows, 90, seed) ** power
    scales = "float16" if half else "float32"
    places, tables = palettize(values, kind, group=group, scales=scales)
    assert (places.dtype, places.shape) == (np.uint8, values.shape)
    assert tables.shape == (rows // (group or rows), 1 << PALETTES[kind])
    assert np.array_equal(tables, tables.astype(scales).astype(np.float32))
    parts = values.reshape(len(tables), -1)
    nearest = np.abs(parts[:, :, None] - tables[:, None, :]).min(-1)
    np.testing.assert_allclose(np.abs(looked_up(places, tables) - values).reshape(nearest.shape), nearest, atol=1e-6)


@pytest.mark.parametrize("power", [1, 3])
def test_table_errs_hardly_more_than_the_best_when_values_are_normal_or_have_outliers(power: int) -> None:
    ratios = []
    for seed in range(20):
        values = weights(1, 300, seed) ** power
        found = squared_error(looked_up(*palettize(values, "palette4")), values)
        ratios.append(found / least_error(values, 16))
    assert min(ratios) >= 1.0 - 1e-6
    assert max(ratios) <= 1.35
    assert float(np.mean(ratios)) <= 1.12


def test_values_are_kept_when_a_table_has_room_for_all() -> None:
    values = np.tile(weights(1, 16), (8, 4))
    places, tables = palettize(values, "palette4")
    assert np.array_equal(looked_up(places, tables), values)
    assert np.array_equal(looked_up(*palettize(np.full((4, 4), 2.5, np.float32), "palette4")), np.full((4, 4), 2.5))


def test_palette_errs_less_than_equal_steps_when_bits_are_few() -> None:
    values = weights(64, 256)
    scale = np.float32(np.abs(values).max() / 7)
    zero = np.int8(0)
    steps = dequantize(quantize(values, scale, zero, GRIDS["int4"]), scale, zero)
    found = looked_up(*palettize(values, "palette4"))
    assert squared_error(found, values) < 0.65 * squared_error(steps, values)


def test_values_that_half_does_not_hold_become_its_largest() -> None:
    values = np.array([[-1e6, 1.0, 2.0, 1e6]], np.float32)
    with np.errstate(all="raise"):
        found = looked_up(*palettize(values, "palette4", scales="float16"))
    assert found.tolist() == [[-65504.0, 1.0, 2.0, 65504.0]]
