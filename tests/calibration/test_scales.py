"""Scale and zero point: the grid spans the range, and 0 lies on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlexport.calibration.scales import LARGEST_HALF, affine, half_scale, symmetric
from vlexport.core.grids import INT4, INT7, INT8, UINT7, UINT8, Grid, dequantize, quantize

SMALL = (INT8, UINT8, INT7, UINT7, INT4)
finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(bounds=st.tuples(finite, finite).map(sorted), grid=st.sampled_from(SMALL))
def test_values_of_the_range_come_back_within_a_step_when_affine(bounds: list[float], grid: Grid) -> None:
    found = affine(*bounds, grid)
    values = np.linspace(*bounds, 101, dtype=np.float64)
    stored = quantize(values, found.scale, found.zero_point, grid)
    back = dequantize(stored, found.scale, found.zero_point)
    # Half a step of rounding, and half a step by which rounding the zero point shifts the range.
    assert np.abs(back - values).max() <= 1.001 * found.scale + 1e-6 * np.abs(values).max()
    zero = quantize(np.zeros(1), found.scale, found.zero_point, grid)
    assert dequantize(zero, found.scale, found.zero_point) == 0.0


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(bounds=st.tuples(finite, finite).map(sorted), grid=st.sampled_from(SMALL))
def test_values_of_the_range_come_back_within_half_a_step_when_symmetric(bounds: list[float], grid: Grid) -> None:
    found = symmetric(*bounds, grid)
    values = np.linspace(*bounds, 101, dtype=np.float64)
    stored = quantize(values, found.scale, found.zero_point, grid)
    back = dequantize(stored, found.scale, found.zero_point)
    assert np.abs(back - values).max() <= 0.501 * found.scale + 1e-6 * np.abs(values).max()
    assert stored.min() > grid.low or grid.low == 0, "the least value of a signed grid is not needed"


def test_int8_and_uint8_say_the_same_when_symmetric() -> None:
    signed, unsigned = symmetric(-3.0, 5.0, INT8), symmetric(-3.0, 5.0, UINT8)
    assert (int(signed.zero_point), int(unsigned.zero_point)) == (0, 128)
    values = np.linspace(-5, 5, 999)
    one = quantize(values, signed.scale, signed.zero_point, INT8).astype(int)
    other = quantize(values, unsigned.scale, unsigned.zero_point, UINT8).astype(int)
    np.testing.assert_array_equal(one + 128, other)


@pytest.mark.parametrize(
    ("low", "high", "grid", "scale", "point"),
    [
        (0.0, 255.0, UINT8, 1.0, 0),
        (-128.0, 127.0, INT8, 1.0, 0),
        (-1.0, 1.0, UINT8, 2.0 / 255.0, 128),  # 127.5 to the even neighbour
        (2.0, 51.0, UINT8, 0.2, 0),  # widened to hold 0
        (-51.0, -2.0, UINT8, 0.2, 255),
        (0.0, 0.0, UINT8, 1.0, 0),
        (0.0, 0.0, INT8, 1.0, 0),
        (0.0, 127.0, INT8, 127.0 / 255.0, -128),
    ],
)
def test_scale_and_zero_point_are_those_of_the_definition(
    low: float, high: float, grid: Grid, scale: float, point: int
) -> None:
    found = affine(low, high, grid)
    assert (float(found.scale), int(found.zero_point)) == (pytest.approx(scale, rel=1e-6), point)
    assert (found.scale.dtype, found.zero_point.dtype.name) == (np.float32, grid.dtype)


def test_every_channel_has_its_own_when_bounds_are_arrays() -> None:
    found = symmetric(np.array([-1.0, 0.0, -2.0]), np.array([0.5, 0.0, 4.0]), INT8)
    np.testing.assert_allclose(found.scale, [1 / 127, 1.0, 4 / 127], rtol=1e-6)
    assert found.zero_point.tolist() == [0, 0, 0]


def test_scale_is_a_normal_number_when_the_range_is_tiny() -> None:
    for found in (affine(0.0, 1e-44, UINT8), symmetric(-1e-44, 0.0, INT8)):
        assert found.scale >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1.0), (0.0, np.inf), (-1e39, 1.0), (2.0, 1.0)])
def test_range_is_refused_when_it_is_none(low: float, high: float) -> None:
    for make in (affine, symmetric):
        with pytest.raises(ValueError):
            make(low, high, INT8)


def test_half_scale_is_the_largest_there_is_when_no_float16_is_larger() -> None:
    assert half_scale(np.float32(1e6)) == np.float32(LARGEST_HALF)
