"""Modules that a pass is told to leave as they are."""

from __future__ import annotations

from collections.abc import Sequence

from vlexport.core.errors import UsageError, nearest
from vlexport.ir import provenance
from vlexport.ir.program import Program


def require_modules(program: Program, keep: Sequence[str], *, name: str) -> None:
    """Refuse a pattern that no call lies in, as a misspelt one would keep nothing.

    Args:
        program: What the pass works on.
        keep: Module paths; ``blocks.*.attn`` names one of every block, and what lies in it.
        name: Of the pass, for the message.

    Raises:
        UsageError: VLX0703 with the nearest module.
    """
    known = {provenance.module_path(node) for node in program.calls()}
    for pattern in keep:
        if not any(provenance.lies_in(node, pattern) for node in program.calls()):
            raise UsageError(
                "VLX0703", f"--set {name}.keep: no module is called '{pattern}'{nearest(pattern, known)}",
                where="--set", hint=f"modules are named as in {', '.join(sorted(known - {''})[:3])}",
            )  # fmt: skip
