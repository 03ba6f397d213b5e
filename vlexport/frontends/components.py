"""components.toml: a small file beside model files that makes one model of several.

::

    vlexport_components = 1
    edges = [["encoder.features", "head.features"]]
    [components.encoder]
    model = "encoder.pt"
    [components.head]
    model = "head.pt"

It names files and never code; the files lie in its folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlexport.core.artifact import Frozen
from vlexport.core.bundle import inside
from vlexport.core.errors import BundleError, ModelFileError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMPONENTS_FILE = "components.toml"
_VERSION_KEY = "vlexport_components"
_VERSION = 1
_MAX_BYTES = 1 << 16


class ComponentEntry(Frozen):
    """One component: its model file, relative to ``components.toml``."""

    model: str


class ComponentsFile(Frozen):
    """What ``components.toml`` says: components by name, and ``("component.output", "component.input")`` edges."""

    vlexport_components: int
    components: dict[str, ComponentEntry]
    edges: tuple[tuple[str, str], ...] = ()


def find_components(model: Path) -> Path | None:
    """The ``components.toml`` that MODEL is, or that lies in the folder that MODEL is; None for any other model."""
    try:
        if model.is_dir():
            file = model / COMPONENTS_FILE
            return file if file.is_file() else None
        if not model.is_file() or model.stat().st_size > _MAX_BYTES:
            return None
        text = model.read_bytes().decode("utf-8")
    except (OSError, ValueError):  # a name that the file system cannot hold, or no text
        return None
    return model if any(line.lstrip().startswith(_VERSION_KEY) for line in text.splitlines()) else None


def read_components(file: Path) -> tuple[ComponentsFile, dict[str, Path]]:
    """A ``components.toml``, and each component's model file.

    Raises:
        ModelFileError: VLX1101 when it is not understood, or names a file outside its folder.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise _wrong(file, f"it is larger than {_MAX_BYTES} bytes")
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(file, f"it cannot be read: {error}") from error
    version = values.get(_VERSION_KEY)
    if isinstance(version, int) and version > _VERSION:
        raise _wrong(file, f"it has version {version}, this vlexport reads up to {_VERSION}", "update vlexport")
    if version != _VERSION or isinstance(version, bool):
        raise _wrong(file, f"it has no line {_VERSION_KEY} = {_VERSION}", "add it at the top")
    try:
        found = ComponentsFile.model_validate(values)
    except ValidationError as error:
        raise _wrong(file, _first_problem(error)) from error
    return found, {name: _model_file(file, name, entry.model) for name, entry in found.components.items()}


def _model_file(file: Path, name: str, model: str) -> Path:
    try:
        return inside(file.parent, model)
    except BundleError as error:
        said = f"component {name} names {model!r}, which leaves the folder or is a link"
        raise _wrong(file, said, f"put the model file beside {COMPONENTS_FILE}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"it is wrong at {place}: {first['msg'].lower()}"
    *above, key = first["loc"]
    known: dict[str, Any] = (ComponentEntry if above else ComponentsFile).model_fields
    return f"it has an unknown key {place}{nearest(str(key), known)}"


def _wrong(file: Path, problem: str, hint: str = "") -> ModelFileError:
    return ModelFileError(
        "VLX1101", f"{COMPONENTS_FILE} is not understood: {problem}", where=file.name,
        hint=hint or "see docs/components.md",
    )  # fmt: skip
