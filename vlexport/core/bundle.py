"""Reading a bundle safely: schema, digest, file hashes, and paths that never leave the folder. No torch."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from vlexport.core.bundle_schema import BUNDLE_SCHEMA, Bundle, FileRecord, canonical_json, digest_of, plain_json
from vlexport.core.errors import BundleError, GateError
from vlexport.core.whole import whole_component

BUNDLE_FILE = "bundle.json"
COMPARE_FILE = "compare.json"
"""Beside the bundles of several targets."""
ARTIFACT_FOLDER = "artifact"
GOLDEN_FOLDER = "golden"
RECORDED_FOLDERS = (ARTIFACT_FOLDER, "assets", GOLDEN_FOLDER)
"""Folders all of whose files ``bundle.json`` records."""
RECIPE_FILE = "recipe.toml"
TABLE_FILE = "calibration.json"
DECISIONS_FILE = "quantization.json"
MEASURED_FOLDER = "measured"
_CHUNK = 1 << 20
_MAX_BUNDLE_FILE = 64 << 20
_MAX_NAME_BYTES = 255
_DEVICES = frozenset(
    {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
    | {f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"}
)
"""Names that Windows takes for devices in any folder and with any ending."""


def read_bundle(folder: Path) -> Bundle:
    """``bundle.json`` of a bundle, its digest checked.

    Raises:
        BundleError: VLX0601 no bundle, VLX0603 a later version, VLX0605 a path that leaves the bundle.
        InputError: VLX1102 when its components do not fit together.
        GateError: VLX0602 when ``bundle.json`` does not fit its own digest.
    """
    file = folder / BUNDLE_FILE
    if not _is_file(file):
        several = _is_file(folder / COMPARE_FILE)
        below = sorted(str(each.parent) for each in folder.glob(f"*/{BUNDLE_FILE}")) if several else []
        raise BundleError(
            "VLX0601",
            "this is no bundle: it has no bundle.json",
            where=str(folder),
            hint="name " + (f"one of {', '.join(below)}" if below else "the folder that `vlexport build` wrote"),
        )
    inside(folder, BUNDLE_FILE)
    if file.stat().st_size > _MAX_BUNDLE_FILE:
        raise BundleError("VLX0601", "bundle.json is too large to be one", where=str(folder))
    try:
        text = file.read_bytes().decode("utf-8")
        values = json.loads(text, object_pairs_hook=_distinct)
        version = values["schema_version"]
        if type(version) is not int:
            raise ValueError("schema_version is no integer")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            "VLX0601", f"bundle.json cannot be read: {error}", where=str(folder), hint="build it again"
        ) from error
    if version > BUNDLE_SCHEMA:
        raise BundleError(
            "VLX0603", f"the bundle has schema {version}, this vlexport reads up to {BUNDLE_SCHEMA}", where=str(folder),
            hint="update vlexport",
        )  # fmt: skip
    try:
        bundle = Bundle.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            "VLX0601", f"bundle.json is wrong at {name}: {first['msg'].lower()}", where=str(folder)
        ) from error
    try:
        digest = digest_of(bundle)
    except ValueError as error:  # NaN, or text that is no Unicode: written by something else
        raise BundleError("VLX0601", "bundle.json holds a value that JSON cannot", where=str(folder)) from error
    if digest != bundle.digest:
        raise _altered(folder, "bundle.json does not fit its digest")
    if text != bundle_text(bundle):
        raise _altered(folder, "bundle.json is not spelled as vlexport writes it")
    if not bundle.components:
        raise BundleError("VLX0601", "bundle.json has no component", where=str(folder), hint="build it again")
    paths = [*bundle.files]
    goldens = [bundle.golden, bundle.golden_smallest]
    for name, component in bundle.components.items():
        paths.append(f"{artifact_folder(bundle.components, name)}/{component.artifact.path}")
        goldens += [component.golden, component.golden_smallest]
    paths += [path for golden in goldens if golden is not None for path in (golden.inputs, golden.outputs)]
    for path in paths:
        inside(folder, path)
    _require_distinct(folder, bundle.files)
    whole_component(bundle)
    return bundle


def bundle_text(bundle: Bundle) -> str:
    """The content of ``bundle.json``, the only spelling of it that is read."""
    return canonical_json(plain_json(bundle)) + "\n"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _require_distinct(folder: Path, paths: Collection[str]) -> None:
    """Refuse files that some file systems cannot tell apart: which one is read would depend on where it lies."""
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if other != path:
            raise BundleError(
                "VLX0605", f"the paths {other!r} and {path!r} are one file on some systems", where=str(folder),
                hint="do not use this bundle",
            )  # fmt: skip


def artifact_folder(components: Collection[str], name: str) -> str:
    """Folder, in the bundle, of a component's artifact: ``artifact``, and one of its own where there are several."""
    return ARTIFACT_FOLDER if len(components) == 1 else f"{ARTIFACT_FOLDER}/{name}"


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that is too long, or no name
        return False


