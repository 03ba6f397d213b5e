"""The figures of docs/calibration.md are those of the record: memory does not grow with the number of photos."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.calibration_memory import Row, table
from tests.figures import require_figures

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "docs/measured/calibration_memory.json").read_text(encoding="utf-8"))
ROWS = [Row(**each) for each in RECORD["rows"]]


def test_page_holds_the_table_when_rendered_from_the_record() -> None:
    require_figures(ROOT / "docs/calibration.md", "calibration memory", table(ROWS))


def test_many_photos_take_what_few_take() -> None:
    few, many = ROWS
    assert (few.photos, many.photos) == (32, 512)
    assert few.values == many.values > 40
    assert few.peak_mb > few.before_mb
    assert many.peak_mb <= 1.05 * few.peak_mb
