"""Linear heads on features, by folds: every sample is judged by a head that never saw it. numpy only.

Softmax regression of two classes on standardised features with a squared penalty, as ``samples/solar_cells/train.py``
fits it, solved by Newton's method: it is convex, starts from zero and needs no seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]

FOLDS = 5
PENALTIES = (3e-3, 1e-2, 3e-2)
_STEPS = 30
_SMALLEST_STEP = 1e-8


@dataclass(frozen=True)
class Head:
    """``x @ weight + bias`` is above zero where the second class is the likelier one.

    Attributes:
        weight: (features,) float64.
        bias: A number.
        penalty: What it was fitted with.
    """

    weight: Floats
    bias: float
    penalty: float

    def scores(self, features: Floats) -> Floats:
        """(samples, features) → (samples,): log-odds of the second class."""
        found: Floats = features.astype(np.float64) @ self.weight + self.bias
        return found


def folds(names: Sequence[str]) -> Counts:
    """The fold of each sample: by the rank of its name's SHA-256, so that order and class of the samples are mixed."""
    by_hash = sorted(range(len(names)), key=lambda index: hashlib.sha256(names[index].encode()).digest())
    found = np.empty(len(names), np.int64)
    found[by_hash] = np.arange(len(names)) % FOLDS
    return found


def fit(features: Floats, labels: Counts, penalty: float) -> Head:
    """The minimum of ``mean log-loss + penalty/2 · |w|²`` over standardised features.

    Args:
        features: (samples, features).
        labels: (samples,), 0 or 1; both occur.
        penalty: > 0. The half makes it that of two classes with a weight each.
    """
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    whole = np.column_stack([(features - mean) / deviation, np.ones(len(features))])
    ridge = np.full(whole.shape[1], penalty)
    ridge[-1] = 0
    solution = np.zeros(whole.shape[1])
    for _ in range(_STEPS):
        likely = 1 / (1 + np.exp(-(whole @ solution)))
        gradient = whole.T @ (likely - labels) / len(labels) + ridge * solution
        curvature = (whole.T * (likely * (1 - likely))) @ whole / len(labels)
        step = np.linalg.solve(curvature + np.diag(ridge), gradient)
        solution -= step
        if np.abs(step).max() < _SMALLEST_STEP:
            break
    weight = solution[:-1] / deviation
    return Head(weight, float(solution[-1] - weight @ mean), penalty)


def chosen_penalty(features: Floats, labels: Counts) -> float:
    """The penalty whose log-loss is least by folds within these samples: nothing else is looked at."""
    inner = np.arange(len(labels)) % FOLDS
    loss = dict.fromkeys(PENALTIES, 0.0)
    for penalty in PENALTIES:
        for fold in range(FOLDS):
            seen = inner != fold
            scores = fit(features[seen], labels[seen], penalty).scores(features[~seen])
            loss[penalty] += float(np.logaddexp(0, np.where(labels[~seen] == 1, -scores, scores)).sum())
    return min(loss, key=lambda each: loss[each])


def heads_by_fold(features: Floats, labels: Counts, fold: Counts, penalties: Sequence[float] = ()) -> list[Head]:
    """Head k is fitted to all folds but k; its penalty is chosen there too, or is ``penalties[k]``."""
    made = []
    for k in range(FOLDS):
        seen = fold != k
        penalty = penalties[k] if penalties else chosen_penalty(features[seen], labels[seen])
        made.append(fit(features[seen], labels[seen], penalty))
    return made


def right(features: Floats, labels: Counts, fold: Counts, heads: Sequence[Head]) -> NDArray[np.bool_]:
    """(samples,): whether the head that never saw the sample puts it in its class."""
    scores = np.empty(len(labels))
    for k, head in enumerate(heads):
        scores[fold == k] = head.scores(features[fold == k])
    found: NDArray[np.bool_] = (scores > 0) == (labels == 1)
    return found
