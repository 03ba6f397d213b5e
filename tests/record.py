"""The record of a measurement or of a zoo: its figures with the machine, the day and the command that made them.

It holds no machine path, and takes the place of an older one in one step.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlexport.core.devices import this_machine


def write_rows(file: Path, command: str, versions: str, rows: Sequence[Any]) -> None:
    """Write a record of rows.

    Args:
        file: JSON.
        command: What reproduces it.
        versions: Of what took part.
        rows: Instances of a dataclass.
    """
    _write(file, command=command, **_here(), versions=versions, rows=[asdict(row) for row in rows])


def write_figures(file: Path, what: str, *, note: str, **figures: Any) -> None:
    """Write a record of single figures of a benchmark, with the command line that runs now.

    Args:
        file: JSON.
        what: What the figures are, with their unit.
        note: What else a reader should know, as that the machine was busy; may be empty.
        figures: Name → what JSON holds.
    """
    command = " ".join(["python -m", f"tests.benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    _write(file, what=what, command=command, **_here(), note=note, **figures)


def origin(record: dict[str, Any], file: str) -> str:
    """Where a record's figures come from, for a page at the root: machine, date, note and the file."""
    machine, note = record["machine"], f", {record['note']}" if record["note"] else ""
    shown = f"[docs/measured/{file}](docs/measured/{file})"
    return f"{machine['cpu']}, {machine['cores']} cores, {record['date']}{note} ({shown})"


def _here() -> dict[str, Any]:
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"date": today, "machine": this_machine().model_dump(mode="json")}


def _write(file: Path, **whole: Any) -> None:
    half = file.with_suffix(".part")
    half.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    half.replace(file)
