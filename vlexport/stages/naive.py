"""The naive baseline of profile, made from the model file that a bundle was built from. Needs torch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlexport.core.bundle import read_bundle
from vlexport.core.cache import Cache, open_cache
from vlexport.core.errors import UsageError
from vlexport.core.progress import Reporter
from vlexport.frontends.source import open_source
from vlexport.ir.program import Program
from vlexport.stages.lowering_cache import Made, lowering_key, made_once
from vlexport.stages.profile import Measurable
from vlexport.stages.reference import reference_config
from vlexport.targets import open_target
from vlexport.targets.base import Target


def plain_export(
    target: Target, program: Program, folder: Path, *, cache: Cache | None, reporter: Reporter
) -> Measurable:
    """The plain export of a captured Program in a new folder inside ``folder``, from the cache where it is known."""
    place = folder / "naive"

    def make() -> Made:
        return Made(artifact=target.lower_naive(program, place))

    key = lowering_key("naive", target, program) if cache is not None else None
    made = made_once(cache, key, place, make, what="plain export", reporter=reporter)
    return Measurable("naive", target, place, made.artifact)


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
            source = open_source(reference_config(reference, arch, recorded))
            if source.source_hash != recorded.source_hash:
                raise UsageError("VLX0804", "this is not the model that the bundle was built from", where="--reference")
            target, cache = open_target(recorded.target), open_cache(reporter)
            made = plain_export(target, source.program, Path(scratch), cache=cache, reporter=reporter)
        yield made
