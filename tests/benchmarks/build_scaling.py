"""Seconds per transformer block of a build at 48 blocks, over those at 12: a build must not grow faster than its model.

``python -m tests.benchmarks.build_scaling [ROUNDS]``: builds a DeiT-tiny of 12 and of 48 blocks (gate on, no profile)
in one process, interleaved, after a small build that loads the exporter. Exit code 1 when the median ratio is above
1.25.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import vlexport
from tests.record import write_figures
from vlexport.core.config import BuildConfig
from vlexport.core.devices import this_machine
from vlexport.frontends import compat
from vlexport.stages.build import build

DEPTHS = (12, 48)
LIMIT = 1.25


def seconds(folder: Path, depth: int, number: int) -> float:
    """Seconds of one build."""
    started = time.perf_counter()
    build(BuildConfig(model=str(folder / f"{depth}.pt"), output=str(folder / f"b{depth}-{number}"), profile=False))
    return time.perf_counter() - started


def main(rounds: int, record: Path | None = None, note: str = "") -> int:
    """Measure and print."""
    os.environ["VLEXPORT_CACHE"] = "off"  # every round lowers
    compat.declare_torchvision_operators()
    import timm

    machine = this_machine()
    print(f"{machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for depth in (1, *DEPTHS):
            torch.manual_seed(0)
            model = timm.create_model("deit_tiny_patch16_224", depth=depth).eval()
            vlexport.save(model, folder / f"{depth}.pt", inputs=torch.randn(1, 3, 224, 224))
        seconds(folder, 1, 0)
        ratios = []
        for number in range(rounds):
            per_block = {depth: seconds(folder, depth, number) / depth for depth in DEPTHS}
            ratios.append(per_block[48] / per_block[12])
            shown = ", ".join(f"{d} blocks {1e3 * s:.0f} ms a block" for d, s in per_block.items())
            print(f"  round {number + 1}: {shown}", flush=True)
    median = statistics.median(ratios)
    print(f"a block costs {median:.2f}x at 48 blocks (rounds {', '.join(f'{r:.2f}' for r in ratios)}; limit {LIMIT})")
    if record is not None:
        kept = {"ratio": round(median, 3), "ratios": [round(each, 3) for each in ratios]}
        write_figures(
            record, f"seconds a block of a build of {DEPTHS[1]} blocks over those of {DEPTHS[0]}", note=note, **kept
        )
    return int(median > LIMIT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--note", default="", help="what else a reader of the record should know")
    given = parser.parse_args()
    sys.exit(main(given.rounds, given.record, given.note))
