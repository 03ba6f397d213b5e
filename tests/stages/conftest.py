"""One tiny classifier, saved once, and one bundle of it, built once; every test works on a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vlexport
from vlexport.core.config import BuildConfig

COLOURS = ("red", "green", "blue")
SPEC = "resize=8,crop=8,scale=1/255"


class Colours(nn.Module):
    """Scores a picture by its mean red, green and blue, so that what is right is known without training."""

    def __init__(self, order: tuple[int, int, int] = (0, 1, 2)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.conv.bias.fill_(0.1)
            self.norm.running_mean.fill_(0.05)
            self.norm.running_var.fill_(1.3)
            self.head.weight.copy_(10 * torch.eye(3)[list(order)])
            self.head.bias.zero_()

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(image))).mean(dim=(2, 3)))


def save_colours(path: Path, order: tuple[int, int, int] = (0, 1, 2)) -> Path:
    example = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vlexport.save(Colours(order).eval(), path, inputs=example, preprocess=SPEC, labels=COLOURS)
    return path


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with red and green swapped: it disagrees with the first on both."""
    return save_colours(tmp_path_factory.mktemp("other") / "other.pt", order=(1, 0, 2))


def _built(model: Path) -> Path:
    folder = model.parent / "made.bundle"
    vlexport.build(BuildConfig(model=str(model), output=str(folder), profile=False, threads=1))
    return folder


@pytest.fixture(scope="session")
def built(model_file: Path) -> Path:
    """Not to be written to."""
    return _built(model_file)


@pytest.fixture(scope="session")
def other_built(other_model: Path) -> Path:
    """Not to be written to."""
    return _built(other_model)


@pytest.fixture
def bundle(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def other_bundle(other_built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(other_built, tmp_path / "other"))


class Make:
    """Data for the classifier."""

    @staticmethod
    def image(colour: int, seed: int = 0) -> np.ndarray:
        image = np.random.default_rng(seed).uniform(0.0, 0.3, (3, 8, 8)).astype(np.float32)
        image[colour] += 0.5
        return image

    @classmethod
    def npz(cls, path: Path, colours: list[int], labels: list[int] | None = None) -> str:
        """Pictures of these colours, labelled as they are unless told otherwise; ``labels=[]`` for none."""
        arrays = {"image": np.stack([cls.image(c, i) for i, c in enumerate(colours)])}
        if labels != []:
            arrays["label"] = np.asarray(colours if labels is None else labels)
        np.savez(path, **arrays)
        return str(path)

    @staticmethod
    def photo(path: Path, colour: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixel = [30, 30, 30]
        pixel[colour] = 220
        Image.new("RGB", (10, 12), tuple(pixel)).save(path)
        return path


@pytest.fixture
def make() -> type[Make]:
    return Make
