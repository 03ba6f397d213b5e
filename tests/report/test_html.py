"""The report page: one file that asks for nothing, shows hostile names as text and renders whatever is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.report.example_reports import CONTROL, HOSTILE, Page, a_bundle, a_report, layers, page
from vlexport.core.bundle_schema import (
    AccuracyResult,
    FileRecord,
    LatencyResult,
    NearMissRecord,
    OperatorTime,
    Report,
    plain_json,
)
from vlexport.core.layer_record import Layers, read_layers
from vlexport.core.operators import HeavyCall, operators_from_counts
from vlexport.report import html
from vlexport.report.figures import idle_passes
from vlexport.report.html import html_from_report
from vlexport.report.inspection import pass_lines
from vlexport.report.near_misses import grouped_misses, miss_lines
from vlexport.report.svg import histogram_svg


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
