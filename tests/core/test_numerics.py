from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vlexport.core.errors import DataError
from vlexport.core.intervals import Z95, clopper_pearson, incomplete_beta, samples_needed, tango, wilson
from vlexport.core.numerics import Accuracy, Fidelity, PairedAccuracy, cosine, relative_error, sqnr_db

DOUBLE = 1e-12  # rounding of a few float64 operations
vectors = arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e6, 1e6, width=32))


def row(*values: float) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(values, dtype=np.float32)


# Comparing arrays


def test_relative_error_is_the_largest_difference_over_the_references_largest_when_finite() -> None:
    assert relative_error(row(1, 2, 3), row(1, 2, 4)) == pytest.approx(0.25, abs=DOUBLE)
    assert relative_error(row(1, 2, 4), row(1, 2, 3)) == pytest.approx(1 / 3, abs=DOUBLE)


@pytest.mark.parametrize(
    ("ours", "reference", "wanted"),
    [
        (row(0.5), row(0), 0.5),
        (row(0), row(0), 0),
        (row(), row(), 0),
        (row(np.nan, 1, np.inf), row(np.nan, 1, np.inf), 0),
        (row(np.nan, 1), row(np.nan, 2), 0.5),
        (row(np.nan), row(1), math.inf),
        (row(1), row(np.nan), math.inf),
        (row(np.inf), row(-np.inf), math.inf),
        (row(np.inf), row(np.nan), math.inf),
        (row(1, 1), row(1), math.inf),
        (row(1), np.array([1]), math.inf),
        (np.array([1, 2]), np.array([1, 2]), 0),
        (np.array([1, 2]), np.array([1, 3]), math.inf),
        (np.array([2**53]), np.array([2**53 + 1]), math.inf),
        (np.array([True]), np.array([False]), math.inf),
        (row(1).astype(np.float16), row(1), 0),
        (np.array([1.7e308]), np.array([-1.7e308]), 2),
    ],
)
def test_relative_error_holds_its_convention_when_values_are_special(ours, reference, wanted) -> None:  # type: ignore[no-untyped-def]
    assert relative_error(ours, reference) == pytest.approx(wanted, rel=DOUBLE)


@pytest.mark.parametrize(
    ("ours", "reference", "wanted"),
    [
        (row(1, 0), row(2, 0), 1),
        (row(1, 0), row(0, 3), 0),
        (row(1, 1), row(-2, -2), -1),
        (row(0, 0), row(0, 0), 1),
        (row(0, 0), row(0, 1), 0),
        (row(np.nan, 1), row(1, 1), -1),
        (row(np.nan, 1), row(np.nan, 2), 1),
        (np.array([1e200, 1e200]), np.array([1e-200, 1e-200]), 1),
    ],
)
def test_cosine_holds_its_convention_when_values_are_special(ours, reference, wanted) -> None:  # type: ignore[no-untyped-def]
    assert cosine(ours, reference) == pytest.approx(wanted, abs=DOUBLE)


def test_sqnr_is_in_decibels_of_the_reference_when_noise_is_known() -> None:
    reference = np.full(100, 10.0)
    assert sqnr_db(reference + 1, reference) == pytest.approx(20, abs=1e-9)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference, 0 * reference) == -math.inf
    assert sqnr_db(np.full(100, np.nan), reference) == -math.inf


@settings(derandomize=True, deadline=None)
@given(vectors, st.floats(0.0078125, 128, width=32))
def test_measures_are_perfect_with_itself_and_blind_to_common_scale_when_values_vary(x, scale) -> None:  # type: ignore[no-untyped-def]
    x = x.astype(np.float64)
    assert relative_error(x, x) == 0
    assert sqnr_db(x, x) == math.inf
    assert cosine(x * scale, x) == pytest.approx(1, abs=DOUBLE)
    assert relative_error(x * scale, 2 * x * scale) == pytest.approx(relative_error(x, 2 * x), rel=1e-9)


# Streaming


def test_fidelity_equals_the_whole_when_samples_come_in_batches() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(10, 7)).astype(np.float32)
    ours = reference + rng.normal(scale=0.3, size=reference.shape).astype(np.float32)
    ours[3] = -reference[3]
    running = Fidelity()
    for part in (slice(0, 1), slice(1, 6), slice(6, 10)):
        running.update({"logits": ours[part]}, {"logits": reference[part]})
    result = running.result()["logits"]
    cosines = [cosine(a, b) for a, b in zip(ours, reference, strict=True)]
    assert result.samples == 10
    assert result.cosine_mean == pytest.approx(np.mean(cosines), abs=DOUBLE)
    assert result.cosine_min == pytest.approx(-1, abs=DOUBLE)
    assert result.sqnr_db == pytest.approx(sqnr_db(ours, reference), abs=1e-9)
    assert result.relative_error == pytest.approx(relative_error(ours, reference), abs=DOUBLE)
    assert result.agreements == int(np.sum(ours.argmax(1) == reference.argmax(1))) < 10


