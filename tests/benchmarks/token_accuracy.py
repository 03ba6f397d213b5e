"""What token reduction costs on real weights: the solar cells' ViT-S/14, all 2,624 photos, each method beside chance.

    python -m tests.benchmarks.token_accuracy --scratch DIR --record docs/measured/tokens.json [--only NAME]
    python -m tests.benchmarks.token_accuracy --scratch DIR --record docs/measured/tokens_int8.json \
        --only evit-four-int8

Each variant is a bundle that ``vlexport build --tokens`` makes for ONNX Runtime, and gives the class token's features.
Linear heads judge them by five folds, so that no head ever saw the photo it judges. In the first column of drops the
heads were fitted to the features of the model *without* reduction: a reduced model in the place of a model that is
trained. In the second they were fitted again, to the reduced features of the other folds. Both are paired: photo by
photo against the unreduced model. Against ``random``, which keeps as many tokens whatever they show, the pairs are the
same photos under the same heads.

Settings were looked for on a quarter of the photos, drawn by a hash of their names (:func:`looked_at`), and never on
the others; each row says what they cost on all photos and on those others alone.

A variant takes about three minutes of one core. Features are kept in the scratch folder under the digest of the bundle
that made them, some hundred photos at a time, so an interrupted run goes on where it was, nothing is done twice, and
nothing old is taken for new.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import vlexport
from samples.solar_cells import data
from samples.solar_cells.model import IMAGE_SIZE, VisionTransformer, load_backbone
from tests.linear_heads import Counts, Floats, Head, folds, heads_by_fold, right
from tests.record import write_rows
from vlexport.core.verdict import measured_drop

BATCH = 8
PIECE = 164
"""Photos whose features are one file."""
LOOKED_AT = 656
"""Photos on which settings were looked for."""
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """One way to build the model.

    Attributes:
        name: Short, and a file's name.
        tokens: What ``--tokens`` gets; empty for none.
        control: The variant that keeps as many tokens at random, at nearly as many MACs.
        rounded: In int8, by ``static`` or ``dynamic`` ranges of activations; empty for fp32. Such a variant is built
            where it is named.
    """

    name: str
    tokens: str = ""
    control: str = ""
    rounded: str = ""


_LATE = "layers=4+5+6+7+8+9+10"
_EVIT = "evit:keep=0.7,layers=4+6+8+10,squeeze=true"
_TOME = "tome:r=0+0+0+64+0+48+0+40+0+30+0+0"
CALIBRATION = Path(__file__).with_name("int8_accuracy.py")
VARIANTS = (
    Variant(DENSE),
    Variant("random-four", "random:keep=0.7,layers=4+6+8+10"),
    Variant("evit-four", _EVIT, "random-four"),
    Variant("random-late", f"random:keep=0.85,{_LATE}"),
    Variant("tome-four", _TOME, "random-late"),
    Variant("random-three", "random:keep=0.6,layers=4+6+9"),
    Variant("evit-three", "evit:keep=0.6,layers=4+6+9,squeeze=true", "random-three"),
    Variant("evit-squeezed", f"evit:keep=0.85,{_LATE},squeeze=true", "random-late"),
    Variant("tome-late", f"tome:r=28,{_LATE}+11", "random-late"),
    Variant("random-0.7", "random:keep=0.7,layers=4+7+10"),
    Variant("evit-0.7", "evit:keep=0.7,layers=4+7+10", "random-0.7"),
    Variant("evit-count-0.7", "evit:keep=0.7,layers=4+7+10,count=true", "random-0.7"),
    Variant("tome-14", "tome:r=14", "random-0.7"),
    Variant("mctf-14", "mctf:r=14", "random-0.7"),
    Variant("evit-four-int8", _EVIT, rounded="dynamic"),
    Variant("tome-four-int8", _TOME, rounded="dynamic"),
    Variant("tome-four-int8-static", _TOME, rounded="static"),
)
"""At about two thirds of the model's multiply-accumulates or fewer. Those that are to meet the goal come first."""


