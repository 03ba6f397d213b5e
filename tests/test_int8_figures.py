"""The figures of docs/quantization.md are those of the record, and the record does not fall behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.int8_accuracy import MODELS, Row, table
from vlexport.core.verdict import measured_drop

ROOT = Path(__file__).resolve().parents[1]
ROWS = [Row(**each) for each in json.loads((ROOT / "docs/measured/int8.json").read_text(encoding="utf-8"))["rows"]]


def test_page_holds_the_table_when_rendered_from_the_record() -> None:
    page = (ROOT / "docs/quantization.md").read_text(encoding="utf-8")
    assert page.partition("<!-- figures: int8 -->\n")[2].partition("\n<!-- /figures -->")[0] == table(ROWS)
    assert [each.name for each in ROWS] == list(MODELS)


@pytest.mark.parametrize(
    ("name", "equal", "drop", "sqnr_db", "cosine"),
    [("solar_cells", 98.5, 0.5, 29.0, 0.999), ("lite0", 97.0, 0.5, 20.0, 0.99), ("minilm", 90.0, 1.0, 15.0, 0.99)],
)
def test_record_does_not_fall_behind_when_made_anew(
    name: str, equal: float, drop: float, sqnr_db: float, cosine: float
) -> None:
    (row,) = [each for each in ROWS if each.name == name]
    measured = measured_drop(row.lost, row.gained, row.samples)
    assert 100 * row.equal / row.samples >= equal
    assert measured.value <= drop
    assert row.sqnr_db >= sqnr_db
    assert row.cosine >= cosine
