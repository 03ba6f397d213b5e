"""The photos: 2,624 electroluminescence images of solar cells from the installed package elpv-dataset.

The photos are read where they are installed and never become part of this repository (their licence is
CC-BY-NC-SA 4.0). This module needs no torch, so it serves as data on a device too::

    vlexport validate bundle --data samples/solar_cells/data.py:held_out
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from vlexport.core.preprocess import preprocess_from_spec

LABELS = ("functional", "defective")
# The photos are square, so nothing is cut off: a crack may run along the edge of a cell.
PREPROCESS = "resize=224:bicubic,crop=224,scale=1/255,mean=imagenet,std=imagenet"
# The annotators gave 0, 1/3, 2/3 or 1: a cell counts as defective where they leaned towards a defect.
DEFECT_PROBABILITY = 0.5
# Enough for half a point: zero disagreements in n photos bound the true share below 1.96² / (n + 1.96²) (score
# interval, 95 %), which is under 0.5 % from n = 765 on.
HELD_OUT_PHOTOS = 800
CALIBRATION_PHOTOS = 64


class LabelledSample(TypedDict):
    image: np.ndarray
    label: int


@dataclass(frozen=True)
class Photo:
    """One photo, its annotated defect probability and its place in the split."""

    path: Path
    defect_probability: float
    held_out: bool

    @property
    def label(self) -> int:
        """The index into ``LABELS``."""
        return int(self.defect_probability >= DEFECT_PROBABILITY)


def photos() -> list[Photo]:
    """All installed photos, sorted by name.

    The split depends on the photos' names alone: those with the smallest SHA-256 are held out. Photos of one solar
    module may lie on both sides: the dataset does not say which cells came from which module.
    """
    folder = photo_folder()
    rows = [line.split() for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines()]
    probabilities = {name: float(probability) for name, probability, _module_type in rows}
    by_hash = sorted(probabilities, key=lambda name: hashlib.sha256(Path(name).name.encode()).digest())
    held_out_names = frozenset(by_hash[:HELD_OUT_PHOTOS])
    return [Photo(folder / name, probabilities[name], name in held_out_names) for name in sorted(probabilities)]


def samples(chosen: Iterable[Photo]) -> Iterator[LabelledSample]:
    """``{"image": float32 (3, 224, 224), "label": int}`` for each photo; ``image`` is forward's argument."""
    preprocess = preprocess_from_spec(PREPROCESS)
    for photo in chosen:
        with Image.open(photo.path) as image:
            yield {"image": preprocess.apply(image), "label": photo.label}


def held_out() -> Iterator[LabelledSample]:
    """The 800 photos that training never saw: labelled evaluation data."""
    return samples(photo for photo in photos() if photo.held_out)


def training() -> Iterator[LabelledSample]:
    """The other 1,824 photos: what the head was fitted to."""
    return samples(photo for photo in photos() if not photo.held_out)


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """64 training photos without labels, evenly spread: the dataset is ordered by kind of cell, mono or poly."""
    chosen = [photo for photo in photos() if not photo.held_out]
    step = len(chosen) // CALIBRATION_PHOTOS
    for sample in samples(chosen[: step * CALIBRATION_PHOTOS : step]):
        yield {"image": sample["image"]}


def class_folders(dest: Path | str, *, copy: bool = False, limit: int | None = None) -> Path:
    """Lay the held-out photos out as ``dest/functional/*.png`` and ``dest/defective/*.png``.

    Links to the installed photos are made unless ``copy`` is set. With ``limit``, only the first photos of each class
    are taken. Choose a ``dest`` outside version control: the photos' licence does not allow every use.
    """
    dest = Path(dest)
    for label, name in enumerate(LABELS):
        folder = dest / name
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [photo.path for photo in photos() if photo.held_out and photo.label == label]
        for path in chosen[:limit]:
            target = folder / path.name
            target.unlink(missing_ok=True)
            if copy:
                shutil.copyfile(path, target)
            else:
                target.symlink_to(path.resolve())
    return dest


def photo_folder() -> Path:
    """The folder of the installed package elpv-dataset that holds ``labels.csv`` and ``images/``."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the photos come with the package elpv-dataset, which is not installed: "
            "pip install elpv-dataset==1.0.0.post1",
            name="elpv_dataset",
        )
    folder = Path(spec.origin).parent / "data"
    if not (folder / "labels.csv").is_file():
        raise FileNotFoundError(
            "the installed elpv-dataset holds no data/labels.csv; this sample was written for version 1.0.0.post1: "
            "pip install --force-reinstall elpv-dataset==1.0.0.post1"
        )
    return folder
