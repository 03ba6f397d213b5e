"""Writing NAME.mlpackage so that the same program gives the same bytes, wherever and whenever it is made. No torch.

coremltools draws its item ids at random and writes the day into the model; ids here are made of the content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

_ROOT = "com.apple.CoreML"
_MODEL, _WEIGHTS = "model.mlmodel", "weights"
_BLOB = "weight.bin"
_VERSION = "1.0.0"


def write_package(path: Path, spec: Any, weights: bytes | None) -> None:
    """Write a package.

    Args:
        path: ``…/NAME.mlpackage``; must not exist.
        spec: The model's specification (protobuf).
        weights: Content of the weight file; None when the program has none.
    """
    model = spec.SerializeToString(deterministic=True)
    data = path / "Data" / _ROOT
    data.mkdir(parents=True)
    (data / _MODEL).write_bytes(model)
    whole = hashlib.sha256(model)
    if weights is not None:
        (data / _WEIGHTS).mkdir()
        (data / _WEIGHTS / _BLOB).write_bytes(weights)
        whole.update(weights)
    digest = whole.digest()
    root = _id(digest, _MODEL)
    items = {root: _entry(_MODEL, "CoreML Model Specification")}
    if weights is not None:
        items[_id(digest, _WEIGHTS)] = _entry(_WEIGHTS, "CoreML Model Weights")
    manifest = {"fileFormatVersion": _VERSION, "itemInfoEntries": items, "rootModelIdentifier": root}
    text = json.dumps(manifest, indent=4, sort_keys=True)
    (path / "Manifest.json").write_text(text + "\n", encoding="utf-8")


def _id(digest: bytes, name: str) -> str:
    """An id of the form that Core ML expects, of what the package holds."""
    return str(uuid.UUID(bytes=hashlib.sha256(digest + name.encode()).digest()[:16], version=5)).upper()


def _entry(name: str, description: str) -> dict[str, str]:
    return {"author": _ROOT, "description": description, "name": name, "path": f"{_ROOT}/{name}"}
