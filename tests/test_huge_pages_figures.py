"""The figures of docs/onnxruntime.md about huge pages are those of the record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.huge_pages import NAMES, Row, table
from tests.figures import require_figures

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "docs/measured/huge_pages.json").read_text(encoding="utf-8"))
ROWS = [Row(**each) for each in RECORD["rows"]]


def test_page_holds_the_table_when_rendered_from_the_record() -> None:
    here = f"{RECORD['date']}, {RECORD['machine']['cpu']} ({RECORD['machine']['cores']} cores), {RECORD['versions']}."
    require_figures(ROOT / "docs/onnxruntime.md", "huge pages", f"{here}\n\n{table(ROWS)}")


def test_every_model_of_the_benchmark_was_measured() -> None:
    assert [each.model for each in ROWS] == list(NAMES)
    assert all(each.ratio is not None for each in ROWS), "a rough figure is no record"
