"""What reparameterizing gains in latency, and how much of what merging by hand gains.

    python -m tests.benchmarks.reparameterize                              # five models, about 15 minutes
    python -m tests.benchmarks.reparameterize repvgg_a0 --rounds 3 --seconds 0.3

Each model is captured as it is trained. Its plain export is the baseline twice: of our artifact, after every pass of a
build, and of the plain export of the model as its authors merge it (timm, or the sample's own code). Both ratios are
measured as ``vlexport profile`` measures: interleaved rounds, each session alone in its own process, baseline / other.
Exits with 1 when ours reaches less than 0.97 of the ratio by hand, or does not beat the plain export.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.zoo_reparameterize_models import pictures, subject
from vlexport.core.bundle_schema import LatencyResult
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.progress import Silent
from vlexport.frontends.capture import capture
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.pipeline import run_pipeline
from vlexport.stages.profile import FULL, Measurable, Plan, measure_latency
from vlexport.targets import open_target
from vlexport.targets.base import Brief

MODELS = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "nextvit_small", "fmvit_small")
PROMISED = 0.97
"""Share of the ratio by hand that ours reaches."""


@dataclass(frozen=True)
class Gain:
    """Latency of one artifact against the plain export of the model as it is trained.

    Attributes:
        plain_ms: Median of the baseline.
        p50_ms: Median.
        ratio: Baseline / this one; NaN where the machine was too noisy to tell.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        rounds: That held.
        repeated: Thrown away, because the baseline drifted.
    """

    plain_ms: float
    p50_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    repeated: int


@dataclass(frozen=True)
class Row:
    """One model: our artifact, and that which was merged by hand."""

    model: str
    ours: Gain
    by_hand: Gain

    @property
    def share(self) -> float:
        """Of the ratio by hand that ours reaches."""
        return self.ours.ratio / self.by_hand.ratio


def measured(name: str, plan: Plan, threads: int) -> Row:
    """Export a model in three ways and time two of them against the third."""
    target = open_target("onnxruntime")
    made = subject(name)
    merged = made.oracle(made.module)
    source, by_hand = (capture(each, torch.zeros(1, *made.shape)).program for each in (made.module, merged))
    ours = reparameterized(source)
    inputs = {source.signature.inputs[0].name: pictures(made.shape, 1).numpy()}
    with tempfile.TemporaryDirectory(prefix="vlexport-bench-") as place:
        folders = {label: Path(place) / label for label in ("plain", "by hand", "ours")}
        brief = Brief(target.Options())
        spelled, _ = run_pipeline(ours, target.program_passes(brief), gate=None)
        artifacts = {
            "plain": target.lower_naive(source, folders["plain"]),
            "by hand": target.lower_naive(by_hand, folders["by hand"]),
            "ours": target.lower(spelled, folders["ours"], brief),
        }
        found = {label: Measurable(label, target, folders[label], artifacts[label]) for label in folders}
        gains = [
            _gain(
                measure_latency(
                    found[label], inputs, baseline=found["plain"], plan=plan, threads=threads, reporter=Silent()
                )
            )
            for label in ("ours", "by hand")
        ]
    return Row(name, *gains)


def reparameterized(source: Program) -> Program:
    """After every pass of a build."""
    after, _ = run_pipeline(source, [pass_class(each)() for each in CATALOGUE], gate=None)
    return after


def _gain(result: LatencyResult) -> Gain:
    def known(value: float | None) -> float:
        return math.nan if value is None else value

    return Gain(
        known(result.baseline_p50_ms), result.p50_ms, known(result.ratio), known(result.ratio_low),
        known(result.ratio_high), result.rounds, result.repeated,
    )  # fmt: skip


def failures(rows: Sequence[Row]) -> list[str]:
    """What is not as promised, one line each; a figure that could not be told is not."""
    found = []
    for row in rows:
        if not row.share >= PROMISED:
            found.append(f"{row.model}: {row.ours.ratio:.3f} is {row.share:.3f} of {row.by_hand.ratio:.3f} by hand")
        if not row.ours.low >= PROMISED:
            found.append(f"{row.model}: not faster than the plain export ({row.ours.low:.3f} at least)")
    return found


def shown(row: Row) -> str:
    """One line."""

    def gain(each: Gain) -> str:
        interval = f"{each.ratio:.3f} ({each.low:.3f} to {each.high:.3f})"
        return f"{each.plain_ms:.2f} → {each.p50_ms:.2f} ms, {interval}, {each.rounds} rounds, {each.repeated} repeated"

    return f"{row.model:16} ours {gain(row.ours)}; by hand {gain(row.by_hand)}; share {row.share:.3f}"


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record: a line a model."""
    lines = [
        "| model | as trained | reparameterized | ratio (95 %) | ratio by hand (95 %) | share |",
        "|---|---|---|---|---|---|",
    ]
    for figure in record["figures"]:
        ours, by_hand = Gain(**figure["ours"]), Gain(**figure["by_hand"])
        ratios = (f"{each.ratio:.2f}× ({each.low:.2f} to {each.high:.2f})" for each in (ours, by_hand))
        times = (f"{each:.1f} ms" for each in (ours.plain_ms, ours.p50_ms))
        lines.append(f"| {' | '.join([figure['model'], *times, *ratios, f'{ours.ratio / by_hand.ratio:.2f}'])} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--seconds", type=float, default=FULL.block_seconds, help="of one block of runs")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    given = parser.parse_args()
    machine = this_machine()
    threads = given.threads or available_cores()
    print(f"{machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores, {threads} threads", flush=True)
    rows, plan = [], dataclasses.replace(FULL, rounds=given.rounds, block_seconds=given.seconds)
    for name in given.models:
        rows.append(measured(name, plan, threads))
        print(shown(rows[-1]), flush=True)
    if given.record is not None:
        record: dict[str, Any] = {
            "what": "latency of the plain export of a model as it is trained / of its reparameterized artifact",
            "command": " ".join(["python -m tests.benchmarks.reparameterize", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine.model_dump(mode="json"),
            "threads": threads,
            "figures": [asdict(row) for row in rows],
        }
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    bad = failures(rows)
    print("\n".join(bad) or "all as promised")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
