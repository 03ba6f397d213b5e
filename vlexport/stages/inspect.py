"""inspect: what a bundle holds, and whether it is a bundle. No torch; ``stages/inspect_model`` looks at model files."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from vlexport.core.bundle import BUNDLE_FILE, COMPARE_FILE, MEASURED_FOLDER, check_files, read_bundle
from vlexport.core.bundle_schema import Report
from vlexport.core.errors import GateError
from vlexport.core.inspection import BundleInspection, Measurement

REPORT_FILE = "report.json"
_MAX_REPORT_BYTES = 64 << 20


def is_bundle(path: Path) -> bool:
    """Whether a path is to be read as a bundle, or as the folder of several, and not as a model."""
    try:
        return any((path / name).is_file() for name in (BUNDLE_FILE, COMPARE_FILE))
    except (OSError, ValueError):  # a name that the file system cannot hold
        return False


def inspect_bundle(folder: Path) -> BundleInspection:
    """What a bundle holds; one whose files were altered is still shown, and said to be.

    Raises:
        BundleError: VLX0601, VLX0603, VLX0605.
        GateError: VLX0602 when ``bundle.json`` itself does not fit its digest.
    """
    bundle = read_bundle(folder)
    altered = ""
    try:
        check_files(folder, bundle)
    except GateError as error:
        altered = error.message
    measured: list[Measurement] = []
    unreadable: list[str] = []
    for file in _reports(folder):
        name = file.parent.name
        try:
            if file.stat().st_size > _MAX_REPORT_BYTES:
                raise ValueError("too large")
            report = Report.model_validate_json(file.read_bytes())
            measured.append(Measurement(name=name, report=report))
        except (OSError, ValueError, ValidationError):
            unreadable.append(name)
    return BundleInspection(bundle=bundle, altered=altered, measured=tuple(measured), unreadable=tuple(unreadable))


def _reports(folder: Path) -> list[Path]:
    """Report files below ``measured/``, by number; links are left out."""
    measured = folder / MEASURED_FOLDER
    if measured.is_symlink() or not measured.is_dir():
        return []
    found = [p for p in measured.glob(f"*/{REPORT_FILE}") if not p.is_symlink() and not p.parent.is_symlink()]
    return sorted(found, key=lambda p: (len(p.parent.name), p.parent.name))
