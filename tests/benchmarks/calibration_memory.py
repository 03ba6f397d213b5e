"""Peak memory of calibrating on few photos and on many: what is counted takes the same room however many there are.

    python -m tests.benchmarks.calibration_memory --record docs/measured/calibration_memory.json [--counts 32 512]

The ViT-S/14 of ``samples/solar_cells``, all values that int8 on ONNX Runtime wants, by entropy (extremes and counts).
Photos are read one by one. Each number of them has a process of its own, and the peak is that process's largest
resident set while it calibrates (``VmHWM`` of Linux, set back behind the capture), model and libraries with it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from samples.solar_cells import data
from samples.solar_cells.model import IMAGE_SIZE, load_backbone
from tests.benchmarks.token_accuracy import ClassToken
from tests.harness import captured
from tests.record import write_rows
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.methods import Method
from vlexport.core.dataset import Dataset, Sample
from vlexport.passes.quantization.decide import wanted_values
from vlexport.targets import open_target

METHOD = "entropy"
SCHEME = "static-u8s8"


@dataclass(frozen=True)
class Row:
    """One calibration.

    Attributes:
        photos: How many.
        values: How many ranges came out.
        peak_mb: Largest resident set of the process, in 2²⁰ bytes.
        before_mb: Its resident set when the model was captured, and no photo read.
        seconds: Of the calibration, by the clock.
    """

    photos: int
    values: int
    peak_mb: float
    before_mb: float
    seconds: float


def peak_mb() -> float:
    """Largest resident set of this process since it was last set back."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def set_back() -> None:
    """Let the peak begin at what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def calibrated(photos: int) -> Row:
    """Calibrate in this process."""
    torch.set_num_threads(1)
    program = captured(ClassToken(load_backbone()).eval(), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    scheme = next(each for each in open_target("onnxruntime").schemes() if each.id == SCHEME)

    def read() -> Iterator[Sample]:
        for number, sample in enumerate(islice(data.samples(data.photos()), photos)):
            yield Sample(f"#{number}", {"image": sample["image"]})

    samples = Dataset(
        kind="photos", count=lambda: photos, read=read, inputs=program.signature.inputs, labelled=False, labels=None
    )
    set_back()
    before, started = peak_mb(), time.monotonic()
    table = calibrate(program, samples, wanted_values(program, scheme), Method.model_validate({"name": METHOD}))
    seconds = time.monotonic() - started
    return Row(photos, len(table.by_value()), round(peak_mb(), 1), round(before, 1), round(seconds, 1))


def table(rows: Sequence[Row]) -> str:
    """The Markdown table of a record: a line a number of photos."""
    lines = [
        "| photos | ranges | peak of the process | beside the fewest photos | before the first photo |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.photos} | {each.values} | {each.peak_mb:,.0f} MB | {each.peak_mb / rows[0].peak_mb:.3f} | "
        f"{each.before_mb:,.0f} MB |"
        for each in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file for the rows")
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 512], help="numbers of photos")
    parser.add_argument("--child", type=int, help="calibrate on so many in this process, and print the row")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(asdict(calibrated(given.child))))
        return 0
    rows = []
    for count in given.counts:
        words = [sys.executable, "-m", "tests.benchmarks.calibration_memory", "--child", str(count)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
        print(rows[-1], flush=True)
    if given.record is not None:
        versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "numpy"))
        write_rows(
            given.record, f"python -m tests.benchmarks.calibration_memory --record {given.record}", versions, rows
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
