"""Trains the linear head on the frozen backbone's class tokens and writes ``head.npz``.

Four to six minutes on two cores::

    python samples/solar_cells/train.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import LABELS, LabelledSample, held_out, training
from model import HEAD_FILE, VisionTransformer, load_backbone
from torch import Tensor

from vlexport.core.intervals import wilson

PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FOLDS = 5
BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the linear head of the solar cell classifier.")
    parser.add_argument("-o", "--output", type=Path, default=HEAD_FILE, help="where to write the head")
    args = parser.parse_args()

    backbone = load_backbone()
    train_features, train_labels = class_tokens(backbone, training(), "training")
    test_features, test_labels = class_tokens(backbone, held_out(), "held-out")

    penalty = choose_penalty(train_features, train_labels)
    weight, bias = fit_head(train_features, train_labels, penalty)
    print(f"penalty {penalty:g}, chosen by {FOLDS}-fold cross-validation on the training photos")
    report("training", train_features @ weight.T + bias, train_labels)
    report("held-out", test_features @ weight.T + bias, test_labels)

    np.savez(args.output, weight=weight.float().numpy(), bias=bias.float().numpy())
    print(f"wrote {args.output.name}")
    return 0


def class_tokens(backbone: VisionTransformer, samples: Iterable[LabelledSample], name: str) -> tuple[Tensor, Tensor]:
    """The class tokens ``(N, 384)`` in float64 and the labels ``(N,)`` of ``samples``."""
    features: list[Tensor] = []
    labels: list[int] = []
    images: list[Tensor] = []
    start = time.perf_counter()

    def flush() -> None:
        with torch.inference_mode():
            features.append(backbone(torch.stack(images))[:, 0].double())
        images.clear()

    for sample in samples:
        images.append(torch.from_numpy(sample["image"]))
        labels.append(sample["label"])
        if len(images) == BATCH:
            flush()
    if images:
        flush()
    seconds = time.perf_counter() - start
    print(f"{name}: {len(labels)} photos, {seconds / len(labels):.3f} s a photo", flush=True)
    return torch.cat(features), torch.tensor(labels)


def choose_penalty(features: Tensor, labels: Tensor) -> float:
    """The penalty whose cross-validated log-loss is least; fold k is every fifth photo from the k-th."""
    fold = torch.arange(len(labels)) % FOLDS
    loss = dict.fromkeys(PENALTIES, 0.0)
    for penalty in PENALTIES:
        for k in range(FOLDS):
            weight, bias = fit_head(features[fold != k], labels[fold != k], penalty)
            logits = features[fold == k] @ weight.T + bias
            loss[penalty] += F.cross_entropy(logits, labels[fold == k], reduction="sum").item()
    return min(loss, key=lambda penalty: loss[penalty])


def fit_head(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Softmax regression with a squared penalty on standardised features; returns ``(weight, bias)`` for raw ones.

    The problem is convex and starts from zero: there is nothing to seed.
    """
    mean, deviation = features.mean(0), features.std(0)
    standardised = (features - mean) / deviation
    weight = torch.zeros(len(LABELS), features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(LABELS), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standardised @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    raw_weight = weight.detach() / deviation
    return raw_weight, bias.detach() - raw_weight @ mean


def report(name: str, logits: Tensor, labels: Tensor) -> None:
    correct, count = int((logits.argmax(1) == labels).sum()), len(labels)
    low, high = wilson(correct, count)
    majority = labels.bincount().max().item() / count
    print(
        f"{name}: accuracy {correct / count:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"share of the commonest class {majority:.1%}, {count} photos"
    )


if __name__ == "__main__":
    sys.exit(main())
