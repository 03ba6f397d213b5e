"""safetensors files, and the index that says which shard of a checkpoint holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlexport.core.errors import ModelFileError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_INDEX_BYTES = 64 * 2**20
_MAX_NAME = 255


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        ValueError: The file is damaged.
        ModelFileError: VLX0104 when the package safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ModelFileError(
            "VLX0104",
            "the file is a safetensors checkpoint, and the package safetensors is not installed",
            where=str(path),
            hint="pip install safetensors",
        ) from error
    try:
        return dict(load_file(path))
    except (SafetensorError, AttributeError, KeyError, OSError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def index_in(path: Path) -> dict[str, Any] | None:
    """The content of ``*.index.json``, as transformers writes it beside shards; None for any other file."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            return None
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("weight_map"), dict) else None


def shards_of(path: Path) -> dict[Path, frozenset[str]]:
    """Shard → names of its tensors, in the order of their file names. Shards lie in the index's folder.

    Raises:
        ModelFileError: VLX0105 for an index that is wrong or whose shard is missing, VLX0106 for a name that is no
            plain file name.
    """
    index = index_in(path)
    if not index or not index["weight_map"]:
        raise ModelFileError("VLX0105", "the index names no shards", where=str(path), hint="download the folder again")
    names: dict[str, set[str]] = {}
    for tensor, shard in index["weight_map"].items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise ModelFileError(
                "VLX0106", f"the index names a shard {shard!r:.80}, which is no plain file name", where=str(path),
                hint="shards lie beside their index",
            )  # fmt: skip
        names.setdefault(shard, set()).add(tensor)
    for shard in sorted(names):
        if not (path.parent / shard).is_file():
            raise ModelFileError(
                "VLX0105", f"the shard {shard} is missing", where=str(path), hint="download the folder again"
            )
    return {path.parent / shard: frozenset(names[shard]) for shard in sorted(names)}


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: itself, or an index with its shards."""
    return [path] if index_in(path) is None else [path, *shards_of(path)]


def _is_plain(name: str) -> bool:
    wrong = not name or len(name) > _MAX_NAME or not name.isprintable() or name.startswith(".")
    return not wrong and not set(name) & set("/\\:")
