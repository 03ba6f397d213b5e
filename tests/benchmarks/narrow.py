"""What narrow-to-demand saves: multiply-accumulates over a list of models, and latency with the pass and without it.

    python tests/benchmarks/narrow.py                                   # the table, of models with a class token
    python tests/benchmarks/narrow.py beit_base_patch16_224 cait_xxs24_224
    python tests/benchmarks/narrow.py --latency deit_small_patch16_224

Models have random weights, which decide neither figure. Latency is that of ONNX Runtime, batch 1, as ``vlexport
profile`` measures it: the graph without the pass is the baseline of interleaved rounds, each session alone in its own
process, and the ratio is baseline / with the pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import CaptureError
from vlexport.core.progress import Silent
from vlexport.frontends.architecture import factory_from_text
from vlexport.frontends.capture import capture
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.base import NearMiss
from vlexport.passes.narrow_to_demand import NarrowToDemand
from vlexport.stages.profile import FULL, Measurable, measure_latency
from vlexport.targets import open_target
from vlexport.targets.base import Brief

MODELS = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_224",
    "vit_tiny_r_s16_p8_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "cait_xxs24_224", "crossvit_tiny_240", "pit_xs_224", "tnt_s_patch16_224",
    "volo_d1_224", "xcit_nano_12_p16_224", "coat_tiny", "vit_base_patch32_clip_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip
"""The last one pools over all tokens: nothing is to be found there."""


@dataclass(frozen=True)
class Row:
    """What was found for one model.

    Attributes:
        before: Multiply-accumulates of one image without the pass.
        after: With it.
        changes: Regions that were rewritten.
        stops: (operator, reason) of every near miss.
    """

    model: str
    before: int
    after: int
    changes: int
    stops: tuple[tuple[str, str], ...] = ()


def prepared(name: str) -> Program:
    """A model after every pass of the catalogue that stands before this one."""
    torch.manual_seed(0)
    made = factory_from_text(f"timm:{name}")
    program = capture(made.module.eval(), made.inputs, own=True).program
    for each in CATALOGUE:
        if each != NarrowToDemand.name:
            pass_class(each)().run(program)
    return program


def narrowed(name: str, program: Program) -> tuple[Program, Row]:
    """The program with the pass applied, and what it saved."""
    after = program.copy()
    changes, misses = NarrowToDemand().run(after)
    stops = tuple((_operator(miss), miss.reason) for miss in misses)
    return after, Row(name, cost(program).macs, cost(after).macs, len(changes), stops)


def _operator(miss: NearMiss) -> str:
    return str(miss.node.name)


def latency(name: str, rounds: int) -> dict[str, float | int | str | None]:
    """Median latency without the pass over that with it, on ONNX Runtime."""
    target = open_target("onnxruntime")
    before = prepared(name)
    after, _ = narrowed(name, before)
    inputs = {spec.name: value[:1].numpy() for spec, value in zip(before.signature.inputs, before.example, strict=True)}
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for label, program in (("without", before), ("with", after)):
            folder = Path(scratch) / label
            folder.mkdir()
            found.append(Measurable(label, target, folder, target.lower(program, folder, Brief(target.Options()))))
        plan = dataclasses.replace(FULL, rounds=rounds)
        result = measure_latency(
            found[1], inputs, baseline=found[0], plan=plan, threads=available_cores(), reporter=Silent()
        )
    wanted = ("p50_ms", "baseline_p50_ms", "ratio", "ratio_low", "ratio_high", "rounds", "repeated", "verdict")
    return {key: getattr(result, key) for key in wanted}


def main() -> int:
    """Print the table, or one ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="models of timm")
    parser.add_argument("--latency", metavar="MODEL", help="measure this model's latency instead")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--stops", action="store_true", help="also print where it stopped, and why")
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    given = parser.parse_args()
    machine = this_machine()
    print(f"{machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores")
    figures: object
    if given.latency:
        measured = latency(given.latency, given.rounds)
        print(f"{given.latency}: " + ", ".join(f"{key} {_shown(value)}" for key, value in measured.items()))
        figures = {given.latency: measured}
    else:
        figures = [asdict(row) for row in table(given.models, stops=given.stops)]
    if given.record is not None:
        record = {
            "what": "narrow-to-demand: " + ("latency" if given.latency else "multiply-accumulates at batch 1"),
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine.model_dump(mode="json"),
            "figures": figures,
        }
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def table(models: list[str], *, stops: bool) -> list[Row]:
    """One line a model, as it is found."""
    print(f"{'model':36} {'MMACs':>9} {'after':>9} {'saved':>7}  changes")
    rows = []
    for name in models:
        try:
            _, row = narrowed(name, prepared(name))
        except CaptureError as error:
            print(f"{name:36} not captured: {error.code}")
            continue
        share = f"{100 * (1 - row.after / row.before):.2f} %"
        print(f"{name:36} {row.before / 1e6:9.1f} {row.after / 1e6:9.1f} {share:>7}  {row.changes}", flush=True)
        for operator, reason in row.stops if stops else ():
            print(f"    {operator}: {reason}")
        rows.append(row)
    return rows


def _shown(value: float | int | str | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
