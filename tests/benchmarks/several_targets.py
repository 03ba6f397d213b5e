"""Seconds of one build for three targets against three builds of one target each, the cache off.

    python -m tests.benchmarks.several_targets out/solar_cells.pt --calib samples/solar_cells/data.py:calibration

Each build is a process of its own, as a user starts it, without profiling; the builds are interleaved.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.record import origin, write_figures
from vlexport.core.devices import this_machine

TARGETS = ("onnxruntime", "tensorrt", "coreml")


def seconds(model: str, target: str, more: list[str], folder: Path) -> float:
    """Seconds of one build.

    Raises:
        CalledProcessError: When it fails.
    """
    command = [sys.executable, "-m", "vlexport", "build", model, "--target", target, "-o", str(folder / "made")]
    command += ["--no-profile", "--force", *more]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "VLEXPORT_CACHE": "off"})
    return time.perf_counter() - started


def line(record: dict[str, Any]) -> str:
    """The record in one item of a list."""
    seconds = record["seconds"]
    together, apart = seconds[",".join(TARGETS)], sum(seconds[name] for name in TARGETS)
    count, typed = record["rounds"], record["command"].split(" --record")[0]
    return (
        f"- Several targets: one build of the solar cells' ViT-S/14 for {len(TARGETS)} targets takes\n"
        f"  {together / apart:.2f}× the time of {len(TARGETS)} builds ({together:.1f} s against {apart:.1f} s,\n"
        f"  no cache, rounds: {count}): `{typed}`;\n"
        f"  {origin(record, 'several_targets.json')}."
    )


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calib", default="")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--note", default="", help="what else a reader of the record should know")
    given = parser.parse_args()
    more = ["--calib", given.calib] if given.calib else []
    spent: dict[str, list[float]] = {name: [] for name in (*TARGETS, ",".join(TARGETS))}
    for _ in range(given.rounds):
        for name, times in spent.items():
            with tempfile.TemporaryDirectory() as folder:
                times.append(seconds(given.model, name, more, Path(folder)))
    machine = this_machine()
    print(f"{machine.cpu}, {machine.cores} cores, {given.rounds} rounds")
    for name, times in spent.items():
        print(f"{name}: {median(times):.1f} s")
    together, apart = median(spent[",".join(TARGETS)]), sum(median(spent[name]) for name in TARGETS)
    print(f"ratio {together / apart:.2f}: {together:.1f} s together, {apart:.1f} s apart")
    if given.record is not None:
        seconds_of = {name: round(median(times), 1) for name, times in spent.items()}
        write_figures(
            given.record, "median seconds of a build", note=given.note, rounds=given.rounds, seconds=seconds_of
        )


if __name__ == "__main__":
    main()
