"""How far two outputs lie apart, and how often a model is right. Streaming: memory does not grow with samples.

Everything is computed in float64. In every pair the first argument is ours and the second the reference.
A tie of scores goes to the lowest index, here and wherever a class is picked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from vlexport.core.artifact import Array, Frozen
from vlexport.core.errors import DataError
from vlexport.core.intervals import Z95

Floats = npt.NDArray[np.float64]


def _as_floats(array: Array) -> Floats:
    return np.asarray(array, dtype=np.float64).reshape(-1)


def _same_non_finite(a: Floats, b: Floats) -> bool:
    """NaN meets NaN and each infinity its own sign."""
    odd_a, odd_b = ~np.isfinite(a), ~np.isfinite(b)
    return bool(np.array_equal(odd_a, odd_b)) and bool(np.array_equal(a[odd_a], b[odd_b], equal_nan=True))


def _finite_pair(a: Array, b: Array) -> tuple[Floats, Floats] | None:
    """Both arrays flat, at their finite values, or None when they differ in shape or in non-finite values."""
    if np.shape(a) != np.shape(b):
        return None
    flat_a, flat_b = _as_floats(a), _as_floats(b)
    if not _same_non_finite(flat_a, flat_b):
        return None
    finite = np.isfinite(flat_b)
    return flat_a[finite], flat_b[finite]


def relative_error(ours: Array, reference: Array) -> float:
    """Largest difference as a share of the reference's largest value.

    Equation:
        max|a − b| / max|b| over finite values; max|a − b| where b is all zero.

    Args:
        ours: Array of any shape.
        reference: Array of the same shape and kind of dtype.

    Returns:
        0 for equal arrays and for empty ones; ``inf`` when shapes or kinds of dtype (float, integer, bool) differ,
        or when NaN or an infinity of one sign does not meet its like. Integer and boolean arrays give 0 or ``inf``.
    """
    ours, reference = np.asarray(ours), np.asarray(reference)
    if ours.shape != reference.shape or ours.dtype.kind != reference.dtype.kind:
        return math.inf
    if ours.dtype.kind != "f":
        return 0.0 if np.array_equal(ours, reference) else math.inf
    pair = _finite_pair(ours, reference)
    if pair is None:
        return math.inf
    a, b = pair
    if not a.size:
        return 0.0
    largest = float(np.abs(b).max())
    unit = max(largest, float(np.abs(a).max())) or 1.0  # the difference of two huge values must not overflow
    difference = float(np.abs(a / unit - b / unit).max())
    return difference / (largest / unit) if largest / unit > 0 else difference * unit


def cosine(ours: Array, reference: Array) -> float:
    """Cosine of the angle between two arrays, flattened.

    Args:
        ours: Array of any shape.
        reference: Array of the same shape.

    Returns:
        −1 to 1 over finite values: 1 when both are zero or empty, 0 when one is zero, −1 (the worst) when shapes or
        non-finite values differ.
    """
    pair = _finite_pair(ours, reference)
    if pair is None:
        return -1.0
    a, b = pair
    largest_a, largest_b = float(np.abs(a).max(initial=0.0)), float(np.abs(b).max(initial=0.0))
    if not largest_a or not largest_b:
        return 1.0 if largest_a == largest_b else 0.0
    a, b = a / largest_a, b / largest_b
    value = float(a @ b) / (float(np.linalg.norm(a)) * float(np.linalg.norm(b)))
    return min(1.0, max(-1.0, value))


def sqnr_db(ours: Array, reference: Array) -> float:
    """Signal to quantization-noise ratio; the reference is the signal.

    Equation:
        10·log10(Σ b² / Σ (a − b)²) over finite values.

    Args:
        ours: Array of any shape.
        reference: Array of the same shape.

    Returns:
        Decibels: ``inf`` without noise; ``-inf`` with noise on a zero signal, or when shapes or non-finite values
        differ.
    """
    pair = _finite_pair(ours, reference)
    if pair is None:
        return -math.inf
    a, b = pair
    return _decibels(float(b @ b), float((a - b) @ (a - b)))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf


class OutputFidelity(Frozen):
    """How near one output is to the reference's, over all samples.

    Attributes:
        samples: Number of samples.
        cosine_mean: Mean of the samples' cosines.
        cosine_min: Their minimum.
        sqnr_db: Signal to noise of all values together, in decibels.
        relative_error: ``max|a−b| / max|b|``, both over the values of all samples: one sample whose scores are all near
            zero says nothing about the output's scale.
        agreements: Samples whose highest score has the same index; None unless a sample is one vector of ≥ 2 floats.
    """

    samples: int
    cosine_mean: float
    cosine_min: float
    sqnr_db: float
    relative_error: float
    agreements: int | None


class _Running:
    """Sums over the samples of one output."""

    def __init__(self) -> None:
        self.samples = 0
        self.cosine_sum = 0.0
        self.cosine_min = 1.0
        self.signal = 0.0
        self.noise = 0.0
        self.error_max = 0.0
        self.scale_max = 0.0
        self.agreements: int | None = 0

    def add(self, ours: Array, reference: Array) -> None:
        value = cosine(ours, reference)
        self.samples += 1
        self.cosine_sum += value
        self.cosine_min = min(self.cosine_min, value)
        pair = _finite_pair(ours, reference)
        if pair is None:
            self.noise = self.error_max = math.inf
        else:
            self.error_max = max(self.error_max, float(np.abs(pair[0] - pair[1]).max(initial=0.0)))
            self.scale_max = max(self.scale_max, float(np.abs(pair[1]).max(initial=0.0)))
            self.signal += float(pair[1] @ pair[1])
            self.noise += float((pair[0] - pair[1]) @ (pair[0] - pair[1]))
        if reference.ndim != 1 or reference.size < 2 or reference.dtype.kind != "f":
            self.agreements = None
        elif self.agreements is not None and ours.shape == reference.shape:
            self.agreements += int(np.argmax(ours) == np.argmax(reference))

    def result(self) -> OutputFidelity:
        return OutputFidelity(
            samples=self.samples,
            cosine_mean=self.cosine_sum / self.samples,
            cosine_min=self.cosine_min,
            sqnr_db=-math.inf if math.isinf(self.noise) else _decibels(self.signal, self.noise),
            relative_error=self.error_max / (self.scale_max or 1.0),
            agreements=self.agreements,
        )


class Fidelity:
    """Collects, per output, how near ours is to the reference. Needs no labels."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Running] = {}

    def update(self, ours: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        """Add one batch.

        Args:
            ours: Output name → array of shape (N, …); each of the N rows is one sample.
            reference: The same names and numbers of rows.

        Raises:
            ValueError: Names or numbers of rows differ, or an output has no leading N.
        """
        if set(ours) != set(reference):
            raise ValueError(f"outputs {sorted(ours)} were compared with {sorted(reference)}")
        for name, wanted in reference.items():
            have = ours[name]
            if np.ndim(have) < 1 or np.ndim(wanted) < 1 or len(have) != len(wanted):
                raise ValueError(f"output {name}: shapes {np.shape(have)} and {np.shape(wanted)} hold no equal N")
            running = self._outputs.setdefault(name, _Running())
            for row, wanted_row in zip(np.asarray(have), np.asarray(wanted), strict=True):
                running.add(np.asarray(row), np.asarray(wanted_row))

    def result(self) -> dict[str, OutputFidelity]:
        """Output name → figures; empty before the first sample."""
        return {name: running.result() for name, running in self._outputs.items() if running.samples}


def _ranks(logits: Array, labels: Array) -> npt.NDArray[np.int64]:
    """Rank of the right class in each row, 0 = first; a row that holds NaN ranks last.

    Raises:
        DataError: VLX0208 when a label is no class of the output.
        ValueError: ``logits`` is not (N, C), or ``labels`` not (N,).
    """
    scores, wanted = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or wanted.shape != scores.shape[:1] or wanted.dtype.kind not in "iu":
        raise ValueError(
            f"logits are (N, C) and labels N integers, not {scores.shape} and {wanted.dtype}{wanted.shape}"
        )
    classes = scores.shape[1]
    outside = wanted[(wanted < 0) | (wanted >= classes)]
    if outside.size:
        raise DataError(
            "VLX0208",
            f"label {outside[0]} is no class of an output of {classes}",
            hint="check that the labels count from 0 and belong to this model",
        )
    target = np.take_along_axis(scores, wanted[:, None].astype(np.int64), axis=1)
    lower_index = np.arange(classes)[None, :] < wanted[:, None]
    ranks = np.sum((scores > target) | ((scores == target) & lower_index), axis=1)
    return np.where(np.isnan(scores).any(axis=1), classes, ranks).astype(np.int64)


class Accuracy:
    """Counts how often the right class is first, and among the first five.

    Attributes:
        samples: Number of samples.
        top1: Samples whose right class scores highest (a tie goes to the lowest index).
        top5: Samples whose right class is among the five highest; all of them with five classes or fewer.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.top1 = 0
        self.top5 = 0

    def update(self, logits: Array, labels: Array) -> None:
        """Add one batch. A row that holds NaN counts as wrong.

        Args:
            logits: Scores, shape (N, C), any float dtype.
            labels: Class indices, shape (N,), any integer dtype.

        Raises:
            DataError: VLX0208 when a label is no class of the output.
            ValueError: The shapes do not fit.
        """
        ranks = _ranks(logits, labels)
        valid = ranks < np.shape(logits)[1]
        self.samples += len(ranks)
        self.top1 += int(np.sum(valid & (ranks < 1)))
        self.top5 += int(np.sum(valid & (ranks < 5)))


class PairedAccuracy:
    """Counts, on the same samples, who is right: the input of :func:`vlexport.core.intervals.tango`.

    Attributes:
        samples: Number of samples.
        both: Samples that both get right (top-1).
        only_reference: Samples that only the reference gets right.
        only_ours: Samples that only ours gets right.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.both = 0
        self.only_reference = 0
        self.only_ours = 0

    def update(self, ours: Array, reference: Array, labels: Array) -> None:
        """Add one batch.

        Args:
            ours: Our scores, shape (N, C).
            reference: The reference's scores, shape (N, C).
            labels: Class indices, shape (N,).

        Raises:
            DataError: VLX0208 when a label is no class of the output.
            ValueError: The shapes do not fit.
        """
        right = _ranks(ours, labels) == 0
        reference_right = _ranks(reference, labels) == 0
        self.samples += len(right)
        self.both += int(np.sum(right & reference_right))
        self.only_reference += int(np.sum(~right & reference_right))
        self.only_ours += int(np.sum(right & ~reference_right))


class RunningMean:
    """Mean of a stream of figures with its 95 % interval (Welford's sums: nothing is kept, nothing cancels).

    Attributes:
        samples: Number of figures.
        mean: Their mean; NaN before the first.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.mean = math.nan
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Add one figure."""
        self.samples += 1
        before = 0.0 if self.samples == 1 else self.mean
        self.mean = before + (value - before) / self.samples
        self._squares += (value - before) * (value - self.mean)

    def interval(self) -> tuple[float, float]:
        """The normal interval of the mean over samples.

        Equation:
            mean ± 1.96·s/√n, with s² = Σ(x − mean)²/(n − 1).

        Returns:
            Lower and upper bound; infinite for fewer than two samples. Without spread its width is zero, and with few
            samples it is too narrow: whoever shows it says on how many it rests.
        """
        if self.samples < 2:
            return -math.inf, math.inf
        half = Z95 * math.sqrt(self._squares / (self.samples - 1) / self.samples)
        return self.mean - half, self.mean + half
