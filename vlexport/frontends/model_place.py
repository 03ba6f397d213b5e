"""Where MODEL lies: a path, or the name of a model on a hub that this machine has a copy of. Nothing is fetched.

Source: the layout of the hub's cache folder, https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vlexport.core.errors import ModelFileError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[0-9a-f]{40}")
_FILE_ENDINGS = (".pt", ".pth", ".pt2", ".bin", ".safetensors", ".ckpt", ".pkl", ".json", ".toml", ".onnx", ".bundle")


@dataclass(frozen=True)
class ModelPlace:
    """A path, and what to know about how it was found."""

    path: Path
    notes: tuple[str, ...] = ()


def place_of(model: str) -> ModelPlace:
    """The path that MODEL means.

    Raises:
        ModelFileError: VLX0114 for the name of a model on a hub that is not in the local cache.
    """
    path = Path(model)
    if os.path.lexists(path) or not _HUB_NAME.fullmatch(model) or model.lower().endswith(_FILE_ENDINGS):
        return ModelPlace(path)
    snapshot = _snapshot(hub_cache() / f"models--{model.replace('/', '--')}")
    if snapshot is None:
        raise ModelFileError(
            "VLX0114", f"'{model}' is no path here; if it is a model on a hub, download it first: nothing is fetched",
            where=model, hint=f"hf download {model}",
        )  # fmt: skip
    return ModelPlace(snapshot, (f"{model} was taken from the local hub cache, revision {snapshot.name}",))


def hub_cache() -> Path:
    """The folder in which the hub's own tools keep what they download."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def _snapshot(repository: Path) -> Path | None:
    """The folder of the main revision, or of the only one."""
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        revision = ""
    snapshots = repository / "snapshots"
    if not revision and snapshots.is_dir():
        there = [each.name for each in snapshots.iterdir()]
        revision = there[0] if len(there) == 1 else ""
    found = snapshots / revision
    return found if _REVISION.fullmatch(revision) and found.is_dir() else None
