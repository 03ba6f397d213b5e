"""The schemes for processors with and without VNNI, on an emulation of both: who loses what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.saturating import exact, pairwise
from vlexport.calibration.methods import Method, range_of
from vlexport.calibration.observer import Observer, channel_range
from vlexport.calibration.scales import Scaling, affine, symmetric
from vlexport.core.bundle_schema import Machine
from vlexport.core.device_profiles import device_profiles
from vlexport.core.grids import GRIDS, INT7, INT8, UINT8, quantize
from vlexport.core.scheme import LayerRule, choose_scheme
from vlexport.targets import open_target

NOBODY = Machine(cpu="", instruction_set=(), cores=1, system="", python="")


def linear_rule(device: str) -> LayerRule:
    schemes = open_target("onnxruntime").schemes()
    found = choose_scheme(schemes, "int8", device_profiles()[device], NOBODY).layer("linear")
    assert found is not None
    return found


def sqnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10.0 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()))


def linear(values: np.ndarray, weight: np.ndarray, rule: LayerRule, *, saturates: bool) -> np.ndarray:
    """A linear layer as the scheme has it: calibrated, in integers, back in float."""
    seen = Observer()
    seen.update(values)
    assert rule.activation is not None
    assert rule.weight is not None
    x = affine(*range_of(seen, Method()), GRIDS[rule.activation.type])
    w: Scaling = symmetric(*channel_range(weight, 0), GRIDS[rule.weight.type])
    stored = quantize(weight, w.scale, w.zero_point, w.grid, axis=0)
    integers = quantize(values, x.scale, x.zero_point, x.grid)
    sums = (pairwise if saturates else exact)(integers, stored)
    sums = sums - int(x.zero_point) * stored.astype(np.int64).sum(1)
    return np.asarray(sums * (float(x.scale) * w.scale.astype(np.float64)))


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """Activations after a ReLU6, of which many stand at its end, and weights that fill their range."""
    rng = np.random.default_rng(0)
    values = np.clip(4.0 * rng.normal(size=(64, 192)), 0.0, 6.0)
    return values.astype(np.float32), rng.uniform(-1.0, 1.0, size=(96, 192)).astype(np.float32)


def test_scheme_without_vnni_loses_nothing_when_pairs_are_added_in_16_bits(
    layer: tuple[np.ndarray, np.ndarray],
) -> None:
    rule = linear_rule("cpu-x86-avx2")
    np.testing.assert_array_equal(linear(*layer, rule, saturates=True), linear(*layer, rule, saturates=False))
    values, weight = layer
    assert sqnr_db(linear(values, weight, rule, saturates=True), values @ weight.T) > 30.0


def test_scheme_for_vnni_is_shown_to_lose_when_pairs_are_added_in_16_bits(
    layer: tuple[np.ndarray, np.ndarray],
) -> None:
    values, weight = layer
    wanted = values @ weight.T
    rule = linear_rule("cpu-x86-vnni")
    right, wrong = (sqnr_db(linear(values, weight, rule, saturates=s), wanted) for s in (False, True))
    assert right > 35.0, "where products are added in 32 bits it is the better of the two"
    assert right > sqnr_db(linear(values, weight, linear_rule("cpu-x86-avx2"), saturates=False), wanted) + 1.0
    assert wrong < right - 6.0


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(UINT8.low, UINT8.high), st.integers(INT7.low, INT7.high)), min_size=1, max_size=8)
)
def test_no_pair_saturates_when_weights_have_7_bits(pairs: list[tuple[int, int]]) -> None:
    doubled = [each for pair in pairs for each in (pair, pair)]  # the worst neighbour is an equal one
    a = np.array([[x for x, _ in doubled]], np.uint8)
    w = np.array([[y for _, y in doubled]], np.int8)
    np.testing.assert_array_equal(pairwise(a, w), exact(a, w))


def test_a_pair_saturates_when_weights_have_8_bits() -> None:
    a, w = np.full((1, 2), UINT8.high, np.uint8), np.full((1, 2), INT8.high, np.int8)
    assert (int(pairwise(a, w)[0, 0]), int(exact(a, w)[0, 0])) == (32767, 64770)
