"""How alike saliency maps stay when tokens are merged and un-merged: a dense output needs every patch token.

    python -m tests.benchmarks.token_heatmaps --scratch DIR --record docs/measured/token_heatmaps.json

The network is ``samples/solar_cells/saliency.py``. Each photo's map is compared with that of the same build without
reduction, by Pearson's correlation over its 224 × 224 pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import vlexport
from samples.solar_cells import data
from samples.solar_cells.model import IMAGE_SIZE
from samples.solar_cells.saliency import load_saliency
from tests.benchmarks.token_accuracy import DENSE, PACKAGES, Variant, batches, built
from tests.linear_heads import Floats
from tests.record import write_rows

VARIANTS = (
    Variant("tome-8", "tome:r=8"),
    Variant("tome-10", "tome:r=10"),
    Variant("tome-12", "tome:r=12"),
    Variant("tome-late", "tome:r=20,layers=4+5+6+7+8+9+10+11"),
    Variant("evit-squeezed", "evit:keep=0.85,layers=4+5+6+7+8+9+10,squeeze=true"),
    Variant("random-late", "random:keep=0.85,layers=4+5+6+7+8+9+10"),
)


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        name: The variant's; ``tokens`` is what ``--tokens`` got.
        macs: Multiply-accumulates of one photo; ``dense_macs`` those without reduction.
        photos: How many were compared.
        mean: Of the correlations; ``median``, ``lowest_5_percent`` (the 5 % quantile) and ``lowest`` likewise.
    """

    name: str
    tokens: str
    macs: int
    dense_macs: int
    photos: int
    mean: float
    median: float
    lowest_5_percent: float
    lowest: float


def saved(scratch: Path) -> Path:
    """The model's file, written once."""
    file = scratch / "saliency.pt"
    if not file.is_file():
        example = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
        vlexport.save(load_saliency(), file, inputs={"image": example}, preprocess=data.PREPROCESS)
    return file


def maps(bundle: Path, photos: Sequence[data.Photo], threads: int) -> tuple[Floats, int]:
    """(photos, pixels) of the saliency maps, and the MACs of one."""
    with vlexport.load(bundle, threads=threads) as loaded:
        found = [loaded.run({"image": images})["output"] for images in batches(photos)]
        return np.concatenate(found).reshape(len(photos), -1), loaded.bundle.main.cost.macs


def correlations(ours: Floats, theirs: Floats) -> Floats:
    """(photos, pixels) twice → (photos,): Pearson's correlation of each pair, in float64."""
    first, second = (each.astype(np.float64) - each.mean(1, keepdims=True, dtype=np.float64) for each in (ours, theirs))
    norms = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    found: Floats = (first * second).sum(1) / norms
    return found


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--record", type=Path, help="JSON file for the rows")
    parser.add_argument("--every", type=int, default=10, help="compare each n-th photo")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    model, photos = saved(given.scratch), data.photos()[:: given.every]
    dense, dense_macs = maps(built(model, Variant(DENSE), given.scratch), photos, given.threads)
    rows = []
    for variant in VARIANTS:
        found, macs = maps(built(model, variant, given.scratch), photos, given.threads)
        each = correlations(found, dense)
        rows.append(
            Row(
                name=variant.name, tokens=variant.tokens, macs=macs, dense_macs=dense_macs, photos=len(photos),
                mean=float(each.mean()), median=float(np.median(each)),
                lowest_5_percent=float(np.quantile(each, 0.05)), lowest=float(each.min()),
            )
        )  # fmt: skip
        print(rows[-1], flush=True)
    if given.record is not None:
        versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES)
        command = f"python -m tests.benchmarks.token_heatmaps --record {given.record}"
        write_rows(given.record, command, versions, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
