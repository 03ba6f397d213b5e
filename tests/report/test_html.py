"""The report page: one file that asks for nothing, shows hostile names as text and renders whatever is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
    PassRecord,
    Report,
    Tuning,
    plain_json,
)
from vlexport.core.numerics import OutputFidelity
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.core.verdict import gate_from_text, judge, measured_drop, measured_rate
from vlexport.report.figures import latency_phrase, macs_phrase, size_phrase
from vlexport.report.html import html_from_report
from vlexport.report.receipt import MAX_LINES, receipt

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "</code></td><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & {{ 7*7 }} [red]x"


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
        ),
        verdicts=tuple(judge(gate_from_text(g), rates) for g in ("drop<=5", "drop<=0.9", "top1>=99")),
        passes=bundle.main.passes, stage_seconds={"passes": 1.25, name: 0.5}, notes=(name, "second"),
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


def test_page_asks_for_nothing_when_opened() -> None:
    bundle = a_bundle()
    text = html_from_report(a_report(bundle), bundle)
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"url\(|@import|javascript:", text)
    found = Page(text)
    assert {tag for tag, _ in found.tags}.isdisjoint(
        {"script", "link", "iframe", "img", "object", "embed", "form", "base"}
    )
    attributes = {name for _, given in found.tags for name in given}
    assert attributes.isdisjoint({"src", "href", "srcset", "action", "data"})
    assert not [name for name in attributes if name.startswith("on")]


def test_page_forbids_everything_when_a_browser_reads_its_policy() -> None:
    bundle = a_bundle()
    metas = [given for tag, given in page(a_report(bundle), bundle).tags if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    text = html_from_report(a_report(bundle), bundle)
    style = text.split("<style>")[1].split("</style>")[0]
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{allowed}'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert " style=" not in text  # such a policy applies no attribute of that name


def test_names_are_text_when_they_are_hostile() -> None:
    tame, hostile = a_bundle(), a_bundle(HOSTILE, HOSTILE, HOSTILE)
    shown = page(a_report(hostile, HOSTILE), hostile)
    assert [tag for tag, _ in shown.tags] == [tag for tag, _ in page(a_report(tame), tame).tags]  # not one tag more
    assert {n for _, given in shown.tags for n in given} == {
        n for _, given in page(a_report(tame), tame).tags for n in given
    }
    assert shown.text.count(HOSTILE) >= 12
    assert "49" not in shown.text.split("Notes")[1].split("Interface")[0]  # a template in a name is not run


def test_page_shows_what_was_measured_when_all_was() -> None:
    bundle = a_bundle()
    text = " ".join(page(a_report(bundle), bundle).text.split())
    for said in (
        "95.00 %", "92.40 to 96.90 % (exact)", "+0.50 points", "-0.40 to +1.60 points", "commonest class",
        "p50 4.00 ms at 2 threads; 2.00× against image (95 %: 1.90 to 2.10, faster)",
        "7 interleaved rounds, 1 repeated",
        "inf dB", "398", "within rounding", "batch norm folded ×2", "2e-07, float32", "20.0 MB", "1.20 GMACs",
        "resize=8", "2 labels", "drop<=0.9: inconclusive", "samples would decide", "top1>=99: fail", "2026-01-02",
        "f" * 64,
    ):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize(
    "missing",
    [
        {"accuracy": None}, {"fidelity": {}}, {"accuracy": None, "fidelity": {}}, {"latency": None}, {"verdicts": ()},
        {"passes": ()}, {"notes": ()}, {"stage_seconds": {}}, {"disagreements": ()}, {"reference": ""},
        {"accuracy": AccuracyResult(samples=3, top1=0.0, top1_low=0.0, top1_high=70.8)},
        {"latency": LatencyResult(p50_ms=0.01, load_ms=1, runs=5, threads=1)},
        {"latency": LatencyResult(p50_ms=1, load_ms=1, runs=5, threads=1, baseline="b", baseline_p50_ms=1,
                                  baseline_load_ms=2, baseline_size_bytes=3, verdict="too noisy to tell", repeated=8)},
        {"accuracy": None, "fidelity": {}, "latency": None, "verdicts": (), "passes": (), "notes": (), "measured": (),
         "stage_seconds": {}, "disagreements": (), "reference": "", "samples": 0},
    ],
    ids=lambda missing: "+".join(missing),
)  # fmt: skip
def test_page_renders_and_reads_well_when_a_part_is_missing(missing: dict[str, Any]) -> None:
    bundle = a_bundle()
    text = page(a_report(bundle).model_copy(update=missing), bundle).text
    for wrong in ("None", "nan", "Undefined", "()", "{}"):
        assert wrong not in text, wrong
    if missing.get("latency", "") is None:
        assert "not measured here" in text
    if "accuracy" in missing and "fidelity" in missing:
        assert "give samples with --data" in text


def test_page_renders_when_the_bundle_knows_no_labels_or_preprocessing() -> None:
    bundle = a_bundle()
    main = bundle.main.model_copy(update={"labels": (), "preprocess": {}, "passes": ()})
    bare = bundle.model_copy(update={"components": {"main": main}, "tools": {}})
    assert "labels" not in page(a_report(bare).model_copy(update={"passes": ()}), bare).text


def test_report_is_strict_json_and_reads_back_when_a_figure_is_infinite() -> None:
    report = a_report(a_bundle())

    def strict(text: str) -> None:
        raise AssertionError(text)

    text = json.dumps(plain_json(report), allow_nan=False)
    assert Report.model_validate(json.loads(text, parse_constant=strict)) == report


# Figures and the receipt


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0.0 kB"), (999_949, "999.9 kB"), (1_000_000, "1.0 MB"), (97_660_000, "97.7 MB")]
)
def test_size_is_in_decimal_units_when_shown(size: int, shown: str) -> None:
    assert size_phrase(size) == shown


def test_macs_name_what_is_not_counted_when_an_op_is_opaque() -> None:
    assert macs_phrase(2_000_000, ()) == "2.00 MMACs"
    assert macs_phrase(2_000_000_000, ("roi_align",)) == "2.00 GMACs without roi_align"


def test_latency_says_no_ratio_when_there_is_none() -> None:
    report = a_report(a_bundle())
    latency = report.latency
    assert latency is not None
    quick = latency.model_copy(update={"verdict": "quick", "rounds": 3})
    noisy = latency.model_copy(update={"ratio": None, "ratio_low": None, "ratio_high": None, "repeated": 8})
    alone = LatencyResult(p50_ms=4, load_ms=1, runs=5, threads=1)
    said = [latency_phrase(report.model_copy(update={"latency": each})) for each in (quick, noisy, alone, None)]
    assert said == [
        "p50 4.00 ms at 2 threads; 2.00× against image (1.90 to 2.10, range of 3 quick rounds, no verdict)",
        "p50 4.00 ms at 2 threads; against image: too noisy to tell (8 rounds drifted)",
        "p50 4.00 ms at 1 thread",
        "not measured here",
    ]


def test_receipt_has_twelve_lines_at_most_when_there_is_much_to_say() -> None:
    bundle = a_bundle()
    report = a_report(bundle)
    tuning = Tuning(trials=(), confirmation=None, adopted={}, finished=True)
    more = {"verdicts": report.verdicts * 9, "tuning": tuning}
    lines = receipt(bundle, report.model_copy(update=more), "out/my.bundle")
    assert len(lines) <= MAX_LINES == 12
    assert "25 more in the report" in "".join(lines)
    assert "2 notes in the report" in "".join(lines)
    assert lines[3].startswith("Missing  11 of 12 attention modules did not become one operator: image at image and 10")
    assert not [line for line in lines if "\n" in line]
    assert lines[-2] == "Use it:"


# In a browser


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
@pytest.mark.parametrize("width", [400, 1200])
def test_page_is_drawn_when_a_browser_opens_it(width: int, tmp_path: Path) -> None:
    bundle = a_bundle(HOSTILE, HOSTILE, HOSTILE)
    (tmp_path / "report.html").write_text(html_from_report(a_report(bundle, HOSTILE), bundle), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
             f"--screenshot={tmp_path}/page.png", f"--window-size={width},1600"]  # fmt: skip
    subprocess.run(
        [str(CHROMIUM), *flags, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=60
    )
    with Image.open(tmp_path / "page.png") as drawn:
        colours = drawn.convert("RGB").getcolors(1 << 24)
        assert drawn.width == width
    assert colours is not None
    assert len(colours) > 20  # text, cards and bars, not a blank page
    assert not [c for _, c in colours if c == (0, 0, 0)] or len(colours) > 50
