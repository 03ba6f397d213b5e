"""What ONNX Runtime's own operators gain on deit_small, a text tower and two convolutional hybrids: every way to build
them against the plain export, and each fusion against the same artifact without it.

    python -m tests.benchmarks.onnxruntime_fusions --scratch DIR --record docs/measured/onnxruntime_fusions.json --costs
    python -m tests.benchmarks.onnxruntime_fusions --scratch DIR --quick

Latency is measured as ``vlexport profile --against`` does it: interleaved rounds, each session alone in its own
process, rounds in which the baseline drifts by more than 5 % repeated, 95 % interval of the ratio. Bundles are built
once a scratch folder, and ratios that the record holds already are not measured again: a run that is stopped goes on.
``--costs`` writes what was found on this processor into the table that builds choose by. Weights are random,
which decides no latency. Run it on a machine that does nothing else: about 15 minutes, after 20 for the builds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vlexport
from tests.benchmarks.compare_models import First
from tests.record import write_rows
from vlexport.core.bundle_schema import Machine
from vlexport.core.devices import available_cores, this_machine
from vlexport.core.errors import InternalError
from vlexport.frontends import compat
from vlexport.frontends.architecture import factory_from_text
from vlexport.stages.profile import ProfileConfig, profile
from vlexport.targets.onnxruntime.fusions import FusionCost, fusion_costs

MODEL = "deit_small_patch16_224"
TEXT = "text tower of MiniLM's shape"
POOLED = "nextvit_small"
"""Keys and values are of fewer positions than queries, in three of its four attentions."""
PROJECTED = "cvt-13 of transformers"
"""Queries, keys and values are projected by convolutions of their own, in all of thirteen."""
COSTS = Path("targets/onnxruntime/fusion_costs.json")
KINDS = ("avx512_vnni", "avx2", "asimddp", "asimd")
"""Flags that figures speak for: a processor is of the first kind that it has."""
PLAIN = "naive"
_WORDS = 1000


@dataclass(frozen=True)
class Variant:
    """One way to build the model.

    Attributes:
        name: Of the bundle.
        precision: Of the build.
        options: ``--set``.
        fusion: What it has that ``without`` has not; empty for none.
        without: The variant that it is measured against beside the plain export.
        tokens: ``--tokens``. The plain export computes all of them, and says nothing of a fusion then: it is left out.
        source: The model.
    """

    name: str
    precision: str
    options: dict[str, str] = field(default_factory=dict)
    fusion: str = ""
    without: str = ""
    tokens: str = ""
    source: str = MODEL

    @property
    def model(self) -> str:
        """What is measured, as the table of costs names it."""
        return f"{self.source} with --tokens {self.tokens}" if self.tokens else self.source

    @property
    def against(self) -> tuple[str, ...]:
        """What it is measured against."""
        return tuple(filter(None, (PLAIN * (not self.tokens), self.without)))


_NO_BOUND = {"quantize.min_sqnr_db": "0"}
_DYNAMIC = {**_NO_BOUND, "quantize.activations": "dynamic"}
_SEVERAL = "onnxruntime.fuse_multi_head_attention"
_PLAIN_ATTENTION = {"onnxruntime.fuse_attention": "true", _SEVERAL: "false"}
_ANY_ATTENTION = {**_PLAIN_ATTENTION, _SEVERAL: "true"}
_PLAIN_TEXT = {**_PLAIN_ATTENTION, "onnxruntime.fuse_biased_attention": "false"}
_PARTED = {"onnxruntime.part_norms": "true"}
_MERGING = "tome:r=13"
VARIANTS = (
    Variant("fp32", "fp32", {"onnxruntime.fuse_attention": "false", _SEVERAL: "false"}),
    Variant("fp32-attention", "fp32", _PLAIN_ATTENTION, "fuse-attention", "fp32"),
    Variant("fp32-several", "fp32", _ANY_ATTENTION, "fuse-multi-head-attention", "fp32-attention"),
    Variant("static", "int8", {**_NO_BOUND, "onnxruntime.fuse_qattention": "false"}),
    Variant(
        "static-qattention", "int8", {**_NO_BOUND, "onnxruntime.fuse_qattention": "true"}, "fuse-qattention", "static"
    ),
    Variant("dynamic", "int8", {**_DYNAMIC, "onnxruntime.fuse_qattention": "false"}),
    Variant("dynamic-qattention", "int8", {**_DYNAMIC, "onnxruntime.fuse_qattention": "true"}),
    Variant("tome", "fp32", {**_PLAIN_ATTENTION, "onnxruntime.fuse_biased_attention": "false"}, tokens=_MERGING),
    Variant(
        "tome-biased-attention", "fp32", {**_PLAIN_ATTENTION, "onnxruntime.fuse_biased_attention": "true"},
        "fuse-biased-attention", "tome", tokens=_MERGING,
    ),
    Variant("text-joined", "fp32", {**_PLAIN_TEXT, "onnxruntime.part_norms": "false"}, source=TEXT),
    Variant(
        "text", "fp32", {**_PLAIN_TEXT, **_PARTED}, "part-norms", "text-joined", source=TEXT,
    ),
    Variant(
        "text-biased-attention", "fp32", {**_PLAIN_TEXT, **_PARTED, "onnxruntime.fuse_biased_attention": "true"},
        "fuse-biased-attention", "text", source=TEXT,
    ),
    Variant("nextvit", "fp32", _PLAIN_ATTENTION, source=POOLED),
    Variant("nextvit-several", "fp32", _ANY_ATTENTION, "fuse-multi-head-attention", "nextvit", source=POOLED),
    Variant("cvt", "fp32", _PLAIN_ATTENTION, source=PROJECTED),
    Variant("cvt-several", "fp32", _ANY_ATTENTION, "fuse-multi-head-attention", "cvt", source=PROJECTED),
)  # fmt: skip
"""Merged tokens weigh as many as they are of, which is added to the scores of every block but the first; the text tower
masks what pads. The last block of deit_small computes the class token alone, so that it has one query."""


@dataclass(frozen=True)
class Row:
    """A variant against another, or against the plain export.

    Attributes:
        variant: Its name.
        against: The other's, or ``naive``.
        p50_ms: Median of one image.
        against_p50_ms: The other's, in the same rounds.
        ratio: Other / variant, with its 95 % interval from ``low`` to ``high``; None where the machine was too noisy.
        rounds: Whose control held; ``repeated`` were thrown away.
        verdict: As ``vlexport profile`` says it.
        size_bytes: Of the artifact's folder.
    """

    variant: str
    against: str
    p50_ms: float
    against_p50_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int
    repeated: int
    verdict: str
    size_bytes: int


class TextTower(nn.Module):
    """Ids and mask ``(1, 32)`` to vectors ``(1, 32, 384)``: six layers with random weights."""

    def __init__(self) -> None:
        super().__init__()
        compat.declare_torchvision_operators()
        import transformers

        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        self.bert = transformers.BertModel(transformers.BertConfig(vocab_size=_WORDS, **shape), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


def saved(source: str, scratch: Path) -> Path:
    """A model's file, written once."""
    file = scratch / f"{source.replace(' ', '-')}.pt"
    if file.is_file():
        return file
    torch.manual_seed(0)
    if source == TEXT:
        ids = torch.arange(32)[None]
        vlexport.save(TextTower().eval(), file, inputs={"input_ids": ids, "attention_mask": (ids < 12).long()})
    elif source == PROJECTED:
        compat.declare_torchvision_operators()
        import transformers

        module = First(transformers.CvtForImageClassification(transformers.CvtConfig()), "logits")
        vlexport.save(module.eval(), file, inputs={"x": torch.zeros(2, 3, 224, 224)})
    else:
        made = factory_from_text(f"timm:{source}")
        vlexport.save(made.module.eval(), file, inputs={"x": torch.zeros(2, 3, 224, 224)})
    return file


