"""What memory in huge pages gains: the same bundle in two processes, one of which asks for them.

    python -m tests.benchmarks.huge_pages --scratch DIR --record docs/measured/huge_pages.json

Bundles come from ``vlexport build`` for ONNX Runtime. Each is opened with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` and
with ``=1``, and measured in interleaved rounds as ``vlexport profile --against`` does it. The ratio is without / with
them, with its 95 % interval. Where the system gives such pages to everyone, or to nobody, there is nothing to measure.
Weights of models of timm are random, which does not decide latency. Half a minute a model beside the build.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.token_latency import DEIT, MODELS, SOLAR_CELLS, built, saved
from tests.record import write_rows
from vlexport.core.bundle import ARTIFACT_FOLDER, read_bundle
from vlexport.core.devices import available_cores
from vlexport.core.huge_pages import ASKED_FOR, TUNABLE, VARIABLE, memory_pages
from vlexport.core.isolate import IsolatedSession
from vlexport.core.progress import Silent
from vlexport.stages.golden import read_golden
from vlexport.stages.profile import FULL, interleaved
from vlexport.targets import open_target

NAMES = (SOLAR_CELLS, DEIT, "nextvit_small", "convnext_atto", "repvgg_a0")
PACKAGES = ("torch", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        model: Its name.
        p50_ms: With huge pages; ``small_p50_ms`` without, in the same rounds.
        ratio: Median over rounds of without / with, and its 95 % interval from ``low`` to ``high``.
        peak_bytes: The most memory that the process with them held; ``small_peak_bytes``: that without.
        repeated: Rounds thrown away because the one without drifted.
    """

    model: str
    p50_ms: float
    small_p50_ms: float
    ratio: float | None
    low: float | None
    high: float | None
    peak_bytes: int | None
    small_peak_bytes: int | None
    repeated: int


def row(name: str, scratch: Path) -> Row:
    """Build a model at batch 1 and measure it."""
    folder = built(saved(name, 1, scratch), MODELS[DEIT][0], scratch)
    bundle = read_bundle(folder)
    golden, _ = read_golden(folder, bundle.main)
    threads = available_cores()

    def opened() -> IsolatedSession:
        return open_target(bundle.target).open(folder / ARTIFACT_FOLDER, bundle.main.artifact, threads=threads)

    with _asking(1), opened() as ours, _asking(0), opened() as small:
        found = interleaved(ours, small, golden, FULL, threads, Silent())
        return Row(
            model=name, p50_ms=found.p50_ms, small_p50_ms=found.baseline_p50_ms or 0.0, ratio=found.ratio,
            low=found.ratio_low, high=found.ratio_high, peak_bytes=ours.peak_memory_bytes(),
            small_peak_bytes=small.peak_memory_bytes(), repeated=found.repeated,
        )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| model | with huge pages | without | without / with | memory | without |", "|---|---|---|---|---|---|"]
    for each in rows:
        times = [f"{value:.1f} ms" for value in (each.p50_ms, each.small_p50_ms)]
        memory = [f"{(value or 0) / 1e6:.0f} MB" for value in (each.peak_bytes, each.small_peak_bytes)]
        lines.append(f"| {' | '.join([each.model, *times, _ratio(each), *memory])} |")
    return "\n".join(lines)


def _ratio(row: Row) -> str:
    return "too noisy to tell" if row.ratio is None else f"{row.ratio:.2f}× ({row.low:.2f} to {row.high:.2f})"


@contextmanager
def _asking(value: int) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = f"{TUNABLE}={value}"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def main() -> int:
    """Print a line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", action="append", default=[], choices=NAMES)
    arguments = parser.parse_args()
    if memory_pages({}) != ASKED_FOR:
        print("this system gives huge pages to everyone or to nobody: nothing to measure")
        return 1
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.only or NAMES:
        rows.append(found := row(name, arguments.scratch))
        print(table([found]).splitlines()[-1], flush=True)
        if arguments.record:
            versions = ", ".join(f"{each} {version(each)}" for each in PACKAGES)
            write_rows(arguments.record, "python -m tests.benchmarks.huge_pages", versions, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
