"""How soon vlexport says something: pages show what was recorded, bounds hold, and the records name no place."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.benchmarks import start_time
from tests.benchmarks.first_number import LIMIT_S, MODEL, STEPS, Step, run, table
from tests.figures import require_figures

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs/measured/first_number.json"


def test_page_shows_the_steps_that_were_recorded() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["model"] == MODEL
    assert [row["name"] for row in record["rows"]] == [step.name for step in STEPS]
    require_figures(ROOT / "docs/commands/inspect.md", "first number", table(record))


def test_first_number_was_there_in_time_and_the_record_names_no_place() -> None:
    text = RECORD.read_text(encoding="utf-8")
    rows = json.loads(text)["rows"]
    first = next(row for row in rows if row["said"])
    assert first["name"] == "vlexport inspect model.pt"
    assert first["seconds"] <= LIMIT_S
    assert first["said"] == ["4.60 GMACs"]
    assert [row["name"] for row in rows if row["network"]] == ["install"]
    assert not re.search(r"/(home|root|tmp|work|opt)\b|https?://", text)


def test_help_was_there_in_time_and_the_page_shows_what_was_recorded() -> None:
    record = json.loads((ROOT / "docs/measured/start_time.json").read_text(encoding="utf-8"))
    assert record["rows"]["--help"]["wall_ratio"] <= start_time.LIMIT
    assert {" ".join(command) for command in start_time.COMMANDS} == set(record["rows"])
    require_figures(ROOT / "docs/commands/README.md", "start time", start_time.table(record))


def test_figures_are_taken_from_what_a_command_says(tmp_path: Path) -> None:
    (tmp_path / "env/bin").mkdir(parents=True)
    script = "#!/bin/sh\necho \"Cost     4.60 GMACs, of $PYTHONPATH\"\necho 'Latency  p50 50.65 ms at 2 threads'\n"
    (tmp_path / "env/bin/vlexport").write_text(script, encoding="utf-8")
    (tmp_path / "env/bin/vlexport").chmod(0o755)
    row = run(Step("vlexport x", ("vlexport", "x")), tmp_path)
    assert (row["said"], row["network"]) == (["4.60 GMACs", "p50 50.65 ms"], False)
    assert run(Step("plain", ("true",)), tmp_path)["said"] == []
