"""What token reduction saves in multiply-accumulates, and how long the pass takes.

    python -m tests.benchmarks.token_macs --record docs/measured/token_macs.json [--only MODEL]

Models are timm's with random weights, which decide neither. A model is captured once and copied for each method; the
pass runs behind every earlier one, without a gate, and what runs behind it (``narrow-to-demand``) is counted apart.
Seconds are those of the processor, of one thread: they say the same whatever else the machine does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import vlexport
from tests.record import write_rows
from vlexport.core.errors import InternalError
from vlexport.frontends.architecture import factory_from_text
from vlexport.frontends.capture import capture
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.stages.choices import passes_of

DEIT = "deit_small_patch16_224"
LARGE = "vit_large_patch16_224"
MODELS: dict[str, tuple[str, ...]] = {
    DEIT: ("evit:keep=0.7,layers=4+7+10", "tome:r=13", "mctf:r=16"),
    LARGE: ("evit:keep=0.7", "tome:r=8", "mctf:r=8"),
}
"""Model of timm → what ``--tokens`` gets."""
PACKAGES = ("torch", "timm")


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        model: A key of :data:`MODELS`; ``tokens`` is what ``--tokens`` got.
        dense: MACs of one image in front of the pass, ``macs`` behind it, ``narrowed`` behind every pass.
        seconds: Of the processor, in the pass alone.
    """

    model: str
    tokens: str
    dense: int
    macs: int
    narrowed: int
    seconds: float


def captured(name: str) -> Program:
    """A model of timm, with weights from a seed."""
    torch.manual_seed(0)
    made = factory_from_text(f"timm:{name}")
    return capture(made.module.eval(), made.inputs, own=True).program


def row(name: str, program: Program, tokens: str) -> Row:
    """One method on a copy of a model."""
    program, dense, macs, seconds = program.copy(), 0, 0, 0.0
    for each in passes_of(vlexport.BuildConfig(model=name, tokens=tokens)):
        reduces = each.stage == "tokens" and each.effect == "approximate"
        before, started = cost(program).macs if reduces else 0, time.process_time()
        each.run(program)
        if reduces:
            dense, macs, seconds = before, cost(program).macs, time.process_time() - started
    if not dense:
        raise InternalError("VLX0901", f"no pass answers to --tokens {tokens}")
    return Row(name, tokens, dense, macs, cost(program).macs, round(seconds, 2))


def rows(name: str) -> Iterator[Row]:
    """Every method of a model."""
    program = captured(name)
    for tokens in MODELS[name]:
        yield row(name, program, tokens)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file for the rows; written when all models are through")
    parser.add_argument("--only", choices=MODELS, action="append", default=[], help="a model; repeatable")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in given.only or MODELS:
        for each in rows(name):
            print(each, flush=True)
            found.append(each)
    if given.record is not None:
        versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES)
        write_rows(given.record, f"python -m tests.benchmarks.token_macs --record {given.record}", versions, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