def calibration(scratch: Path) -> Path:
    """Samples of the vision model, written once."""
    file = scratch / "calib.npz"
    if not file.is_file():
        np.savez(file, x=np.random.default_rng(1).standard_normal((16, 3, 224, 224), np.float32))
    return file


def built(variant: Variant, scratch: Path) -> Path:
    """The variant's bundle, made once."""
    output = scratch / f"{variant.name}.bundle"
    if output.is_dir():
        return output
    config = vlexport.BuildConfig(
        model=str(saved(variant.source, scratch)), output=str(output), precision=variant.precision,
        options=variant.options, profile=False,
        tokens=variant.tokens or None, calib=str(calibration(scratch)) if variant.precision == "int8" else None,
    )  # fmt: skip
    return vlexport.build(config).output


def row(variant: Variant, against: str, scratch: Path, *, threads: int, quick: bool) -> Row:
    """Measure a variant."""
    bundle, reference = built(variant, scratch), str(saved(variant.source, scratch))
    other = PLAIN if against == PLAIN else str(built(next(v for v in VARIANTS if v.name == against), scratch))
    report = profile(
        ProfileConfig(
            bundle=bundle, against=other, reference=reference if against == PLAIN else "", threads=threads, quick=quick
        )
    )
    found = report.latency
    if found is None:
        raise InternalError("VLX0901", "profile measured nothing")
    size = sum(each.stat().st_size for each in (bundle / "artifact").iterdir())
    return Row(
        variant=variant.name, against=against, p50_ms=found.p50_ms, against_p50_ms=found.baseline_p50_ms,
        ratio=found.ratio, low=found.ratio_low, high=found.ratio_high, rounds=found.rounds, repeated=found.repeated,
        verdict=found.verdict, size_bytes=size,
    )  # fmt: skip