@dataclass(frozen=True)
class Row:
    """What one variant does.

    Attributes:
        name: The variant's.
        tokens: What ``--tokens`` got.
        macs: Multiply-accumulates of one photo.
        photos: How many were judged.
        right: Of these, by heads that were fitted without reduction.
        lost: Right without reduction only; ``gained``: right with it only. Same heads.
        fresh: How many of the photos were not looked at when settings were chosen; ``fresh_lost`` and ``fresh_gained``
            count among these alone.
        refit_lost: As ``lost``, by heads that were fitted to the reduced features; ``refit_gained`` likewise.
        control: The variant at random that it is compared with, or empty.
        rounded: As the variant has it.
        control_only: Right at random only; ``only_ours``: right by this method only. Heads fitted without reduction.
    """

    name: str
    tokens: str
    macs: int
    photos: int
    right: int
    lost: int
    gained: int
    fresh: int
    fresh_lost: int
    fresh_gained: int
    refit_lost: int
    refit_gained: int
    control: str = ""
    control_only: int = 0
    only_ours: int = 0
    rounded: str = ""


class ClassToken(nn.Module):
    """``image`` ``(N, 3, 224, 224)`` to the class token's features ``(N, 384)``."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone(image)[:, 0]


def saved(scratch: Path) -> Path:
    """The model's file, written once."""
    file = scratch / "class_token.pt"
    if not file.is_file():
        example = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
        model = ClassToken(load_backbone()).eval()
        vlexport.save(model, file, inputs={"image": example}, preprocess=data.PREPROCESS)
    return file


def built(model: Path, variant: Variant, scratch: Path) -> Path:
    """The variant's bundle, made anew: the code may have changed."""
    output = scratch / f"{model.stem}-{variant.name}.bundle"
    calib = f"{CALIBRATION}:calibration" if variant.rounded else None
    config = vlexport.BuildConfig(
        model=str(model), output=str(output), tokens=variant.tokens or None, profile=False, force=True,
        precision="int8" if variant.rounded else "fp32", calib=calib,
        options={"quantize.activations": variant.rounded, "quantize.min_sqnr_db": "0"} if variant.rounded else {},
    )  # fmt: skip
    vlexport.build(config)
    return output


