"""What a model file is, decided from its content and never from its name."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vlexport.core.bundle import BUNDLE_FILE
from vlexport.core.errors import ModelFileError
from vlexport.frontends.safetensors_file import index_in

Kind = Literal["vlexport-archive", "foreign-pt2", "checkpoint", "torchscript", "safetensors", "shards", "unknown"]

METADATA_MEMBER = "extra/vlexport.json"
"""The member that only files written by ``vlexport.save`` have."""

_LEGACY_CHECKPOINT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
ZIP_ERRORS = (
    zipfile.BadZipFile,
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    struct.error,
    ValueError,
)
"""What the standard library raises at the directory of a damaged or hostile archive."""

_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_MAX_SAFETENSORS_HEADER = 100_000_000


def require_model_file(path: Path) -> None:
    """Raises VLX0101 missing, VLX0102 a directory, VLX0103 empty."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # a name that the file system cannot hold
        is_folder = is_file = False
    if is_folder and (path / BUNDLE_FILE).is_file():
        raise ModelFileError(
            "VLX0102", "this is a bundle, which a build makes; a model is wanted", where=str(path),
            hint="name the model file that it was built from",
        )  # fmt: skip
    if is_folder:
        raise ModelFileError(
            "VLX0102",
            "the model is a directory without components.toml",
            where=str(path),
            hint="name the file in it that holds the model",
        )
    if not is_file:
        raise ModelFileError("VLX0101", "the model file does not exist", where=str(path), hint="check the path")
    if path.stat().st_size == 0:
        raise ModelFileError("VLX0103", "the model file is empty", where=str(path), hint="copy or download it again")


def kind_of(path: Path) -> Kind:
    """The kind of a model file.

    Raises:
        ModelFileError: VLX0101, VLX0102, VLX0103, or VLX0105 for a zip without its directory, as downloads that
            were cut off leave it.
    """
    require_model_file(path)
    with path.open("rb") as file:
        head = file.read(len(_LEGACY_CHECKPOINT))
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head == _LEGACY_CHECKPOINT or _PICKLE.match(head):
        return "checkpoint"
    if _is_safetensors(path):
        return "safetensors"
    return "unknown" if index_in(path) is None else "shards"


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except ZIP_ERRORS as error:
        raise ModelFileError(
            "VLX0105",
            f"the file begins as an archive but is truncated or damaged: {error}",
            where=str(path),
            hint="copy or download the file again",
        ) from error
    names = {info.filename.partition("/")[2] for info in infos} | {info.filename for info in infos}
    if "archive_format" in names:
        return "vlexport-archive" if METADATA_MEMBER in names else "foreign-pt2"
    if "serialized_exported_program.json" in names:
        return "foreign-pt2"
    if "constants.pkl" in names:
        return "torchscript"
    if "data.pkl" not in names:
        return "unknown"
    _require_stored(path, infos)
    return "checkpoint"


def _require_stored(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse a bomb: torch stores its members as they are, so that together they are no larger than the file.

    Raises:
        ModelFileError: VLX0105.
    """
    unpacked = sum(info.file_size for info in infos)
    packed = next((info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED), None)
    if packed is None and unpacked <= path.stat().st_size:
        return
    raise ModelFileError(
        "VLX0105",
        f"the file unpacks to {unpacked} bytes, and files that torch writes do not unpack"
        if packed is None
        else f"the member {packed!r} is compressed, and torch stores weights as they are",
        where=str(path),
        hint="ask its author for one written by torch.save or vlexport.save",
    )


def _is_safetensors(path: Path) -> bool:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_SAFETENSORS_HEADER):
            return False
        header = file.read(length)
    if not header.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(header, object_pairs_hook=partial(_distinct, path)), dict)
    except (ValueError, RecursionError):
        return False


def _distinct(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two tensors of one name, one reader takes the first and another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ModelFileError(
            "VLX0105", "the header names something twice", where=str(path), hint="copy or download the file again"
        )
    return found
