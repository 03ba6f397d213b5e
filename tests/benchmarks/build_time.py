"""Seconds of a build with the numeric gate on, against a plain ``torch.onnx.export`` of the same model and process.

Imports and the
first use of the exporter are excluded by a build and an export of a small model beforehand. Each round times plain,
build from ``model.pt``, build from weights with ``--arch`` (capture included), plain; the ratio's denominator is the
mean of the two plain exports. The plain export keeps the batch dynamic, as ours does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import vlexport
from vlexport.core.config import BuildConfig
from vlexport.core.devices import this_machine
from vlexport.frontends.architecture import factory_from_text
from vlexport.stages.build import BuildResult, build

LIMIT = 2.5
"""Of a build for onnxruntime with every pass and fusion, over the plain export."""


def plain_export(model: torch.nn.Module, example: torch.Tensor, folder: Path) -> float:
    """Seconds of what a user without vlexport types."""
    started = time.perf_counter()
    batch = ({0: torch.export.Dim("batch", min=1)},)
    made = torch.onnx.export(model, (example.repeat(2, 1, 1, 1),), dynamo=True, dynamic_shapes=batch, verbose=False)
    made.save(folder / "plain.onnx")
    return time.perf_counter() - started


def timed_build(config: BuildConfig) -> tuple[float, BuildResult]:
    """Seconds of a build without profile."""
    started = time.perf_counter()
    result = build(config)
    return time.perf_counter() - started, result


def main(name: str, rounds: int, record: Path | None = None) -> int:
    """Measure and print; exit code 1 when a median ratio is above the limit."""
    os.environ["VLEXPORT_CACHE"] = "off"  # every round lowers
    machine = this_machine()
    print(f"{name}: {machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for warm in ("resnet10t", name):
            made = factory_from_text(f"timm:{warm}")
            model, example = made.module.eval(), made.inputs
            vlexport.save(model, folder / f"{warm}.pt", inputs=example)
            torch.save(model.state_dict(), folder / f"{warm}.pth")
            if warm != name:
                plain_export(model, example, folder)
                build(BuildConfig(model=str(folder / f"{warm}.pt"), output=str(folder / "warm"), profile=False))
        ratios: dict[str, list[float]] = {"from model.pt": [], "from weights with --arch": []}
        configs = {
            "from model.pt": {"model": str(folder / f"{name}.pt")},
            "from weights with --arch": {"model": str(folder / f"{name}.pth"), "arch": f"timm:{name}"},
        }
        for number in range(rounds):
            first = plain_export(model, example, folder)
            spent = {}
            for label, values in configs.items():
                config = BuildConfig(**values, output=str(folder / f"bundle{number}{len(spent)}"), profile=False)
                spent[label], result = timed_build(config)
                shares = ", ".join(
                    f"{stage} {100 * seconds / spent[label]:.0f} %" for stage, seconds in result.seconds.items()
                )
                print(f"  round {number + 1}, build {label}: {spent[label]:.2f} s ({shares})")
            last = plain_export(model, example, folder)
            print(f"  round {number + 1}, plain export: {first:.2f} s before, {last:.2f} s after")
            for label, seconds in spent.items():
                ratios[label].append(seconds / statistics.mean((first, last)))
    medians = {label: round(statistics.median(values), 2) for label, values in ratios.items()}
    for label, values in ratios.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"build {label}: {medians[label]:.2f}x a plain export (rounds {shown}; limit {LIMIT})")
    if record is not None:
        measured = {
            "what": f"seconds of a build of {name}, gate on, no profile, over a plain torch.onnx.export",
            "command": f"python tests/benchmarks/build_time.py {name} {rounds}",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine.model_dump(mode="json"),
            "ratios": medians,
        }
        record.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return int(max(medians.values()) > LIMIT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224", help="a model of timm")
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    given = parser.parse_args()
    sys.exit(main(given.model, given.rounds, given.record))