def test_fidelity_reports_the_worst_when_ours_holds_nan() -> None:
    running = Fidelity()
    good = np.ones((1, 3), np.float32)
    running.update({"y": good}, {"y": good})
    running.update({"y": good * np.nan}, {"y": good})
    result = running.result()["y"]
    assert (result.cosine_min, result.relative_error, result.sqnr_db) == (-1, math.inf, -math.inf)


def test_fidelity_counts_no_agreement_when_output_is_no_vector_of_scores() -> None:
    running = Fidelity()
    maps, ids = np.ones((2, 3, 4), np.float32), np.ones((2, 3), np.int64)
    running.update({"maps": maps, "ids": ids}, {"maps": maps, "ids": ids})
    assert [r.agreements for r in running.result().values()] == [None, None]


def test_fidelity_refuses_when_names_or_rows_differ() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError):
        Fidelity().update({"a": x}, {"b": x})
    with pytest.raises(ValueError):
        Fidelity().update({"a": x}, {"a": x[:1]})


def test_accuracy_gives_ties_to_the_lowest_index_when_scores_are_equal() -> None:
    accuracy = Accuracy()
    accuracy.update(np.zeros((3, 8)), np.array([0, 4, 5]))
    assert (accuracy.samples, accuracy.top1, accuracy.top5) == (3, 1, 2)


def test_accuracy_agrees_with_sorting_when_scores_are_random() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(500, 20)), rng.integers(0, 20, 500)
    accuracy = Accuracy()
    for start in range(0, 500, 64):
        accuracy.update(logits[start : start + 64], labels[start : start + 64])
    order = np.argsort(-logits, axis=1, kind="stable")
    assert accuracy.top1 == np.sum(order[:, 0] == labels)
    assert accuracy.top5 == np.sum(order[:, :5] == labels[:, None])
    assert 0 < accuracy.top1 < accuracy.top5 < 500


def test_accuracy_counts_a_row_as_wrong_when_it_holds_nan() -> None:
    accuracy = Accuracy()
    accuracy.update(np.array([[np.nan, 1.0], [0.0, 1.0]]), np.array([1, 1]))
    assert (accuracy.top1, accuracy.top5) == (1, 1)


@pytest.mark.parametrize("label", [-1, 3])
def test_accuracy_refuses_when_label_is_no_class(label: int) -> None:
    with pytest.raises(DataError) as caught:
        Accuracy().update(np.zeros((1, 3)), np.array([label]))
    assert caught.value.code == "VLX0208"


def test_paired_accuracy_sorts_samples_by_who_is_right_when_models_differ() -> None:
    labels = np.array([0, 0, 0, 0])
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    paired = PairedAccuracy()
    paired.update(np.array([right, wrong, right]), np.array([right, right, wrong]), labels[:3])
    paired.update(np.array([wrong]), np.array([wrong]), labels[3:])
    assert (paired.samples, paired.both, paired.only_reference, paired.only_ours) == (4, 1, 1, 1)


# Intervals


@pytest.mark.parametrize(
    ("k", "n", "wanted"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), 857-872, Table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_equals_published_values_when_counts_are_newcombes(k: int, n: int, wanted: tuple[float, float]) -> None:
    assert wilson(k, n) == pytest.approx(wanted, abs=5.1e-5)  # published to 4 digits


@pytest.mark.parametrize(
    ("k", "n", "wanted"),
    [
        # The same table, method 5; the last row from scipy.stats.beta 1.17.
        (81, 263, (0.2527, 0.3676)),
        (15, 148, (0.0578, 0.1617)),
        (0, 20, (0.0, 0.1684)),
        (1, 29, (0.0009, 0.1776)),
        (9990, 10000, (0.99816174, 0.99952036)),
    ],
)
def test_clopper_pearson_equals_published_values_when_counts_are_newcombes(
    k: int, n: int, wanted: tuple[float, float]
) -> None:
    assert clopper_pearson(k, n) == pytest.approx(wanted, abs=5.1e-5 if n < 1000 else 1e-8)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))), st.floats(0.001, 0.999))
