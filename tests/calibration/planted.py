"""Small nets and samples for tests of calibration."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.dataset import Dataset, Sample
from vlexport.ir.program import Program


class Net(nn.Module):
    """A convolution after a division by the spread of each image, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))

    def forward(self, image: Tensor) -> Tensor:
        image = image / image.std((1, 2, 3), keepdim=True)
        scores: Tensor = self.head(self.stem(image).relu().mean((2, 3)))
        return scores


def program() -> Program:
    torch.manual_seed(0)
    return captured(Net(), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 6, 6)).astype(np.float32)


def dataset(values: np.ndarray, of: Program) -> Dataset:
    def read() -> Iterator[Sample]:
        for number, value in enumerate(values):
            yield Sample(f"#{number}", {"image": value})

    return Dataset(
        kind="npz", count=lambda: len(values), read=read, inputs=of.signature.inputs, labelled=False, labels=None
    )
