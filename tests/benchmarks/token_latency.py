"""What token reduction gains: latency of ONNX Runtime at a batch against the same model built without it.

    python -m tests.benchmarks.token_latency --scratch DIR --record docs/measured/tokens_latency.json
    python -m tests.benchmarks.token_latency --scratch DIR --record docs/measured/tokens_latency.json --batch 8
    python -m tests.benchmarks.token_latency --scratch DIR --only deit_small_patch16_224

Both bundles come from ``vlexport build`` with the same flags but ``--tokens``, and are measured as ``vlexport profile
--against`` does it: interleaved rounds, each session alone in its own process, rounds in which the baseline drifts by
more than 5 % repeated. The ratio is baseline / reduced with its 95 % interval. Weights of models of timm are random,
which decides neither latency nor multiply-accumulates. Run it on a machine that does nothing else: about two minutes a
variant. The record is written after each, and what it holds for the same versions is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import vlexport
from samples.solar_cells import data
from samples.solar_cells.model import IMAGE_SIZE, load_model
from tests.benchmarks.token_accuracy import DENSE, PACKAGES, VARIANTS, Variant
from tests.record import write_rows
from vlexport.core.bundle import read_bundle
from vlexport.core.devices import this_machine
from vlexport.core.errors import InternalError
from vlexport.frontends.architecture import factory_from_text
from vlexport.stages.profile import ProfileConfig, profile

SOLAR_CELLS = "solar_cells"
DEIT = "deit_small_patch16_224"
MODELS: dict[str, tuple[Variant, ...]] = {
    SOLAR_CELLS: VARIANTS,
    DEIT: (
        Variant(DENSE),
        Variant("evit-0.7", "evit:keep=0.7,layers=4+7+10"),
        Variant("tome-13", "tome:r=13"),
        Variant("mctf-16", "mctf:r=16"),
    ),
}
"""Model → how it is built; the first is what the others are measured against."""


@dataclass(frozen=True)
class Row:
    """One variant of one model.

    Attributes:
        model: A key of :data:`MODELS`.
        name: The variant's; ``tokens`` is what ``--tokens`` got.
        batch: Images at once.
        macs: Multiply-accumulates of one image; ``dense_macs`` those without reduction.
        p50_ms: Median of one batch, milliseconds; ``dense_p50_ms`` without reduction, in the same rounds.
        ratio: Median over rounds of dense / reduced, with its 95 % interval from ``low`` to ``high``.
        rounds: Whose control held; ``repeated`` were thrown away.
        verdict: As ``vlexport profile`` says it.
    """

    model: str
    name: str
    tokens: str
    batch: int
    macs: int
    dense_macs: int
    p50_ms: float
    dense_p50_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int
    repeated: int
    verdict: str


def saved(name: str, batch: int, scratch: Path) -> Path:
    """A model's file for one batch, written once."""
    file = scratch / f"{name}-batch{batch}.pt"
    if file.is_file():
        return file
    example = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    if name == SOLAR_CELLS:
        vlexport.save(
            load_model(), file, inputs={"image": example}, dynamic=False, preprocess=data.PREPROCESS, labels=data.LABELS
        )  # fmt: skip
        return file
    torch.manual_seed(0)
    module = factory_from_text(f"timm:{name}").module.eval()
    vlexport.save(module, file, inputs=example, dynamic=False, preprocess=f"timm:{name}")
    return file


def built(model: Path, variant: Variant, scratch: Path) -> Path:
    """The variant's bundle, made anew."""
    output = scratch / f"{model.stem}-{variant.name}-timed.bundle"
    tokens = variant.tokens or None
    vlexport.build(vlexport.BuildConfig(model=str(model), output=str(output), tokens=tokens, profile=False, force=True))
    return output


def rows(model: str, batch: int, scratch: Path, wanted: list[Variant], threads: int) -> Iterator[Row]:
    """Some variants against the first, one after the other."""
    if not wanted:
        return
    file = saved(model, batch, scratch)
    against = built(file, MODELS[model][0], scratch)
    for variant in wanted:
        bundle = built(file, variant, scratch)
        report = profile(ProfileConfig(bundle=bundle, against=str(against), threads=threads))
        latency = report.latency
        if latency is None:
            raise InternalError("VLX0901", "profile measured nothing")
        yield Row(
            model=model, name=variant.name, tokens=variant.tokens, batch=batch,
            macs=_macs(bundle) // batch, dense_macs=_macs(against) // batch,
            p50_ms=latency.p50_ms, dense_p50_ms=latency.baseline_p50_ms, ratio=latency.ratio,
            low=latency.ratio_low, high=latency.ratio_high, rounds=latency.rounds, repeated=latency.repeated,
            verdict=latency.verdict,
        )  # fmt: skip


def measured(record: Path | None, versions: str) -> dict[tuple[str, str, int], Row]:
    """Model, ``--tokens`` and batch → what a record of the same versions holds."""
    if record is None or not record.is_file():
        return {}
    held = json.loads(record.read_text(encoding="utf-8"))
    found = [Row(**each) for each in held["rows"]] if held["versions"] == versions else []
    return {(row.model, row.tokens, row.batch): row for row in found}


def _macs(bundle: Path) -> int:
    return read_bundle(bundle).main.cost.macs


def line(row: Row) -> str:
    """A row for the terminal."""
    ratio = "no ratio" if row.ratio is None else f"{row.ratio:.2f}x ({row.low:.2f} to {row.high:.2f})"
    share = 100 * (1 - row.macs / row.dense_macs)
    macs = f"{row.macs / 1e9:.3f} GMACs an image ({share:.1f} % fewer)"
    return (
        f"{row.model} {row.name} at batch {row.batch}: {ratio}, {row.p50_ms:.1f} ms, {macs}, "
        f"{row.rounds} rounds, {row.repeated} repeated, {row.verdict}"
    )


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path("out"), help="folder for models and bundles")
    parser.add_argument("--record", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", choices=MODELS, action="append", default=[], help="a model; repeatable")
    parser.add_argument("--variant", action="append", default=[], help="a variant by name; repeatable")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 takes all cores")
    given = parser.parse_args()
    machine = this_machine()
    print(f"{machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores")
    given.scratch.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES)
    found = measured(given.record, versions)
    wanted = {
        model: [each for each in MODELS[model][1:] if not given.variant or each.name in given.variant]
        for model in given.only or MODELS
    }
    for model, variants in wanted.items():
        missing = [each for each in variants if (model, each.tokens, given.batch) not in found]
        for number, row in enumerate(rows(model, given.batch, given.scratch, missing, given.threads), 1):
            found[model, row.tokens, row.batch] = row
            print(f"{number} of {len(missing)}: {line(row)}", flush=True)
            if given.record is not None:
                command = f"python -m tests.benchmarks.token_latency --record {given.record}"
                write_rows(given.record, command, versions, list(found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
