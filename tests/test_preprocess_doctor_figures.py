"""The figures of docs/commands/validate.md on wrong preprocessing are those of the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks.preprocess_doctor import CASES, colour_of, known_rows, shown, table

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs/measured/preprocess_doctor.json"


def test_page_holds_the_table_when_there_is_a_record_and_says_so_when_there_is_none() -> None:
    page = (ROOT / "docs/commands/validate.md").read_text(encoding="utf-8")
    found = page.partition("<!-- doctor -->\n")[2].partition("\n<!-- /doctor -->")[0]
    if not FILE.is_file():
        assert found == "Not measured yet."
        return
    assert found == shown(json.loads(FILE.read_text(encoding="utf-8")))
    rows = list(known_rows(FILE))
    cases = {case.name: case for case in CASES}
    assert [row.case for row in rows] == list(cases)
    for row in rows:
        named = cases[row.case].named
        assert (row.wanted, row.verdict == "named") == (named, bool(named)), row.case


def test_table_tells_a_line_with_its_interval_when_one_was_named() -> None:
    row = {"case": "0 to 255", "verdict": "named", "line": "scale=1/255", "samples": 80, "recorded_top1": 70.0}
    better = {**row, "top1": 85.0, "gain_low": 2.25, "gain_high": 28.0}
    kept = {**row, "verdict": "cannot tell"}
    assert table({"rows": [better, {**kept, "top1": 70.0, "gain_low": 0.0, "gain_high": 0.0}]}).splitlines()[2:] == [
        "| 0 to 255 | `scale=1/255` | 70.0 % | 85.0 % | +15.0 (+2.2 to +28.0) | 80 |",
        "| 0 to 255 | cannot tell | 70.0 % | – | – | 80 |",
    ]


@pytest.mark.parametrize(
    ("pixel", "colour"),
    [
        ((200, 20, 30), "red"), ((220, 60, 130), "red"), ((220, 190, 20), "yellow"), ((30, 160, 60), "blue"),
        ((30, 60, 220), "blue"), ((120, 120, 120), ""), ((255, 255, 255), ""),
    ],
)  # fmt: skip
def test_colour_of_a_stamp_is_its_mean_hue_and_none_when_it_is_gray(pixel: tuple[int, int, int], colour: str) -> None:
    stamp = Image.new("RGB", (8, 8), "white")
    stamp.paste(pixel, (2, 2, 6, 6))
    assert colour_of(stamp) == colour
