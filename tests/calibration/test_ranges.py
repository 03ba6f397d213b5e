"""ValueRange: what is kept of a stream of arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlexport.calibration.ranges import ValueRange


def seen(*arrays: object) -> ValueRange:
    found = ValueRange()
    for each in arrays:
        values = np.asarray(each, np.float32)
        with np.errstate(over="ignore"):
            found.update(values, values.astype(np.float16).astype(np.float32))
    return found


def test_range_is_that_of_one_array_when_samples_come_in_parts() -> None:
    values = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    whole, parts = seen(values), seen(*values)
    assert parts.largest == whole.largest == float(np.abs(values).max())
    assert parts.kept_db == pytest.approx(whole.kept_db, abs=1e-5)
    assert 70.0 < whole.kept_db < 80.0, "11 significant bits are about 73 dB"


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([1.0, 2.0, 0.5], math.inf, math.inf),
        ([0.0, 0.0], math.inf, math.inf),
        ([], math.inf, math.inf),
        ([1e-5, 3.3e-6, 7.7e-6], 20.0, 55.0),
        ([1e-9, 2e-9], -1.0, 0.0),
        ([1e5, 1.0], -math.inf, -math.inf),
        ([3e38, 1.0], -math.inf, -math.inf),
        ([-math.inf, 1.0], math.inf, math.inf),
    ],
)
def test_kept_decibels_fall_when_values_leave_the_type(values: list[float], low: float, high: float) -> None:
    assert low <= seen(values).kept_db <= high


def test_infinities_of_a_mask_do_not_count_when_the_rest_is_finite() -> None:
    assert (seen([-math.inf, 3.0]).largest, seen([-math.inf, 3.0]).whole) == (3.0, True)


def test_whole_numbers_are_seen_when_every_value_is_one() -> None:
    assert seen([1.0, 2.0], [4096.0]).whole
    assert not seen([1.0, 2.0], [0.5]).whole


def test_decibels_are_the_same_when_values_are_too_small_to_be_squared_in_float32() -> None:
    found, values = ValueRange(), np.full(4, 1e-25, np.float32)
    found.update(values, values * np.float32(1.001))
    assert found.kept_db == pytest.approx(60.0, abs=0.1)