def features_of(bundle: Path, photos: Sequence[data.Photo], scratch: Path, threads: int) -> tuple[Floats, int]:
    """The features ``(photos, 384)`` that a bundle gives, and its MACs."""
    with vlexport.load(bundle, threads=threads) as loaded:
        found, started = [], time.monotonic()
        for first in range(0, len(photos), PIECE):
            piece = photos[first : first + PIECE]
            named = hashlib.sha256(" ".join([loaded.bundle.digest, *(p.path.name for p in piece)]).encode()).hexdigest()
            file = scratch / f"features-{named[:24]}.npy"
            if not file.is_file():
                part = file.with_suffix(".part.npy")
                np.save(part, np.concatenate([loaded.run({"image": images})["output"] for images in batches(piece)]))
                part.replace(file)
            found.append(np.load(file, allow_pickle=False))
            bar = f"{bundle.stem}: {first + len(piece)} of {len(photos)} photos, {time.monotonic() - started:.0f} s"
            print(bar, end="\r", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return np.concatenate(found), loaded.bundle.main.cost.macs


def looked_at(photos: Sequence[data.Photo]) -> NDArray[np.bool_]:
    """(photos,): on which settings were looked for; by a hash that has nothing to do with the heads' folds."""
    names = [hashlib.sha256(f"choose {photo.path.name}".encode()).digest() for photo in data.photos()]
    last = sorted(names)[LOOKED_AT - 1]
    return np.array([hashlib.sha256(f"choose {each.path.name}".encode()).digest() <= last for each in photos])


def batches(photos: Sequence[data.Photo]) -> Iterator[Floats]:
    """Preprocessed photos, some at a time."""
    samples = data.samples(photos)
    while chunk := list(islice(samples, BATCH)):
        yield np.stack([sample["image"] for sample in chunk])


class Judge:
    """Compares variants photo by photo.

    Args:
        photos: All of them.
        dense: Their features without reduction.
    """

    def __init__(self, photos: Sequence[data.Photo], dense: Floats) -> None:
        self._labels: Counts = np.array([photo.label for photo in photos], np.int64)
        self._fold = folds([photo.path.name for photo in photos])
        self._heads: list[Head] = heads_by_fold(dense, self._labels, self._fold)
        self._fresh = ~looked_at(photos)
        self._right = {DENSE: right(dense, self._labels, self._fold, self._heads)}

    def row(self, variant: Variant, features: Floats, macs: int) -> Row:
        """The variant's row; its control must have been judged before."""
        dense = self._right[DENSE]
        ours = right(features, self._labels, self._fold, self._heads)
        penalties = [head.penalty for head in self._heads]
        refitted = heads_by_fold(features, self._labels, self._fold, penalties)
        again = right(features, self._labels, self._fold, refitted)
        self._right[variant.name] = ours
        lost, gained = dense & ~ours, ours & ~dense
        other = self._right[variant.control] if variant.control else ours
        return Row(
            name=variant.name, tokens=variant.tokens, macs=macs, photos=len(ours), right=int(ours.sum()),
            lost=int(lost.sum()), gained=int(gained.sum()), fresh=int(self._fresh.sum()),
            fresh_lost=int((lost & self._fresh).sum()), fresh_gained=int((gained & self._fresh).sum()),
            refit_lost=int((dense & ~again).sum()), refit_gained=int((again & ~dense).sum()),
            control=variant.control, rounded=variant.rounded, control_only=int((other & ~ours).sum()),
            only_ours=int((ours & ~other).sum()),
        )  # fmt: skip


def needed(names: Sequence[str]) -> list[Variant]:
    """The variants of these names with what they are compared with; all in fp32 where none is named.

    Raises:
        KeyError: There is no such variant.
    """
    known = {variant.name: variant for variant in VARIANTS}
    wanted = {DENSE}
    for name in names or (each.name for each in VARIANTS if not each.rounded):
        wanted |= {name, known[name].control}
    return [variant for variant in VARIANTS if variant.name in wanted]


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models, bundles and features")
    parser.add_argument("--record", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", action="append", default=[], help="a variant; repeatable")
    parser.add_argument("--every", type=int, default=1, help="judge each n-th photo only, for a first look")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    model, photos = saved(given.scratch), data.photos()[:: given.every]
    rows: list[Row] = []
    judge: Judge | None = None
    for variant in needed(given.only):
        bundle = built(model, variant, given.scratch)
        features, macs = features_of(bundle, photos, given.scratch, given.threads)
        judge = judge or Judge(photos, features)  # the first is without reduction
        rows.append(judge.row(variant, features, macs))
        print(line(rows[-1]), flush=True)
        if given.record is not None:  # each time: an hour's work is not lost with the last variant
            versions = ", ".join(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in PACKAGES)
            write_rows(given.record, command(given), versions, rows)
    return 0


def command(given: argparse.Namespace) -> str:
    """What reproduces the record; the scratch folder is the reader's own."""
    parts = ["python -m tests.benchmarks.token_accuracy --scratch DIR", f"--record {given.record}"]
    parts += [f"--only {name}" for name in given.only]
    return " ".join([*parts, *([f"--every {given.every}"] if given.every != 1 else [])])


def line(row: Row) -> str:
    """A row for the terminal."""
    drop, refit = (measured_drop(lost, gained, row.photos) for lost, gained in _pairs(row))
    fresh = measured_drop(row.fresh_lost, row.fresh_gained, row.fresh)
    shown = f"{row.name:12} {row.macs / 1e9:.3f} GMACs, {100 * row.right / row.photos:.2f} % right, "
    shown += f"drop {drop.value:.2f} ({drop.low:.2f} to {drop.high:.2f}), "
    shown += f"on {row.fresh} not looked at {fresh.value:.2f}, fitted again {refit.value:.2f}"
    if row.control:
        gain = measured_drop(row.only_ours, row.control_only, row.photos)
        shown += f", over {row.control} {gain.value:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
    return shown


def _pairs(row: Row) -> tuple[tuple[int, int], tuple[int, int]]:
    return (row.lost, row.gained), (row.refit_lost, row.refit_gained)


if __name__ == "__main__":
    sys.exit(main())
