"""The report page: one file that asks for nothing, shows hostile names as text and renders whatever is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.accessibility import ROOT, SCHEMES, WIDTHS, axe, browser, examine
from vlexport.core.account import Account, Missing
from vlexport.core.artifact import Artifact, DimRange, TensorSpec
from vlexport.core.bundle_schema import (
    AccuracyResult,
    Bundle,
    ChangeSummary,
    Component,
    CostRecord,
    Disagreement,
    FileRecord,
    GateRecord,
    Golden,
    LatencyResult,
    Machine,
    NearMissRecord,
    OperatorTime,
    PassRecord,
    Report,
    Tuning,
    plain_json,
)
from vlexport.core.layer_record import LayerRecord, Layers, RangeRecord, read_layers
from vlexport.core.numerics import OutputFidelity
from vlexport.core.operators import HeavyCall, operators_from_counts
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.core.trials import SearchRecord, Trial
from vlexport.core.verdict import gate_from_text, judge, measured_drop, measured_rate
from vlexport.report import html
from vlexport.report.figures import idle_passes, latency_phrase, macs_phrase, parameters_phrase, size_phrase
from vlexport.report.html import html_from_report
from vlexport.report.inspection import pass_lines
from vlexport.report.near_misses import grouped_misses, miss_lines
from vlexport.report.plots import intervals_of, points_of
from vlexport.report.receipt import MAX_LINES, receipt
from vlexport.report.svg import histogram_svg

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
        "resize=8", "2 labels", "drop<=0.9inconclusivedrop is 0.5", "samples would decide",
        "top1>=99failtop1 is 95 %", "2026-01-02", "f" * 64,
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


# What is drawn, and what nothing obeys

CONTROL = "[red]\x1b]0;title\x07\u202egnp.exe\u2066\n::warning::x\r"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_told_from_its_ground_when_light_or_dark() -> None:
    """WCAG 2: 4.5 for text, 3 for bars."""
    sheet = (Path(html.__file__).parent / "report.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", line)) for line in sheet.splitlines()[:2]]
    assert [len(each) for each in schemes] == [10, 10]
    for scheme in schemes:
        for ground in ("back", "panel"):
            for name in ("ink", "soft", "good", "bad", "wait", "bar", "base"):
                least = 3.0 if name in ("bar", "base") else 4.5
                dark, light = sorted((luminance(scheme[name]), luminance(scheme[ground])))
                assert (light + 0.05) / (dark + 0.05) >= least, (name, ground, scheme)


def test_control_characters_are_shown_and_not_obeyed_when_a_name_holds_them() -> None:
    bundle = a_bundle(CONTROL, CONTROL, CONTROL)
    text = html_from_report(a_report(bundle, CONTROL), bundle, layers(CONTROL))
    found = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"]
    assert found == []
    assert not [line for line in text.splitlines() if line.startswith("::")]
    assert "\\x1b]0;title" in text


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


def test_operators_are_shown_with_bars_when_they_were_counted() -> None:
    bundle = a_bundle()
    heavy = (HeavyCall(operator="conv2d", module="stem", macs=600_000_000),)
    counts = {f"op{i}": (1, 0) for i in range(20)}
    main = bundle.main.model_copy(
        update={"operators": operators_from_counts({"linear": (8, 5), **counts}, {"linear": (4, 2_000_000)}, heavy)}
    )
    counted = bundle.model_copy(update={"components": {"main": main}})
    text = html_from_report(a_report(counted), counted)
    shown = " ".join(Page(text).text.split())
    assert '<code>linear</code></th><td class="number">8</td><td class="number">4</td>' in text
    assert "stem conv2d600.0050.0 %" in shown
    assert "7 rarer operators" in shown
    assert "28 calls became 4" in shown
    assert '<rect class="fill-base" width="100.0%"' in text
    assert '<rect class="fill-ours" width="50.0%"' in text


def test_time_by_operator_is_shown_before_and_after_when_a_profiler_told_it() -> None:
    bundle = a_bundle()
    report = a_report(bundle)
    assert report.latency is not None
    unasked = report.latency.model_copy(update={"operators": (), "baseline_operators": ()})
    assert "Where the time goes" not in html_from_report(report.model_copy(update={"latency": unasked}), bundle)
    ours = (OperatorTime(operator="MatMul", count=4, ms=3.0), OperatorTime(operator="Gelu", count=2, ms=0.5))
    theirs = (OperatorTime(operator="MatMul", count=4, ms=3.2), OperatorTime(operator="Erf", count=2, ms=1.5))
    latency = report.latency.model_copy(update={"operators": ours, "baseline_operators": theirs})
    page = Page(html_from_report(report.model_copy(update={"latency": latency}), bundle))
    row = " ".join(page.text.split()).partition("Where the time goes ")[2]
    together = "all together6 × 4.70 ms6 × 3.50 ms"
    assert row.startswith(
        f"Operatorimagethis bundle MatMul4 × 3.20 ms4 × 3.00 ms Erf2 × 1.50 ms Gelu2 × 0.50 ms {together}"
    )
    alone = unasked.model_copy(update={"operators": ours})
    row = " ".join(Page(html_from_report(report.model_copy(update={"latency": alone}), bundle)).text.split())
    assert "Operatorthis bundle MatMul4 × 3.00 ms Gelu2 × 0.50 ms all together6 × 3.50 ms" in row


def test_near_misses_are_one_line_a_reason_when_many_blocks_share_it() -> None:
    bundle = a_bundle()
    misses = tuple(NearMissRecord(pattern="p", node=f"node {i}", reason=f"because {i // 9}") for i in range(12))
    record = bundle.main.passes[0].model_copy(update={"near_misses": misses})
    groups = grouped_misses([record])
    assert [(each.reason, len(each.nodes)) for each in groups] == [("because 0", 9), ("because 1", 3)]
    assert miss_lines([record]) == [
        "         not p ×9: because 0", "           at node 0, node 1, node 2 and 6 more",
        "         not p ×3: because 1", "           at node 9, node 10, node 11",
    ]  # fmt: skip
    assert len(miss_lines([record], every=True)) == 14
    text = page(a_report(bundle).model_copy(update={"passes": (record,)}), bundle).text
    assert text.count("because 0") == 1
    assert "9 places" in text
    assert "node 8" in text


def test_pass_is_idle_when_it_had_nothing_to_do_in_any_of_its_runs() -> None:
    busy = a_bundle().main.passes[0]
    idle = busy.model_copy(update={"changes": (), "near_misses": ()})
    records = (idle, idle.model_copy(update={"name": "other"}), busy, idle.model_copy(update={"name": "other"}))
    assert idle_passes(records) == ("other",)
    lines = pass_lines("", records)
    assert (lines[-1], sum(line.startswith("Pass ") for line in lines)) == ("Idle     nothing to do: other", 1)
    report = a_report(a_bundle()).model_copy(update={"passes": records})
    assert "Nothing to do: other." in html_from_report(report, a_bundle())


def test_layers_are_read_as_far_as_they_hold_together(tmp_path: Path) -> None:
    bundle = a_bundle()
    record = FileRecord(sha256="0" * 64, size_bytes=1)
    listed = bundle.model_copy(update={"files": {"quantization.json": record, "calibration.json": record}})
    good = {"call": "1", "op": "linear", "module": "head", "weight": "s8", "sqnr_db": 31.5, "of_later": [1]}
    wrong = [{"op": "linear"}, 3, {**good, "sqnr_db": "NaN"}]
    (tmp_path / "quantization.json").write_text(json.dumps({"scheme": "u8s8", "layers": [good, *wrong]}))
    (tmp_path / "calibration.json").write_text("[" * 100_000)
    found = read_layers(tmp_path, listed)
    assert (found.scheme, [each.sqnr_db for each in found.layers], found.ranges) == ("u8s8", [31.5], ())
    assert read_layers(tmp_path, bundle) == Layers()  # not recorded in the bundle
    value = {"value": "3", "op": "gelu", "low": -1.0, "high": 2.0, "extremes": [-8, 2], "typical": 2, "later": []}
    (tmp_path / "calibration.json").write_text(json.dumps({"values": [value]}))
    assert [each.spread for each in read_layers(tmp_path, listed).ranges] == [4.0]


def test_page_lists_layers_when_the_bundle_is_quantized() -> None:
    bundle = a_bundle()
    text = Page(html_from_report(a_report(bundle), bundle, layers("block"))).text
    assert "3 calls compute with integers (scheme block, ranges by none)" in text
    assert "2.0 dB" in text
    assert "Quantized layers" not in page(a_report(bundle), bundle).text


def test_ranges_have_histograms_when_the_build_recorded_them() -> None:
    bundle = a_bundle()
    known = layers("block")
    first, second = known.ranges
    seen = known.model_copy(update={"ranges": (second, first.model_copy(update={"counts": (1000, 10, 0, 1)}))})
    text = html_from_report(a_report(bundle), bundle, seen)
    assert "2 ranges, far outliers first" in text
    assert text.index("<code>block</code> <span") < text.index("<code>calm</code>")
    assert text.count('class="spark"') == 1
    bars = text.split('class="spark"')[1].split(' d="')[1].split('"')[0]
    assert bars.startswith("M0 10V0.0H1V10Z")  # the fullest part reaches the top
    assert bars.count("M") == 3  # nothing lies in the third part, and something in the last
    assert histogram_svg(()) == histogram_svg((0, 0)).replace("0 0 2 10", "0 0 1 10")


def test_plots_are_inline_and_refer_to_nothing_when_matplotlib_is_installed() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'vlexport[report]'")
    bundle = a_bundle()
    text = html_from_report(a_report(bundle), bundle, layers(HOSTILE + CONTROL))
    assert text.count('class="plot"') == 4
    assert not re.search(r"href|url\(| style=|\bid=|<defs|<use|<metadata|xmlns", text)
    assert "times as fast 2, 1.9 to 2.1" in text
    assert "farthest gelu in" in text
    drawn = text.split('class="plot"')[1].split("</svg>")[0]
    assert {"stroke-ours", "stroke-base", "stroke-bad", "fill-ink"} <= set(re.findall(r"[a-z]+-[a-z]+", drawn))
    assert not re.search(r"#[0-9a-f]{6}", drawn)  # every colour is one of the page's
    assert html_from_report(a_report(bundle), bundle, layers(HOSTILE + CONTROL)) == text


def test_page_says_where_plots_come_from_when_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "can_plot", lambda: False)
    bundle = a_bundle()
    text = html_from_report(a_report(bundle), bundle, layers("block"))
    assert "pip install &#39;vlexport[report]&#39;" in text or "pip install 'vlexport[report]'" in text
    assert 'class="plot"' not in text


def numbers_of(text: str) -> dict[str, tuple[float, float]]:
    """Where each candidate's number stands in the plot of a search, by number."""
    drawn = text.split('aria-label="Candidates by speed')[1].split("</svg>")[0]
    found = re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>(\d)</text>', drawn)
    return {number: (float(x), float(y)) for x, y, number in found}