def inside(folder: Path, path: str) -> Path:
    """``folder / path`` if it stays inside on every system, without following links.

    Raises:
        BundleError: VLX0605.
    """
    parts = PurePosixPath(path)
    plain = bool(path) and not parts.is_absolute() and all(map(_is_plain, parts.parts))
    joined = folder.joinpath(*parts.parts) if plain else folder
    steps = [folder.joinpath(*parts.parts[: i + 1]) for i in range(len(parts.parts))] if plain else []
    if not plain or any(step.is_symlink() for step in steps):
        raise BundleError(
            "VLX0605", f"the path {path!r} leaves the bundle", where=str(folder), hint="do not use this bundle"
        )
    return joined


def _is_plain(name: str) -> bool:
    """Whether a name means a file of that name on every system: no device, stream, drive or other spelling."""
    stem = name.partition(".")[0].rstrip(" ").upper()
    return (
        name == name.rstrip(". ")
        and not any(ord(c) < 32 or c in '\\:<>"|?*' for c in name)
        and stem not in _DEVICES
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES
    )


def check_files(folder: Path, bundle: Bundle) -> None:
    """Compare every recorded file with its hash.

    Raises:
        GateError: VLX0602 naming the first file that is missing, was altered, or is not recorded.
    """
    for path, record in bundle.files.items():
        file = inside(folder, path)
        if not file.is_file():
            raise _altered(folder, f"{path} is missing")
        if file.stat().st_size != record.size_bytes or file_record(file).sha256 != record.sha256:
            raise _altered(folder, f"{path} was altered")
    for part in RECORDED_FOLDERS:
        for file in sorted((folder / part).rglob("*")):
            name = file.relative_to(folder).as_posix()
            if (file.is_symlink() or not file.is_dir()) and name not in bundle.files:
                raise _altered(folder, f"{name} is not recorded in bundle.json")


def file_record(file: Path) -> FileRecord:
    """Hash and size of a file."""
    digest = hashlib.sha256()
    size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size)


def recorded_files(folder: Path) -> Iterator[tuple[str, FileRecord]]:
    """Every file of ``artifact/``, ``golden/`` and ``assets/``, the recipe, and the tables of a quantized model."""
    for part in RECORDED_FOLDERS:
        for file in sorted((folder / part).rglob("*")):
            if file.is_file():
                yield file.relative_to(folder).as_posix(), file_record(file)
    for name in (TABLE_FILE, DECISIONS_FILE):
        if (folder / name).is_file():
            yield name, file_record(folder / name)
    yield RECIPE_FILE, file_record(folder / RECIPE_FILE)


def size_bytes(bundle: Bundle) -> int:
    """Bytes of the artifact, all its files."""
    return sum(r.size_bytes for path, r in bundle.files.items() if path.startswith(f"{ARTIFACT_FOLDER}/"))


def _altered(folder: Path, what: str) -> GateError:
    return GateError(
        "VLX0602",
        f"the bundle was altered: {what}",
        where=str(folder),
        hint="build it again, or fetch it again from its source",
    )