def costs_of(rows: list[Row], source: str, machine: Machine) -> list[FusionCost]:
    """What the rows say of fusions, for the kind of processor that they were measured on."""
    kind = next(each for each in KINDS if each in machine.instruction_set)
    fused = {(each.name, each.without): each for each in VARIANTS if each.fusion}
    made = []
    for each in rows:
        variant = fused.get((each.variant, each.against))
        if variant is None or each.ratio is None or each.low is None or each.high is None:
            continue
        figures = {"ratio": round(each.ratio, 3), "low": round(each.low, 3), "high": round(each.high, 3)}
        about = {"fusion": variant.fusion, "precision": variant.precision, "model": variant.model, "source": source}
        where = {"instruction_set": kind, "processor": machine.cpu}
        made.append(FusionCost.model_validate({**about, **where, **figures}))
    return made


def write_costs(file: Path, fresh: list[FusionCost]) -> None:
    """Put figures into the table in the place of older ones of the same processor, the newest kind first."""
    where = {(each.instruction_set, each.processor) for each in fresh}
    kept = [each for each in fusion_costs() if (each.instruction_set, each.processor) not in where]
    whole = sorted([*kept, *fresh], key=lambda each: KINDS.index(each.instruction_set))
    file.write_text(json.dumps([each.model_dump(mode="json") for each in whole], indent=1) + "\n", encoding="utf-8")


def line(found: Row) -> str:
    """A row for the terminal."""
    ratio = "no ratio" if found.ratio is None else f"{found.ratio:.3f}x ({found.low:.3f} to {found.high:.3f})"
    rounds = f"{found.rounds} rounds, {found.repeated} repeated, {found.verdict}"
    return f"{found.variant:20} against {found.against:20} {ratio}, {found.p50_ms:.1f} ms, {rounds}"


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record, under the line that says where it is from: a line a variant."""
    machine = record["machine"]
    lines = [
        f"{record['date']}, {machine['cpu']} ({machine['cores']} cores), batch 1, with {record['versions']}.",
        "",
        "| built as | median | against the plain export (95 %) | against the same without the fusion | size |",
        "|---|---|---|---|---|",
    ]
    rows = [Row(**each) for each in record["rows"]]
    for name in dict.fromkeys(each.variant for each in sorted(rows, key=lambda each: each.against != PLAIN)):
        plain = next((each for each in rows if each.variant == name and each.against == PLAIN), None)
        pair = next((each for each in rows if each.variant == name and each.against != PLAIN), None)
        each = plain or pair
        assert each is not None
        cells = (name, f"{each.p50_ms:.1f} ms", _ratio(plain), _ratio(pair), f"{each.size_bytes / 1e6:.1f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(found: Row | None) -> str:
    if found is None:
        return ""
    return "too noisy" if found.ratio is None else f"{found.ratio:.2f}× ({found.low:.2f} to {found.high:.2f})"


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path("out"), help="folder for the model and the bundles")
    parser.add_argument(
        "--record", type=Path, help="JSON file for the rows; those that it holds are not measured again"
    )
    parser.add_argument("--costs", action="store_true", help=f"write what was found into {COSTS}")
    parser.add_argument("--only", action="append", default=[], help="a variant; repeatable")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 takes all cores")
    parser.add_argument("--quick", action="store_true", help="three rounds, which give no interval")
    parser.add_argument("--build-only", action="store_true", help="make the bundles and measure nothing")
    given = parser.parse_args()
    machine, threads = this_machine(), given.threads or available_cores()
    print(f"{machine.cpu} ({', '.join(machine.instruction_set)}), {machine.cores} cores, {threads} threads", flush=True)
    given.scratch.mkdir(parents=True, exist_ok=True)
    wanted = [each for each in VARIANTS if not given.only or each.name in given.only]
    for number, variant in enumerate(wanted, 1):
        print(f"bundle {number} of {len(wanted)}: {built(variant, given.scratch).name}", flush=True)
    if given.build_only:
        return 0
    rows: list[Row] = []
    if given.record is not None and given.record.is_file():
        known = json.loads(given.record.read_text(encoding="utf-8"))
        if known["machine"]["cpu"] != machine.cpu:
            parser.error(f"{given.record} is of another processor ({known['machine']['cpu']}): give another file")
        rows = [Row(**each) for each in known["rows"]]
    command = f"python -m tests.benchmarks.onnxruntime_fusions --record {given.record}{' --quick' * given.quick}"
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("onnxruntime", "torch", "timm"))
    for variant in wanted:
        for against in variant.against:
            same = [each for each in rows if (each.variant, each.against) == (variant.name, against)]
            if any(each.ratio is not None for each in same):
                continue
            rows = [each for each in rows if each not in same]
            rows.append(row(variant, against, given.scratch, threads=threads, quick=given.quick))
            print(line(rows[-1]), flush=True)
            if given.record is not None:
                write_rows(given.record, command, versions, rows)
    if given.costs:
        source = f"{threads} threads, {versions}; {command}"
        write_costs(COSTS, costs_of(rows, source, machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
