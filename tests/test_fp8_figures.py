"""The figures of docs/tensorrt.md on fp8 are those of the record, and the record does not fall behind."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.fp8_accuracy import Row, table
from tests.figures import require_figures
from vlexport.core.verdict import measured_drop

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "docs/measured/fp8.json").read_text(encoding="utf-8"))
ROWS = [Row(**each) for each in RECORD["rows"]]


def test_page_holds_the_table_when_rendered_from_the_record() -> None:
    require_figures(ROOT / "docs/tensorrt.md", "fp8", table(ROWS))


def test_record_does_not_fall_behind_when_made_anew() -> None:
    (row,) = ROWS
    assert "FP8 x FP8" in row.engine_products
    assert "attention in FP8" in row.engine_products
    assert row.samples >= 300
    assert row.equal / row.samples >= 0.95
    assert measured_drop(row.lost, row.gained, row.samples).value <= 2.0
    assert row.sqnr_db >= 20.0
