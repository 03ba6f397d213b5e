"""The files of a folder that transformers' ``save_pretrained`` wrote: config, preprocessing, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlexport.core.errors import ModelFileError
from vlexport.core.preprocess import Preprocess
from vlexport.core.preprocess_configs import preprocess_from_transformers_config

CONFIG_FILE = "config.json"
_PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""In the order in which they are taken: safetensors before pickles."""

_MAX_BYTES = 16 * 2**20
_KINDS_OF_LABEL = "LABEL_"


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder holds a ``config.json``."""
    try:
        return (path / CONFIG_FILE).is_file()
    except OSError:  # a name that the file system cannot hold
        return False


def config_in(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        ModelFileError: VLX0115 when there is none or it is not understood.
    """
    found = _json_object(folder / CONFIG_FILE)
    if found is None:
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelFileError(
            "VLX0115",
            "the folder holds an adapter, not a model"
            if adapter
            else "the folder holds no config.json that can be read",
            where=str(folder),
            hint="merge the adapter into its model and save that"
            if adapter
            else "name the folder that transformers' save_pretrained wrote",
        )
    return found


def weights_in(folder: Path) -> Path:
    """The file that holds the weights, or the index of its shards.

    Raises:
        ModelFileError: VLX0115 when there is none.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ModelFileError(
        "VLX0115", "the folder holds no weights", where=str(folder),
        hint=f"one of {', '.join(_WEIGHT_FILES)} is looked for",
    )  # fmt: skip


def preprocess_in(folder: Path) -> Preprocess | None:
    """What ``preprocessor_config.json`` says; None without that file.

    Raises:
        DataError: VLX0207 when it cannot be expressed.
    """
    for name in _PREPROCESSOR_FILES:
        found = _json_object(folder / name)
        if found is not None:
            return preprocess_from_transformers_config(found)
    return None


def labels_in(config: dict[str, Any]) -> tuple[str, ...]:
    """Class names in order; nothing where they are missing, incomplete, or transformers' own placeholders."""
    found = config.get("id2label")
    if not isinstance(found, dict) or not found:
        return ()
    by_number = {str(key): str(value) for key, value in found.items()}
    names = [by_number.get(str(number)) for number in range(len(by_number))]
    kept = tuple(name for name in names if name is not None)
    invented = all(name.startswith(_KINDS_OF_LABEL) for name in kept)
    return () if len(kept) < len(names) or invented else kept


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
