"""Passes: graph transformations with a contract that the runner checks, and their catalogue.

A pass is one file, one line here, one test and one golden file. Nothing registers itself at import.
"""

from __future__ import annotations

import importlib
from typing import Any

if __name__ != "vlexport.passes":
    raise ImportError("import vlexport.passes, not passes: the folder at the top is the package's source")

from vlexport.core.errors import UsageError, nearest
from vlexport.passes.base import Pass

CATALOGUE: dict[str, str] = {
    "canonicalize": "vlexport.passes.canonicalize:Canonicalize",
    "fold-constants": "vlexport.passes.fold_constants:FoldConstants",
    "eliminate-dead": "vlexport.passes.eliminate_dead:EliminateDead",
    "merge-duplicates": "vlexport.passes.merge_duplicates:MergeDuplicates",
    "fold-batch-norm": "vlexport.passes.fold_batch_norm:FoldBatchNorm",
}
"""Id → where the class lies, in pipeline order. Imported when used."""


def pass_class(name: str) -> type[Pass[Any]]:
    """The class behind an id.

    Raises:
        UsageError: VLX0703 for an unknown id, with the nearest one.
    """
    if name not in CATALOGUE:
        raise UsageError(
            "VLX0703", f"no pass '{name}'{nearest(name, CATALOGUE)}", hint=f"known: {', '.join(CATALOGUE)}"
        )
    module, _, attribute = CATALOGUE[name].partition(":")
    found: type[Pass[Any]] = getattr(importlib.import_module(module), attribute)
    return found
