"""The record of a zoo: its rows with the machine, the day, the command and the versions that made them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlexport.core.devices import this_machine


def write_record(file: Path, command: str, versions: str, rows: Sequence[Any]) -> None:
    """Replace the record in one step.

    Args:
        file: JSON.
        command: What reproduces it.
        versions: Of what took part.
        rows: Instances of a dataclass.
    """
    whole = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": this_machine().model_dump(mode="json"),
        "versions": versions,
        "rows": [asdict(row) for row in rows],
    }
    half = file.with_suffix(".part")
    half.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    half.replace(file)
