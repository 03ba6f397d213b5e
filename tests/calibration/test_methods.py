"""Ranges of every method, against references that hold all values in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlexport.calibration.histogram import HALF
from vlexport.calibration.methods import Method, MethodName, range_of
from vlexport.calibration.observer import MOMENTUM, NotFiniteError, Observer, channel_range
from vlexport.calibration.scales import affine, symmetric
from vlexport.core.grids import INT8, UINT8, dequantize, quantize

NAMES: tuple[MethodName, ...] = ("min-max", "moving-average", "percentile", "entropy", "mse")


def observed(parts: np.ndarray, **options: object) -> Observer:
    found = Observer(**options)  # type: ignore[arg-type]
    for part in parts:
        found.update(part)
    return found


def drawn(kind: str, seed: int = 0) -> np.ndarray:
    """(runs, values) of a shape that layers have."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(6, 4000)).astype(np.float32)
    if kind == "outliers":
        normal[::2, :3] *= 40.0
    elif kind == "gelu":
        normal = (normal * 0.5 * (1.0 + np.vectorize(math.erf)(normal / math.sqrt(2.0)))).astype(np.float32)
    elif kind == "relu":
        normal = np.maximum(normal, 0.0)
    elif kind == "softmax":
        normal = (np.exp(4 * normal) / np.exp(4 * normal).sum(1, keepdims=True)).astype(np.float32)
    return normal


KINDS = ("normal", "outliers", "gelu", "relu", "softmax")


def entropy_by_hand(values: np.ndarray, levels: int) -> tuple[int, float]:
    """Bins kept, and their width, of all values in memory: loops over bins and levels, as the method is told."""
    top = float(np.abs(values).max())
    width = 2.0 ** (math.floor(math.log2(top)) + 1) / HALF
    counts = [0] * HALF
    for value in np.abs(values[values != 0.0]).astype(np.float64) / width:
        counts[min(int(value), HALF - 1)] += 1
    used = max(i for i, count in enumerate(counts) if count) + 1
    best, least = used, math.inf
    for kept in range(used, levels - 1, -1):
        p = counts[:kept]
        p[-1] += sum(counts[kept:])
        q = [0.0] * kept
        for level in range(levels):
            start, end = level * kept // levels, (level + 1) * kept // levels
            holders = [i for i in range(start, end) if p[i]]
            for i in holders:
                q[i] = sum(counts[start:end]) / len(holders)
        all_p, all_q = sum(p), sum(q)
        found = 0.0
        for a, b in zip(p, q, strict=True):
            if a:
                found += a / all_p * math.log(a / all_p / max(b / all_q, 1e-9))
        if found < least - 1e-12:
            best, least = kept, found
    return best, width


@pytest.mark.parametrize("kind", ["outliers", "gelu", "softmax"])
def test_entropy_is_that_of_the_full_memory_reference_to_a_bin(kind: str) -> None:
    parts = drawn(kind)[:3]
    levels = 256 if parts.min() >= 0.0 else 128
    kept, width = entropy_by_hand(parts.ravel(), levels)
    low, high = range_of(observed(parts), Method(name="entropy"))
    wanted = min(kept * width, float(parts.max()))
    assert abs(high - wanted) <= width
    assert abs(low - max(-kept * width, float(parts.min()))) <= width


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_that_of_the_full_memory_reference_to_a_bin(kind: str, percentile: float) -> None:
    parts = drawn(kind)
    seen = observed(parts)
    low, high = range_of(seen, Method(name="percentile", percentile=percentile))
    outside = (1.0 - percentile / 100.0) / 2.0
    for found, share in ((low, outside), (high, 1.0 - outside)):
        least, most = (float(np.quantile(parts, share, method=m)) for m in ("lower", "higher"))
        assert least - seen.histogram.width <= found <= most + seen.histogram.width


def test_moving_average_is_that_of_its_definition_when_runs_differ() -> None:
    parts = drawn("outliers")
    low, high = float(parts[0].min()), float(parts[0].max())
    for part in parts[1:]:
        low = MOMENTUM * low + (1 - MOMENTUM) * float(part.min())
        high = MOMENTUM * high + (1 - MOMENTUM) * float(part.max())
    assert range_of(observed(parts), Method(name="moving-average")) == pytest.approx((low, high))


