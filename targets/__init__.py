"""Targets: what lowers a Program to an artifact, and what runs it. One folder each, one line here."""

from __future__ import annotations

import importlib

if __name__ != "vlexport.targets":
    raise ImportError("import vlexport.targets, not targets: the folder at the top is the package's source")

from vlexport.core.errors import UsageError, nearest
from vlexport.targets.base import Target

CATALOGUE: dict[str, str] = {
    "onnxruntime": "vlexport.targets.onnxruntime:OnnxRuntimeTarget",
}
"""Id → where the class lies. Imported when used."""


def open_target(name: str) -> Target:
    """The target behind an id.

    Raises:
        UsageError: VLX0701 for an unknown id, with the nearest one.
    """
    if name not in CATALOGUE:
        raise UsageError(
            "VLX0701", f"no target '{name}'{nearest(name, CATALOGUE)}", where="--target",
            hint=f"known: {', '.join(CATALOGUE)}",
        )  # fmt: skip
    module, _, attribute = CATALOGUE[name].partition(":")
    made: Target = getattr(importlib.import_module(module), attribute)()
    return made
