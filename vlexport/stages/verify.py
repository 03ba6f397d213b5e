"""verify: is a bundle intact, and does its artifact still compute the golden vectors here? No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlexport.core.bundle import ARTIFACT_FOLDER, check_files, read_bundle
from vlexport.core.bundle_schema import Bundle
from vlexport.core.progress import Reporter, Silent
from vlexport.stages.golden import check_bundle
from vlexport.targets import open_target


@dataclass(frozen=True)
class Verified:
    """What verify found: the bundle, and the largest golden error of each component, and of the whole if several.

    ``emulator`` is what ran them in place of the target's own runtime; empty where that did.
    """

    bundle: Bundle
    errors: dict[str, float]
    emulator: str = ""


def verify(folder: str | Path, *, threads: int = 0, reporter: Reporter | None = None) -> Verified:
    """Check digest, files and golden vectors.

    Raises:
        BundleError: VLX0601, VLX0603, VLX0605.
        GateError: VLX0602 altered, VLX0606 the golden check failed.
        CapabilityError: VLX0501, VLX0505 when this machine cannot run it.
    """
    reporter = reporter or Silent()
    folder = Path(folder)
    bundle = read_bundle(folder)
    with reporter.stage("check files"):
        check_files(folder, bundle)
    target = open_target(bundle.target)
    opened = target.open(folder / ARTIFACT_FOLDER, bundle.main.artifact, threads=threads)
    with opened as session, reporter.stage("golden check"):
        errors = check_bundle(target, session, folder, bundle, code="VLX0606", threads=threads)
        return Verified(bundle, errors, target.probe().emulator if session.timing == "emulated" else "")
