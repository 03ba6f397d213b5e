"""The reference of validate: a model file (opened with torch) or another bundle (without)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlexport.core.artifact import Array
from vlexport.core.bundle import ARTIFACT_FOLDER, BUNDLE_FILE, check_files, read_bundle
from vlexport.core.bundle_schema import Bundle
from vlexport.core.config import BuildConfig
from vlexport.core.errors import InputError, ModelFileError

if TYPE_CHECKING:
    from vlexport.frontends.sources import Sources

_OF_WEIGHTS = ("arch_arg", "weights_key")
_OF_ARITHMETIC = ("preprocess", "fold_preprocess")
"""What a bundle's inputs mean, where its graph does a part of the preprocessing."""
_OTHER_PREPROCESSING = "the reference records another preprocessing; both were measured on this bundle's"


@dataclass(frozen=True)
class Reference:
    """Something that computes the outputs a bundle should give, by public names, and what to know about it."""

    name: str
    compute: Callable[[Mapping[str, Array]], dict[str, Array]]
    notes: tuple[str, ...] = ()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute."""
        return self.compute(inputs)


@contextlib.contextmanager
def open_reference(
    path: str, bundle: Bundle, *, arch: str | None = None, recipe: Mapping[str, Any] | None = None
) -> Iterator[Reference | None]:
    """Open what ``--reference`` names; None for an empty path. ``recipe`` is the bundle's.

    Raises:
        InputError: VLX0507 when its inputs or outputs have other names than the bundle's.
    """
    if not path:
        yield None
        return
    if os.path.isfile(Path(path) / BUNDLE_FILE):
        from vlexport.targets import open_target

        other = read_bundle(Path(path))
        check_files(Path(path), other)
        _require_same(path, wanted_names(bundle), wanted_names(other))
        with open_target(other.target).open(Path(path) / ARTIFACT_FOLDER, other.main.artifact) as session:
            notes = () if other.main.preprocess == bundle.main.preprocess else (_OTHER_PREPROCESSING,)
            yield Reference(f"bundle {other.digest[:12]}", session.run, notes)
        return
    try:
        from vlexport.frontends.sources import open_sources
    except ImportError as error:
        raise ModelFileError(
            "VLX0104", "a model file as reference needs torch, which is not installed", where="--reference",
            hint="pip install 'vlexport[build]', or give a bundle as reference",
        ) from error  # fmt: skip
    sources = specialized_as(open_sources(reference_config(path, arch, bundle, recipe)), bundle, recipe)
    signature = sources.signature
    _require_same(path, wanted_names(bundle), ([s.name for s in signature.inputs], [s.name for s in signature.outputs]))
    yield Reference("model", sources.run)


def reference_config(
    path: str, arch: str | None, bundle: Bundle, recipe: Mapping[str, Any] | None = None
) -> BuildConfig:
    """How to open a reference: weights get the inputs that the bundle records, and what its recipe says of them."""
    given = {key: value for key, value in (recipe or {}).items() if key in _OF_WEIGHTS}
    folded = {key: value for key, value in (recipe or {}).items() if key in _OF_ARITHMETIC}
    folded = folded if folded.get("fold_preprocess") else {}
    if not arch:
        return BuildConfig(model=path, **folded)
    texts = []
    for spec in bundle.main.artifact.inputs:
        sizes = [bundle.main.dims[d].opt if isinstance(d, str) else d for d in spec.shape]
        texts.append(f"{spec.name}={'x'.join(map(str, sizes))}:{spec.dtype}")
    names = {text.partition("=")[0] for text in (recipe or {}).get("bake", ())}
    texts += [text for text in (recipe or {}).get("input", ()) if text.partition("=")[0] in names]
    return BuildConfig(model=path, arch=arch, input=tuple(texts), **given, **folded)


def specialized_as(sources: Sources, bundle: Bundle, recipe: Mapping[str, Any] | None) -> Sources:
    """The reference with the outputs that a bundle was built with, and the constant inputs, where it has them."""
    wanted = wanted_names(bundle)[1]
    there = {spec.name for spec in sources.signature.outputs}
    sources = sources.with_outputs(wanted) if set(wanted) <= there else sources
    return sources.with_baked((recipe or {}).get("bake", ()))


def wanted_names(bundle: Bundle) -> tuple[list[str], list[str]]:
    """Names of inputs and outputs."""
    signature = bundle.signature()
    return [s.name for s in signature.inputs], [s.name for s in signature.outputs]


def _require_same(path: str, wanted: tuple[list[str], list[str]], found: tuple[list[str], list[str]]) -> None:
    for kind, a, b in zip(("inputs", "outputs"), wanted, found, strict=True):
        if a != b:
            raise InputError(
                "VLX0507",
                f"the reference's {kind} are {', '.join(b)}, the bundle's are {', '.join(a)}",
                where="--reference",
                hint="give the model that the bundle was built from",
            )
