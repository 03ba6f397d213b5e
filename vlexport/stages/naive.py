"""The naive baseline of profile, made from the model file that a bundle was built from. Needs torch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlexport.core.bundle import read_bundle
from vlexport.core.errors import UsageError
from vlexport.core.progress import Reporter
from vlexport.frontends.sources import open_sources
from vlexport.stages.profile import Measurable
from vlexport.stages.reference import reference_config
from vlexport.stages.whole_model import naive_artifact
from vlexport.targets import open_target


@contextlib.contextmanager
def naive_baseline(bundle: Path, reference: str, arch: str | None, reporter: Reporter) -> Iterator[Measurable]:
    """The plain export of the model, in a folder that vanishes afterwards.

    Raises:
        UsageError: VLX0804 when no model file is given, or it is not the one the bundle was built from.
    """
    if not reference:
        raise UsageError("VLX0804", "--against naive needs the model", where="--against", hint="add --reference MODEL")
    recorded = read_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix="vlexport-") as scratch:
        with reporter.stage("plain export"):
            sources = open_sources(reference_config(reference, arch, recorded))
            if sources.source_hash != recorded.source_hash:
                raise UsageError("VLX0804", "this is not the model that the bundle was built from", where="--reference")
            target = open_target(recorded.target)
            artifact = naive_artifact(target, sources, Path(scratch))
        yield Measurable("naive", target, Path(scratch), artifact)
