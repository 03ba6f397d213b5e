"""The figures of docs/commands/validate.md on wrong preprocessing are those of the record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.preprocess_doctor import CASES, known_rows, table

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs/measured/preprocess_doctor.json"
RECORD = json.loads(FILE.read_text(encoding="utf-8"))


def test_page_holds_the_table_when_rendered_from_the_record() -> None:
    page = (ROOT / "docs/commands/validate.md").read_text(encoding="utf-8")
    assert page.partition("<!-- doctor -->\n")[2].partition("\n<!-- /doctor -->")[0] == table(RECORD)


def test_what_was_planted_was_named_and_nothing_else() -> None:
    rows = list(known_rows(FILE))
    assert [row.case for row in rows] == [case.name for case in CASES]
    for row, case in zip(rows, CASES, strict=True):
        assert (row.wanted, row.verdict == "named") == (case.named, bool(case.named)), row.case
        assert row.gain_low > 0 or row.verdict != "named"
