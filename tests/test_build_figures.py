"""What the README says of the cost of builds is what was recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import several_targets
from tests.figures import require_figures

ROOT = Path(__file__).resolve().parents[1]
LINES = {"several_targets": several_targets.line}


@pytest.mark.parametrize("name", LINES)
def test_readme_says_what_was_recorded_of_builds(name: str) -> None:
    text = (ROOT / f"docs/measured/{name}.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["command"].startswith(f"python -m tests.benchmarks.{name}")
    assert not re.search(r"/(home|root|tmp|work|opt)\b", text), "a record names no place"
    require_figures(ROOT / "README.md", name, LINES[name](record))


def test_bounds_of_builds_hold_in_the_records() -> None:
    read = {name: json.loads((ROOT / f"docs/measured/{name}.json").read_text(encoding="utf-8")) for name in LINES}
    seconds = read["several_targets"]["seconds"]
    assert seconds[",".join(several_targets.TARGETS)] < sum(seconds[name] for name in several_targets.TARGETS)