def test_candidates_are_drawn_by_speed_and_loss_when_a_search_timed_two() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'vlexport[report]'")
    bundle = a_bundle()
    report = a_report(bundle)
    text = html_from_report(report, bundle)
    assert "Candidates by speed and points lost: 1 1.10 times, 0.00 lost; 2 1.21 times, 0.40 lost;" in text
    drawn = text.split('aria-label="Candidates by speed')[1].split("</svg>")[0]
    assert drawn.count("stroke-ours") == 2 * 4, "four that nothing beats, a bar and a mark each"
    assert drawn.count("stroke-base") == 2
    places = numbers_of(text)
    assert set(places) >= set("12345")
    assert places["1"][0] < places["2"][0] < places["5"][0] < places["4"][0], "faster lies to the right"
    assert places["1"][1] < places["5"][1], "what loses more lies lower"
    near = [(a, b) for a in "12345" for b in "12345" if a < b and math.dist(places[a], places[b]) < 9]
    assert near == [], "no number lies on another"
    (search,) = report.searches
    only = search.model_copy(update={"trials": search.trials[:1]})
    assert "Candidates by speed" not in html_from_report(report.model_copy(update={"searches": (only,)}), bundle)


def test_candidates_without_time_or_loss_are_left_to_the_table() -> None:
    bundle = a_bundle()
    search = a_search()
    assert [each.number for each in points_of(search)] == [1, 2, 3, 4, 5]
    assert [each.best for each in points_of(search)] == [True, True, True, True, False]
    text = " ".join(page(a_report(bundle), bundle).text.split())
    assert "6 tokens=imagerefused: image" in text
    assert "7 tokens=imagetoo noisy2.50" in text, "points of agreement where there are no labels"
    odd = search.trials[0].model_copy(update={"ratio": math.inf})
    assert points_of(search.model_copy(update={"trials": (odd,)})) == ()


