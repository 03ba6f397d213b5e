"""A record of what was measured: the figures, with date, machine and command. It holds no machine path."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from vlexport.core.devices import this_machine


def write_record(file: Path, what: str, *, note: str, **figures: Any) -> None:
    """Write a record.

    Args:
        file: JSON file.
        what: What the figures are, with their unit.
        note: What else a reader should know, as that the machine was busy; may be empty.
        figures: Name → what JSON holds.
    """
    record = {
        "what": what,
        "command": " ".join(["python -m", f"tests.benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": this_machine().model_dump(mode="json"),
        "note": note,
        **figures,
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def origin(record: dict[str, Any], file: str) -> str:
    """Where a record's figures come from, for a page at the root: machine, date, note and the file."""
    machine, note = record["machine"], f", {record['note']}" if record["note"] else ""
    shown = f"[docs/measured/{file}](docs/measured/{file})"
    return f"{machine['cpu']}, {machine['cores']} cores, {record['date']}{note} ({shown})"