def test_incomplete_beta_is_the_binomial_tail_when_shapes_are_integers(counts: tuple[int, int], p: float) -> None:
    k, n = counts
    tail = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    assert incomplete_beta(p, k, n - k + 1) == pytest.approx(tail, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("b", "c", "n", "wanted"),
    [
        # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), 2850-2875, Table V: the pairs (1, 1, 7, 12).
        (1, 7, 21, (-0.517, -0.026)),
        # The pairs (53, 16, 8, 9), as in the tests of the R package ratesci (Tango's method).
        (16, 8, 86, (-0.020, 0.207)),
    ],
)
def test_tango_equals_published_values_when_counts_are_known(
    b: int, c: int, n: int, wanted: tuple[float, float]
) -> None:
    assert tango(b, c, n) == pytest.approx(wanted, abs=5.1e-4)  # published to 3 digits


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_tango_has_a_known_width_when_nothing_disagrees(n: int) -> None:
    limit = Z95**2 / (n + Z95**2)
    assert tango(0, 0, n) == pytest.approx((-limit, limit), abs=DOUBLE)


pairs = st.integers(1, 300).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


@settings(derandomize=True, deadline=None)
@given(pairs)
def test_tango_inverts_the_score_test_when_counts_vary(counts: tuple[int, int, int]) -> None:
    b, c, n = counts
    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert low < high
    assert tango(c, b, n) == pytest.approx((-high, -low), abs=DOUBLE)
    # At zero the score test is McNemar's: (b − c)² / (b + c).
    mcnemar = (b - c) ** 2 / (b + c) if b + c else 0.0
    if abs(mcnemar - Z95**2) > 1e-6:
        assert (low > 0 or high < 0) == (mcnemar > Z95**2)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_rate_intervals_hold_the_rate_and_mirror_when_counts_vary(counts: tuple[int, int]) -> None:
    k, n = counts
    for interval in (wilson, clopper_pearson):
        low, high = interval(k, n)
        assert 0 <= low <= k / n <= high <= 1
        assert low < high
        assert interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(
    ("n", "p_b", "p_c"), [(50, 0.05, 0.05), (50, 0.2, 0.1), (200, 0.03, 0.01), (200, 0.1, 0.02), (1000, 0.01, 0.005)]
)
def test_tango_covers_the_truth_in_95_percent_when_pairs_are_simulated(n: int, p_b: float, p_c: float) -> None:
    rng = np.random.default_rng(20)
    drawn = rng.multinomial(n, [p_b, p_c, 1 - p_b - p_c], size=1500)
    tables, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    inside = 0
    for (b, c), count in zip(tables.tolist(), times.tolist(), strict=True):
        low, high = tango(b, c, n)
        inside += count * (low <= p_b - p_c <= high)
    # 1500 draws put 95 % between 93.3 and 96.7 % at 3 sigma; the score interval itself strays by about 1 point.
    assert 0.925 <= inside / 1500 <= 0.98


def test_clopper_pearson_never_covers_less_than_95_percent_when_summed_exactly() -> None:
    for n, p in [(10, 0.3), (30, 0.05), (50, 0.98)]:
        covered = 0.0
        for k in range(n + 1):
            low, high = clopper_pearson(k, n)
            covered += (low <= p <= high) * math.comb(n, k) * p**k * (1 - p) ** (n - k)
        assert 0.95 <= covered < 1, (n, p)


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
def test_rate_intervals_say_nothing_or_refuse_when_counts_are_empty_or_wrong(interval) -> None:  # type: ignore[no-untyped-def]
    assert interval(0, 0) == (0, 1)
    for k, n in [(-1, 5), (6, 5)]:
        with pytest.raises(ValueError):
            interval(k, n)
    assert tango(0, 0, 0) == (-1, 1)
    with pytest.raises(ValueError):
        tango(3, 3, 5)


def test_samples_needed_is_the_smallest_count_that_decides_when_rates_stay() -> None:
    # Without disagreement the upper end is z²/(n + z²): it falls to 0.005 at n = 199·z² = 764.5.
    def decided(low: float, high: float) -> bool:
        return high <= 0.005

    assert samples_needed(lambda n: tango(0, 0, n), decided, n=100) == math.ceil(199 * Z95**2) == 765
    assert samples_needed(lambda n: tango(0, 0, n), decided, n=2000) == 2000
    assert samples_needed(lambda n: tango(0.005 * n, 0, n), decided, n=100, limit=10**6) is None