def test_no_interval_is_drawn_when_a_figure_is_infinite_or_missing() -> None:
    report = a_report(a_bundle())
    assert [each.mark for each in intervals_of(report)] == [99.0, 5.0, 1.0]  # the gates' bounds, and the baseline
    bare = report.model_copy(update={"accuracy": None, "latency": None})
    assert intervals_of(bare) == ()
    assert report.accuracy is not None
    odd = report.accuracy.model_copy(update={"top1_high": math.inf, "drop": None})
    assert [each.name for each in intervals_of(report.model_copy(update={"accuracy": odd}))] == ["times as fast"]


# Figures and the receipt


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (1_000_000, "1.0 MB"),
        (97_660_000, "97.7 MB"),
        (10 << 30, "10.74 GB"),
    ],
)
def test_size_is_in_decimal_units_when_shown(size: int, shown: str) -> None:
    assert size_phrase(size) == shown


def test_macs_name_what_is_not_counted_when_an_op_is_opaque() -> None:
    assert macs_phrase(2_000_000, ()) == "2.00 MMACs"
    assert macs_phrase(2_304, ()) == "2.30 kMACs", "nothing that is there is shown as zero"
    assert [parameters_phrase(count) for count in (1, 24, 2400, 21_600_000)] == [
        "1 parameter", "24 parameters", "2.40 k parameters", "21.60 M parameters",
    ]  # fmt: skip
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


