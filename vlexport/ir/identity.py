"""Everything about a Program that can decide what is lowered from it, as one digest.

The fingerprint says what a Program computes. An artifact holds more: names of nodes (from origins), module paths, which
tensor is a parameter and which are one, strides that an exporter decides by, symbols and their ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, tensor_digest


def program_identity(program: Program) -> str:
    """SHA-256 that is equal in any process for Programs of which the same is made."""
    whole = hashlib.sha256(fingerprint(program).encode())
    for line in _lines(program):
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()


def _lines(program: Program) -> Iterator[str]:
    yield program.signature.model_dump_json()
    yield str({str(symbol): str(found) for symbol, found in program.ranges.items()})
    yield str([tensor_digest(value) for value in program.example])
    first: dict[int, str] = {}  # tied weights: one tensor under two names is not two equal ones
    for name, tensor in program.tensors.items():
        same = first.setdefault(id(tensor), name)
        yield f"{name} {program.kinds[name]} {tensor_digest(tensor)} {tuple(tensor.stride())} {same}"
    for node in program.graph.nodes:
        place = (
            provenance.origins(node),
            provenance.module_path(node),
            provenance.source_line(node),
            provenance.stack(node),
        )
        yield f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {place} {_value(node.meta.get('val'))}"


def _value(value: Any) -> str:
    """Shape, dtype and strides; FX prints a fake tensor without its strides."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{tuple(value.stride()) if value.layout is torch.strided else ''}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)
