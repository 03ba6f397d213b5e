"""The tables of the pages about tokens are those that were recorded, and what was recorded keeps its promises.

``UPDATE_GOLDEN=1`` writes them anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.figures import place, require_figures
from tests.token_tables import MEASURED, TABLES, accuracy, recorded

DOCS = Path(__file__).resolve().parents[1] / "docs"
PLACES = {"freeze": "tokens.md", "token_macs": "reduce_tokens.md"}
PAGES = {name: DOCS / PLACES.get(name, "reduce_tokens_example.md") for name in TABLES}
RECORDED = [name for name in TABLES if (MEASURED / f"{name}.json").is_file()]


@pytest.mark.parametrize("name", RECORDED)
def test_table_is_what_was_recorded_when_the_page_is_read(name: str) -> None:
    require_figures(PAGES[name], name, TABLES[name]())


def test_pages_have_a_place_for_every_table_and_nothing_in_it_when_there_is_no_record() -> None:
    for page in set(PAGES.values()):
        held = re.findall(r"<!-- figures: (\w+) -->", page.read_text(encoding="utf-8"))
        assert sorted(held) == sorted(name for name in TABLES if PAGES[name] == page)
    for name in set(TABLES) - set(RECORDED):
        found = place(name).search(PAGES[name].read_text(encoding="utf-8"))
        assert found is not None
        assert found.group(2) == "", f"figures of {name} that no record holds"


def row_of(name: str, **wanted: Any) -> dict[str, Any]:
    """The one row of a record with these entries."""
    (found,) = (each for each in recorded(name)["rows"] if wanted.items() <= each.items())
    return found


def test_multiply_accumulates_are_those_of_the_papers_and_the_pass_is_quick() -> None:
    small = "deit_small_patch16_224"
    evit = row_of("token_macs", model=small, tokens="evit:keep=0.7,layers=4+7+10")
    assert evit["macs"] == pytest.approx(3.0e9, rel=0.02), "EViT, table 1: 3.0 G"
    mctf = row_of("token_macs", model=small, tokens="mctf:r=16")
    assert round(1 - mctf["narrowed"] / mctf["dense"], 2) >= 0.44, "MCTF: 44 % fewer, 4.6 to 2.6 G"
    large = [each for each in recorded("token_macs")["rows"] if each["model"] == "vit_large_patch16_224"]
    assert len(large) >= 3
    assert max(each["seconds"] for each in large) <= 5.0


def test_every_calibration_digit_has_its_class_when_frozen_at_100() -> None:
    rows = {each["model"]: each for each in recorded("freeze")["figures"]}
    found = rows["frozen at 100"]
    assert found["calibration_equal"] == found["calibration"] >= 500


def test_heatmaps_stay_alike_when_merged_patches_are_given_back() -> None:
    found = row_of("token_heatmaps", tokens="tome:r=20,layers=4+5+6+7+8+9+10+11")
    assert found["mean"] >= 0.97
    assert found["macs"] < 0.8 * found["dense_macs"], "of a network whose decoder sees every patch"


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
