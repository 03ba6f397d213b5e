"""A report with everything that one can hold, with any name in it, and what a browser reads of its page."""

from __future__ import annotations

import math
from html.parser import HTMLParser

from vlexport.core.account import Account, Missing
from vlexport.core.artifact import Artifact, DimRange, TensorSpec
from vlexport.core.bundle_schema import (
    AccuracyResult,
    Bundle,
    ChangeSummary,
    Component,
    CostRecord,
    Disagreement,
    GateRecord,
    Golden,
    LatencyResult,
    Machine,
    NearMissRecord,
    OperatorTime,
    PassRecord,
    Report,
)
from vlexport.core.layer_record import LayerRecord, Layers, RangeRecord
from vlexport.core.numerics import OutputFidelity
from vlexport.core.operators import HeavyCall, operators_from_counts
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.core.trials import SearchRecord, Trial
from vlexport.core.verdict import gate_from_text, judge, measured_drop, measured_rate
from vlexport.report.html import html_from_report

HOSTILE = "</code></td><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & {{ 7*7 }} [red]x"
CONTROL = "[red]\x1b]0;title\x07\u202egnp.exe\u2066\n::warning::x\r"


def a_bundle(name: str = "image", label: str = "cat", what: str = "batch norm folded") -> Bundle:
    image = TensorSpec(name=name, dtype="float32", shape=("batch", 3, 8, 8))
    scores = TensorSpec(name=f"{name} scores", dtype="float32", shape=("batch", 2))
    change = ChangeSummary(what=what, count=2, where=(name,), saved_nodes=2, saved_parameters=8, saved_macs=1)
    miss = NearMissRecord(pattern=name, node=name, reason=name)
    record = PassRecord(
        name="reparameterize", stage="normalize", effect="exact", options={}, changes=(change,), near_misses=(miss,),
        gate=GateRecord(worst=2e-7, proof="float32", probes=3),
    )  # fmt: skip
    component = Component(
        artifact=Artifact(target="onnxruntime", path="main.onnx", inputs=(image,), outputs=(scores,)),
        dims={"batch": DimRange()},
        preprocess={name: preprocess_from_spec("resize=8,crop=8,scale=1/255")},
        labels=(label, "dog"),
        golden=Golden(inputs="golden/main/inputs.npz", outputs="golden/main/outputs.npz", tolerance=1e-4),
        passes=(record,),
        cost=CostRecord(macs=1_200_000_000, parameters=5_000_000, size_bytes=20_000_000, opaque=(name,)),
        operators=operators_from_counts(
            {name: (12, 0), "linear": (49, 0)}, {"linear": (48, 1_200_000_000)},
            (HeavyCall(operator="linear", module=name, macs=90_000_000),),
        ),
        account=(
            Account(
                idea="attention", expected=12, found=1, fates={name: 1},
                missing=(Missing(of=name, reason=name, modules=(name, "second", *"abcdefghi")),),
            ),
        ),
    )  # fmt: skip
    return Bundle(
        vlexport="0.1.0", state="verified", target="onnxruntime", precision="fp32", device_profile="this",
        source_hash="0" * 64, components={"main": component}, tools={name: "1"}, instruction_set=("avx2",),
        compatibility={}, files={}, digest="f" * 64,
    )  # fmt: skip


def a_search(name: str = "tome:r=8") -> SearchRecord:
    """Seven candidates; two crowd each other, one was refused, and one was not timed."""
    measured = ((1.1, 0.0), (1.21, 0.4), (1.22, 0.42), (1.4, 1.5), (1.3, 2.0))
    trials = [
        Trial(
            options={"tokens": name}, outcome="holds" if loss < 1 else "fails", ratio=ratio, ratio_low=ratio - 0.03,
            ratio_high=ratio + 0.03, figures={"drop": loss, "gmacs": 3.0},
        )
        for ratio, loss in measured
    ]  # fmt: skip
    trials.append(Trial(options={"tokens": name}, outcome="refused", reason=name))
    trials.append(Trial(options={"tokens": name}, outcome="too noisy", figures={"agreement": 97.5}))
    return SearchRecord(about="tokens", said=name, trials=tuple(trials), front=(3, 2, 1, 0))


def a_report(bundle: Bundle, name: str = "image") -> Report:
    """With everything a report can hold."""
    rates = (measured_drop(3, 1, 400), measured_rate("top1", 380, 400))
    return Report(
        vlexport="0.1.0", date="2026-01-02", bundle_digest=bundle.digest, target="onnxruntime", precision="fp32",
        machine=Machine(cpu=name, instruction_set=("avx2", name), cores=2, system=name, python="3.11"),
        size_bytes=20_000_000, cost=bundle.main.cost, reference=name, samples=400,
        accuracy=AccuracyResult(
            samples=400, top1=95.0, top1_low=92.4, top1_high=96.9, top5=99.0, reference_top1=95.5, reference_top5=99.1,
            drop=0.5, drop_low=-0.4, drop_high=1.6, majority=10.0,
        ),
        fidelity={name: OutputFidelity(
            samples=400, cosine_mean=1.0, cosine_min=0.9999, sqnr_db=math.inf, relative_error=0.0, agreements=398,
        )},
        measured=rates,
        disagreements=(Disagreement(sample=name, reference=1, ours=0, margin=2e-5, close=True),),
        latency=LatencyResult(
            p50_ms=4.0, load_ms=30, runs=900, threads=2, baseline=name, baseline_p50_ms=8.0, baseline_load_ms=50,
            baseline_size_bytes=21_000_000, ratio=2.0, ratio_low=1.9, ratio_high=2.1, rounds=7, repeated=1,
            verdict="faster",
            operators=(OperatorTime(operator=name, count=61, ms=3.0), OperatorTime(operator="Gelu", count=12, ms=0.5)),
            baseline_operators=(OperatorTime(operator=name, count=85, ms=6.5),),
        ),
        verdicts=tuple(judge(gate_from_text(g), rates) for g in ("drop<=5", "drop<=0.9", "top1>=99")),
        passes=bundle.main.passes, stage_seconds={"passes": 1.25, name: 0.5}, notes=(name, "second"),
        searches=(a_search(name),),
    )  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(report: Report, bundle: Bundle) -> Page:
    return Page(html_from_report(report, bundle))


def layers(name: str, count: int = 3) -> Layers:
    return Layers(
        scheme=name,
        layers=tuple(
            LayerRecord(
                call=str(i),
                op="linear",
                module=f"{name}{i}",
                weight="s8",
                output="1" if i else "",
                operands=("0",),
                sqnr_db=i,
            )
            for i in range(count)
        ),
        ranges=(
            RangeRecord(value="1", op="gelu", module=name, low=-1, high=1, extremes=(-2.0, 40.0), typical=2.0),
            RangeRecord(value="2", op="add", module="calm", low=-1, high=1, extremes=(-1.0, 1.0), typical=0.9),
        ),
    )
