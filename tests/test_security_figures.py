"""The figures in SECURITY.md are those that the campaigns recorded. ``UPDATE_GOLDEN=1`` writes them anew."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- figures: [^\n]* -->\n)(.*?)(\n<!-- end of figures -->)", re.DOTALL)


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "measured" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _when(record: dict[str, Any]) -> str:
    return f"{record['date']} | `{record['command']}` |"


def rendered() -> str:
    """The table, from the records."""
    fuzz, tamper, kills = recorded("fuzz"), recorded("tamper"), recorded("kills")
    machine = f"{fuzz['machine']['cores']} cores, Python {fuzz['machine']['python']}"
    doors = ", ".join(f"{name} {door['mutations']}" for name, door in fuzz["doors"].items())
    killed = sum(count for name, count in kills["outcomes"].items() if name.startswith("killed"))
    whole = kills["outcomes"].get("next build whole", 0)
    return "\n".join(
        [
            "| what | result | date | command |",
            "|---|---|---|---|",
            f"| {fuzz['mutations']} mutated files ({doors}) | {fuzz['findings']} findings | {_when(fuzz)}",
            f"| {tamper['mutations']} mutations of a bundle | `verify` missed {tamper['missed']}; "
            f"of the intact bundle it says exit {tamper['intact_exit']} | {_when(tamper)}",
            f"| {killed} builds killed at random | {len(kills['wrong'])} half bundles or damaged caches; "
            f"{whole} builds after them whole | {_when(kills)}",
            "",
            f"Machine: {machine}.",
        ]
    )


def test_figures_are_those_recorded_when_security_is_read() -> None:
    file = ROOT / "SECURITY.md"
    text = file.read_text(encoding="utf-8")
    found = _BLOCK.search(text)
    assert found is not None
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text[: found.start(2)] + rendered() + text[found.end(2) :], encoding="utf-8")
        return
    assert found.group(2) == rendered()


@pytest.mark.parametrize("name", ["fuzz", "tamper", "kills"])
def test_record_holds_no_finding_when_it_is_committed(name: str) -> None:
    found = recorded(name)
    assert not found.get("findings"), "mend it, or list it in SECURITY.md as not defended"
    assert not found.get("missed")
    assert not found.get("wrong")
    if name == "fuzz":
        assert found["mutations"] >= 10_000
        assert found["mutations"] == sum(door["mutations"] for door in found["doors"].values())
