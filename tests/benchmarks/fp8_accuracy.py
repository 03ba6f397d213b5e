"""FP8 for TensorRT for RTX on the solar cells' ViT-S/14: what its compiler makes of it, and the accuracy, emulated.

    python -m tests.benchmarks.fp8_accuracy --scratch DIR --record docs/measured/fp8.json [--every 8]

The bundle is that of ``vlexport build model.pt --target tensorrt --for rtx --precision fp8 --calib DATA``. An engine is
compiled without a GPU, and its layers are counted by the types that they multiply. What the graph computes is asked of
ONNX Runtime without any of its optimizations, on the CPU: the rounding is right, and no time is. That is slow, so
that each n-th photo is judged, as ``tests/benchmarks/int8_accuracy`` judges int8. Outputs are kept in the scratch
folder, piece by piece.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import vlexport
from samples.solar_cells import data
from tests.benchmarks import int8_accuracy
from tests.benchmarks.token_accuracy import saved
from tests.linear_heads import Floats, folds, heads_by_fold, right
from tests.record import write_rows
from vlexport.core.bundle import read_bundle
from vlexport.core.verdict import measured_drop

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx-cu12")


@dataclass(frozen=True)
class Row(int8_accuracy.Row):
    """As of int8, with what the compiler says.

    Attributes:
        engine_products: Layers of the engine by the types that they multiply.
        engine_mb: Size of the engine, in 2²⁰ bytes.
    """

    engine_products: str
    engine_mb: float


def solar_cells(scratch: Path, threads: int, every: int) -> Row:
    """The ViT-S/14 in FP8 beside fp32 on ONNX Runtime."""
    photos, model = data.photos()[::every], saved(scratch)
    plain, ours = int8_accuracy.bundle(model, scratch, ""), scratch / f"{model.stem}-fp8.bundle"
    vlexport.build(
        vlexport.BuildConfig(
            model=str(model), output=str(ours), target="tensorrt", device_profile="rtx", precision="fp8",
            calib=f"{Path(int8_accuracy.__file__)}:calibration", profile=False, force=True,
        )
    )  # fmt: skip

    def images(cut: slice) -> Iterator[dict[str, Floats]]:
        return ({"image": sample["image"]} for sample in data.samples(photos[cut]))

    def made(folder: Path, batch: int) -> Floats:
        return int8_accuracy.outputs(folder, len(photos), images, scratch, threads, what=f"{every}", batch=batch)

    found = [made(plain, int8_accuracy.BATCH), made(ours, 1)]  # the engine's batch is fixed
    labels, fold = np.array([each.label for each in photos], np.int64), folds([each.path.name for each in photos])
    heads = heads_by_fold(found[0], labels, fold)
    was, now = (right(each, labels, fold, heads) for each in found)
    bundle = read_bundle(ours)
    engine = next(record for name, record in bundle.files.items() if name.endswith(".engine"))
    share = int8_accuracy.size_share(ours, plain)
    return Row(
        **asdict(int8_accuracy.row("solar_cells", was == now, was, now, found, share)),
        engine_products=bundle.main.artifact.facts["engine_products"], engine_mb=round(engine.size_bytes / 2**20, 1),
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The Markdown table of a record."""
    lines = [
        "| model | layers of the engine | engine | photos | equal top-1 | drop (95 %), emulated | SQNR |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        drop = measured_drop(each.lost, each.gained, each.samples)
        lines.append(
            f"| {each.name} | `{each.engine_products}` | {each.engine_mb:.1f} MB | {each.samples:,} | "
            f"{100 * each.equal / each.samples:.2f} % | {drop.value:.2f} points ({drop.low:.2f} to {drop.high:.2f}) | "
            f"{each.sqnr_db:.1f} dB |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models, bundles and outputs")
    parser.add_argument("--record", type=Path, help="JSON file for the row")
    parser.add_argument("--every", type=int, default=8, help="judge each n-th photo")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    found = solar_cells(given.scratch, given.threads, given.every)
    print(table([found]), flush=True)
    if given.record is not None:
        versions = ", ".join(f"{each} {importlib.metadata.version(each).split('+')[0]}" for each in PACKAGES)
        command = f"python -m tests.benchmarks.fp8_accuracy --scratch DIR --record {given.record} --every {given.every}"
        write_rows(given.record, command, versions, [found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
