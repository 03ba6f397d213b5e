"""The tables of docs/reduce_tokens_example.md and docs/tokens.md are those that were recorded.

``UPDATE_GOLDEN=1`` writes them anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.token_tables import MEASURED, TABLES, accuracy

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {name: DOCS / ("tokens.md" if name == "freeze" else "reduce_tokens_example.md") for name in TABLES}
RECORDED = [name for name in TABLES if (MEASURED / f"{name}.json").is_file()]


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- figures: {name} -->\n)(.*?)(\n<!-- end of figures -->)", re.DOTALL)


@pytest.mark.parametrize("name", RECORDED)
def test_table_is_what_was_recorded_when_the_page_is_read(name: str) -> None:
    page = PAGES[name]
    text = page.read_text(encoding="utf-8")
    found = block(name).search(text)
    assert found is not None, f"no place for {name}"
    if os.environ.get("UPDATE_GOLDEN"):
        page.write_text(text[: found.start(2)] + TABLES[name]() + text[found.end(2) :], encoding="utf-8")
        return
    assert found.group(2) == TABLES[name]()


def test_pages_have_a_place_for_every_table_and_nothing_in_it_when_there_is_no_record() -> None:
    for page in set(PAGES.values()):
        held = re.findall(r"<!-- figures: (\w+) -->", page.read_text(encoding="utf-8"))
        assert sorted(held) == sorted(name for name in TABLES if PAGES[name] == page)
    for name in set(TABLES) - set(RECORDED):
        found = block(name).search(PAGES[name].read_text(encoding="utf-8"))
        assert found is not None
        assert found.group(2) == "", f"figures of {name} that no record holds"


def row(name: str, **changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name, "tokens": f"{name}:keep=0.7", "macs": 3_000_000_000, "photos": 2000, "right": 1700, "lost": 40,
        "gained": 30, "fresh": 1500, "fresh_lost": 32, "fresh_gained": 20, "refit_lost": 35,
        "refit_gained": 35, "control": "random", "control_only": 10, "only_ours": 10,
    }  # fmt: skip
    return {**found, **changed}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (60, 10, "Better than chance at its rate: `evit:keep=0.7`."),
        (15, 10, "**Not shown to be better than chance** (the interval over `random` holds zero): `evit:keep=0.7`."),
        (10, 60, "**Worse than chance** at its rate: `evit:keep=0.7`."),
    ],
)
def test_words_follow_the_interval_when_compared_with_chance(ours: int, theirs: int, said: str) -> None:
    record = {
        "date": "2026-01-01", "command": "c", "versions": "v", "machine": {"cpu": "p", "cores": 2},
        "rows": [row("dense", tokens="", control=""), row("evit", only_ours=ours, control_only=theirs)],
    }  # fmt: skip
    told = accuracy(record, {"rows": []})
    assert said in told
    assert "| `evit:keep=0.7` | 3.00 | 2000 | 85.0 % | 0.50 (" in told
    assert "| 0.80 (" in told, "on photos that were not looked at"
    assert "not measured" in told
