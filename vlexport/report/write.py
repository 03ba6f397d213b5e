"""report.json and report.html of one measurement, below ``measured/`` of a bundle."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import vlexport
from vlexport.core.bundle import MEASURED_FOLDER, size_bytes
from vlexport.core.bundle_schema import Bundle, Report, plain_json
from vlexport.core.devices import this_machine
from vlexport.report.html import html_from_report

INDEX_FILE = "index.json"


def new_report(bundle: Bundle, *, notes: Sequence[str] = ()) -> Report:
    """A report about a bundle on this machine, nothing measured yet."""
    return Report(
        vlexport=vlexport.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        bundle_digest=bundle.digest,
        target=bundle.target,
        precision=bundle.precision,
        machine=this_machine(),
        size_bytes=size_bytes(bundle),
        cost=bundle.main.cost,
        passes=bundle.main.passes,
        notes=tuple(notes),
    )


def write_report(folder: Path, bundle: Bundle, report: Report) -> Path:
    """Write the next ``measured/local-N`` below ``folder`` and list it in the index; returns its folder."""
    measured = folder / MEASURED_FOLDER
    measured.mkdir(exist_ok=True)
    number = 1
    while True:
        place = measured / f"local-{number}"
        try:
            place.mkdir()
            break
        except FileExistsError:
            number += 1
    payload = json.dumps(plain_json(report), indent=1, sort_keys=True, allow_nan=False)
    (place / "report.json").write_text(payload + "\n", encoding="utf-8")
    (place / "report.html").write_text(html_from_report(report, bundle), encoding="utf-8")
    names = sorted((p.name for p in measured.iterdir() if p.is_dir()), key=lambda n: (len(n), n))
    (measured / INDEX_FILE).write_text(
        json.dumps({"schema_version": 1, "reports": names}, indent=1) + "\n", encoding="utf-8"
    )
    return place
