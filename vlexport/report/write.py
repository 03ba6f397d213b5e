"""report.json and report.html of one measurement, below ``measured/`` of a bundle."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import vlexport
from vlexport.core.bundle import MEASURED_FOLDER, size_bytes
from vlexport.core.bundle_schema import Bundle, Report, plain_json
from vlexport.core.devices import this_machine
from vlexport.core.errors import BundleError
from vlexport.core.layer_record import read_layers
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


def require_writable(folder: Path) -> None:
    """Refuse a bundle that no report can be added to, before anything is measured.

    Raises:
        BundleError: VLX0605 when ``measured/`` or its index is a link, VLX0607 when it cannot be written.
    """
    measured = folder / MEASURED_FOLDER
    for path in (measured, measured / INDEX_FILE):
        if path.is_symlink():
            raise BundleError(
                "VLX0605", f"{path.relative_to(folder)} is a link that leaves the bundle", where=str(folder),
                hint="do not use this bundle",
            )  # fmt: skip
    place = measured if measured.exists() else folder
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise _unwritable(folder, "no permission" if place.is_dir() else f"{MEASURED_FOLDER} is no folder")


def write_report(folder: Path, bundle: Bundle, report: Report) -> Path:
    """Write the next ``measured/local-N`` below ``folder`` and list it in the index; returns its folder.

    It is written beside its place and renamed, so that no half-written report is ever seen.

    Raises:
        BundleError: VLX0605, VLX0607 as in :func:`require_writable`.
    """
    require_writable(folder)
    measured = folder / MEASURED_FOLDER
    payload = json.dumps(plain_json(report), indent=1, sort_keys=True, allow_nan=False) + "\n"
    page = html_from_report(report, bundle, read_layers(folder, bundle))
    try:
        measured.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=measured, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "report"
            made.mkdir()
            (made / "report.json").write_text(payload, encoding="utf-8")
            (made / "report.html").write_text(page, encoding="utf-8")
            place = _next_place(measured, made)
            _write_index(measured, Path(scratch) / INDEX_FILE)
    except OSError as error:
        raise _unwritable(folder, error.strerror or type(error).__name__) from error
    return place


def _next_place(measured: Path, made: Path) -> Path:
    """Rename ``made`` to the first free ``local-N``; another process may take one at the same time."""
    number = 1
    while True:
        place = measured / f"local-{number}"
        number += 1
        if os.path.lexists(place):
            continue
        try:
            made.rename(place)
        except OSError:
            if not os.path.lexists(place):
                raise
        else:
            return place


def _write_index(measured: Path, scratch: Path) -> None:
    names = sorted((p.name for p in measured.glob("local-*") if p.is_dir()), key=lambda n: (len(n), n))
    scratch.write_text(json.dumps({"schema_version": 1, "reports": names}, indent=1) + "\n", encoding="utf-8")
    scratch.replace(measured / INDEX_FILE)


def _unwritable(folder: Path, why: str) -> BundleError:
    return BundleError(
        "VLX0607", f"no report can be added to the bundle: {why}", where=str(folder),
        hint="copy the bundle to a folder that can be written",
    )  # fmt: skip