def squared_error(values: np.ndarray, low: float, high: float, *, even: bool) -> float:
    found = symmetric(low, high, INT8) if even else affine(low, high, UINT8)
    grid = INT8 if even else UINT8
    back = dequantize(quantize(values, found.scale, found.zero_point, grid), found.scale, found.zero_point)
    return float(np.mean((back.astype(np.float64) - values) ** 2))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_near_the_least_that_any_range_reaches_when_all_are_tried(kind: str, even: bool) -> None:
    values = drawn(kind)
    low, high = range_of(observed(values), Method(name="mse", symmetric=even))
    shares = np.geomspace(0.02, 1.0, 60)
    tried = [
        squared_error(values, float(values.min()) * a, float(values.max()) * b, even=even)
        for a in (shares[::4] if values.min() < 0.0 else [1.0])
        for b in shares
    ]
    assert squared_error(values, low, high, even=even) <= 1.1 * min(tried)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_range_lies_within_what_was_seen_whatever_the_method(kind: str, name: MethodName) -> None:
    values = drawn(kind)
    seen = observed(values)
    low, high = range_of(seen, Method(name=name))
    assert float(values.min()) <= low < high <= float(values.max())
    even = range_of(seen, Method(name=name, symmetric=True))
    assert even[0] == -even[1]
    assert even[1] <= float(np.abs(values).max())


@pytest.mark.parametrize("name", ["percentile", "entropy"])
def test_outliers_are_cut_off_when_the_method_weighs_counts(name: MethodName) -> None:
    values = drawn("outliers")
    _, high = range_of(observed(values), Method(name=name, percentile=99.9))
    assert high < 0.5 * float(values.max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-38])
def test_constant_values_keep_their_range_whatever_the_method(value: float, name: MethodName) -> None:
    seen = observed(np.full((3, 10), value, np.float32))
    assert range_of(seen, Method(name=name)) == (np.float32(value), np.float32(value))


hostile = st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), min_size=1, max_size=5)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(hostile, st.sampled_from(NAMES), st.booleans())
def test_some_finite_range_is_given_when_values_are_hostile(
    parts: list[list[float]], name: MethodName, even: bool
) -> None:
    seen = Observer()
    for part in parts:
        seen.update(np.array(part, np.float32))
    low, high = range_of(seen, Method(name=name, symmetric=even))
    assert -(2.0**100) <= low <= high <= 2.0**100


def test_extremes_are_kept_when_no_histogram_is_wanted() -> None:
    values = drawn("normal")
    seen = observed(values, with_histogram=False)
    assert range_of(seen, Method()) == (float(values.min()), float(values.max()))
    assert (seen.histogram.total, seen.elements, seen.runs) == (0, values.size, len(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_array_is_refused_when_a_value_is_not_finite(bad: float) -> None:
    seen = observed(drawn("normal"))
    before = (seen.minimum, seen.maximum, seen.elements, seen.histogram.total)
    with pytest.raises(NotFiniteError, match="NaN" if math.isnan(bad) else "infinity"):
        seen.update(np.array([1.0, bad], np.float32))
    assert (seen.minimum, seen.maximum, seen.elements, seen.histogram.total) == before


def test_channels_have_their_own_extremes_when_asked_for() -> None:
    rng = np.random.default_rng(3)
    parts = rng.normal(size=(4, 2, 5, 3)).astype(np.float32) * np.array([1.0, 50.0, 1.0], np.float32)
    seen = observed(parts, channel_axis=-1)
    flat = parts.reshape(-1, 3)
    np.testing.assert_array_equal(seen.channel_low, flat.min(0))
    np.testing.assert_array_equal(seen.channel_high, flat.max(0))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weight_has_a_range_a_channel_whatever_the_axis(axis: int) -> None:
    weight = np.random.default_rng(4).normal(size=(6, 4, 3, 3)).astype(np.float32)
    low, high = channel_range(weight, axis)
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    np.testing.assert_array_equal((low, high), (rows.min(1), rows.max(1)))


def test_digest_tells_methods_apart_when_any_option_differs() -> None:
    methods = [*(Method(name=n) for n in NAMES), Method(name="percentile", percentile=99.0), Method(symmetric=True)]
    assert len({m.digest() for m in methods}) == len(methods)
    assert Method().digest(batch=4) == Method().digest()
    assert Method(name="moving-average").digest(batch=4) != Method(name="moving-average").digest()