@pytest.mark.skipif(not browser() or axe() is None, reason="needs Chromium and axe-core: npm install axe-core")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_when_it_looks_at_the_page(width: int, scheme: str) -> None:
    bundle = a_bundle()
    text = html_from_report(a_report(bundle), bundle, layers("block"))
    script = axe()
    assert script is not None
    found = examine(text, width=width, scheme=scheme, script=script)
    assert (found["violations"], found["overflow"]) == ([], 0)
    assert found["passes"] > 25
    assert found["plot_text"] >= 10
    broken = examine(text.replace('lang="en"', ""), width=width, scheme=scheme, script=script)
    assert [each.partition(":")[0] for each in broken["violations"]] == ["html-has-lang"]  # it sees what is wrong


def test_recorded_pages_have_no_fault_when_axe_looked_at_them() -> None:
    record = json.loads((ROOT / "docs/measured/accessibility.json").read_text(encoding="utf-8"))
    seen = {(row["page"], row["scheme"], row["width"]) for row in record["rows"]}
    assert seen == {(page, scheme, width) for page in ("plain", "hostile") for scheme in SCHEMES for width in WIDTHS}
    assert [row for row in record["rows"] if row["violations"] or row["overflow"]] == []
    assert all(row["passes"] > 25 for row in record["rows"])
    assert all(row["plot_text"] >= 10 for row in record["rows"]), "read on a phone"
