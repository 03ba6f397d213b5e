"""Calls that a user names: by patterns of module paths, or by keys as ``quantization.json`` has them (``#41``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from vlexport.calibration.keys import value_keys
from vlexport.core.errors import UsageError, nearest
from vlexport.ir import provenance
from vlexport.ir.program import Program

KEY_MARK = "#"


def named_calls(program: Program, names: Sequence[str]) -> set[Node]:
    """The calls that any of ``names`` is about: ``blocks.*.attn`` names what lies in one of these modules."""
    return {node for name in names for node in _named(program, name)}


def name_of(module: str, key: str) -> str:
    """How a call is named: its module, or its key where it lies in none."""
    return module or f"{KEY_MARK}{key}"


def require_calls(program: Program, names: Sequence[str], *, option: str) -> None:
    """Refuse a name that no call has, as a misspelt one would do nothing.

    Args:
        program: What the names are about.
        names: Patterns and keys.
        option: ``SCOPE.NAME`` that they were given with.

    Raises:
        UsageError: VLX0703 with the nearest module.
    """
    known = {provenance.module_path(node) for node in program.calls()} - {""}
    for name in names:
        if not _named(program, name):
            what = "call has the key" if name.startswith(KEY_MARK) else "module is called"
            raise UsageError(
                "VLX0703", f"--set {option}: no {what} '{name}'{nearest(name, known)}", where="--set",
                hint=f"modules are named as in {', '.join(sorted(known)[:3])}",
            )  # fmt: skip


def _named(program: Program, name: str) -> list[Node]:
    if name.startswith(KEY_MARK):
        keys = value_keys(program)
        return [node for node in program.calls() if keys[node] == name.removeprefix(KEY_MARK)]
    return [node for node in program.calls() if provenance.lies_in(node, name)]
