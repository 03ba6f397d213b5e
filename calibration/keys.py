"""Keys of a Program's values that hold from one process to the next: by where a value came from, never by FX names."""

from __future__ import annotations

import hashlib
from collections import Counter

from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint


def value_keys(program: Program) -> dict[Node, str]:
    """Key of every input and of every call's value.

    ``input:image`` for an input; for a call ``41``, the ordinal of the captured node whose value it computes. Where a
    pass made several calls for one captured node, the later ones are ``41.1``, ``41.2``.
    """
    found = {
        node: f"input:{spec.name}" for node, spec in zip(program.placeholders, program.signature.inputs, strict=True)
    }
    seen: Counter[int] = Counter()
    for node in program.calls():
        ordinal = provenance.origins(node)[-1]
        found[node] = f"{ordinal}.{seen[ordinal]}" if seen[ordinal] else str(ordinal)
        seen[ordinal] += 1
    return found


def model_key(program: Program) -> str:
    """SHA-256 of what the Program computes, and of the key and the place of every value in it."""
    whole = hashlib.sha256(fingerprint(program).encode())
    for node, key in value_keys(program).items():
        whole.update(f"{key} {dialect.op_name(node)} {provenance.module_path(node)}\n".encode())
    return whole.hexdigest()
