"""The naive baseline of profile, made from the model file that a bundle was built from. Needs torch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlexport.core.artifact import Artifact
from vlexport.core.bundle import RECIPE_FILE, read_bundle
from vlexport.core.cache import Cache, open_cache
from vlexport.core.config import read_recipe
from vlexport.core.errors import UsageError
from vlexport.core.pipeline import pipeline_of
from vlexport.core.progress import Reporter
from vlexport.frontends.sources import Sources, open_sources
from vlexport.ir.program import Program
from vlexport.stages.lowering_cache import Made, lowering_key, made_once
from vlexport.stages.profile import Measurable
from vlexport.stages.reference import reference_config, specialized_as
from vlexport.targets import open_target
from vlexport.targets.base import Target


def plain_export(
    target: Target, sources: Sources, folder: Path, *, cache: Cache | None, reporter: Reporter
) -> Measurable:
    """The plain export of a captured model in a new folder inside ``folder``, from the cache where it is known."""
    place = folder / "naive"
    programs = {name: each.program for name, each in sources.components.items()}
    parts = {
        name: _exported(target, program, place if sources.only is not None else place / name, cache, reporter)
        for name, program in programs.items()
    }
    if sources.only is not None:
        return Measurable("naive", target, place, next(iter(parts.values())))
    whole = pipeline_of(parts, {name: each.signature.dims for name, each in programs.items()}, sources.edges)
    return Measurable("naive", target, place, whole)


def _exported(target: Target, program: Program, place: Path, cache: Cache | None, reporter: Reporter) -> Artifact:
    def make() -> Made:
        return Made(artifact=target.lower_naive(program, place))

    key = lowering_key("naive", target, program) if cache is not None else None
    return made_once(cache, key, place, make, what="plain export", reporter=reporter).artifact


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
            recipe = read_recipe(bundle / RECIPE_FILE)
            sources = specialized_as(
                open_sources(reference_config(reference, arch, recorded, recipe)), recorded, recipe
            )
            if sources.source_hash != recorded.source_hash:
                raise UsageError("VLX0804", "this is not the model that the bundle was built from", where="--reference")
            target, cache = open_target(recorded.target), open_cache(reporter)
            made = plain_export(target, sources, Path(scratch), cache=cache, reporter=reporter)
        yield made
