"""Plots of the report: inline, in the colours of the page, and only of what was measured."""

from __future__ import annotations

import math
import re

import pytest

from tests.report.example_reports import CONTROL, HOSTILE, a_bundle, a_report, a_search, layers, page
from vlexport.report import html
from vlexport.report.html import html_from_report
from vlexport.report.plots import intervals_of, points_of


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
