"""The heads that token reduction is judged by: they find what is there, and never see what they judge."""

from __future__ import annotations

import numpy as np

from tests.linear_heads import FOLDS, fit, folds, heads_by_fold, right


def drawn(samples: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of which the first tells the class of most samples."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((samples, width)) * np.linspace(0.1, 10, width) + 3
    return features, (features[:, 0] + 0.03 * random.standard_normal(samples) > 3).astype(np.int64)


def test_gradient_is_zero_when_a_head_is_fitted() -> None:
    features, labels = drawn(300, 8, 0)
    head = fit(features, labels, penalty=0.01)
    likely = 1 / (1 + np.exp(-head.scores(features)))
    deviation = features.std(0)
    gradient = ((features - features.mean(0)) / deviation).T @ (likely - labels) / 300 + 0.01 * head.weight * deviation
    assert np.abs(gradient).max() < 1e-10
    assert abs((likely - labels).mean()) < 1e-10


def test_head_tells_classes_apart_when_a_feature_does() -> None:
    features, labels = drawn(500, 8, 1)
    fold = folds([f"{index}.png" for index in range(500)])
    assert right(features, labels, fold, heads_by_fold(features, labels, fold)).mean() > 0.85


def test_head_does_no_better_than_chance_when_labels_are_drawn() -> None:
    """More features than a fold has samples: a head that had seen what it judges would be right on all of it."""
    random = np.random.default_rng(2)
    features, labels = random.standard_normal((200, 300)), random.integers(0, 2, 200)
    fold = folds([str(index) for index in range(200)])
    heads = heads_by_fold(features, labels, fold, [1e-3] * FOLDS)
    assert (heads[0].scores(features[fold != 0]) > 0).tolist() == (labels[fold != 0] == 1).tolist()
    assert 0.35 < right(features, labels, fold, heads).mean() < 0.65


def test_folds_are_even_and_fixed_when_names_are_shuffled() -> None:
    names = [f"cell{index:04}.png" for index in range(101)]
    found = dict(zip(names, folds(names), strict=True))
    assert sorted(np.bincount(list(found.values()))) == [20, 20, 20, 20, 21]
    shuffled = names[::-1]
    assert dict(zip(shuffled, folds(shuffled), strict=True)) == found
