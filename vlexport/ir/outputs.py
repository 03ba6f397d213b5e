"""Choosing among a Program's outputs: what the others alone needed goes, inputs included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlexport.core.artifact import Signature
from vlexport.core.errors import UsageError, nearest
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program

_SIZE = "aten.sym_size.int"
_SHOWN = 4
"""Modules that a note names."""


def with_outputs(program: Program, names: Sequence[str]) -> Program:
    """A Program with these outputs alone, in this order.

    An input that nothing reads any more is taken out, unless a dynamic dim is known by it alone.

    Args:
        program: Left as it is; tensors are shared.
        names: Public names of outputs.

    Raises:
        UsageError: VLX0703 for a name that it does not have, or that is given twice.
    """
    position = {spec.name: i for i, spec in enumerate(program.signature.outputs)}
    for name in names:
        if name not in position or list(names).count(name) > 1:
            what = "is given twice" if name in position else f"is no output{nearest(name, position)}"
            raise UsageError(
                "VLX0703", f"--output {name} {what}", where="--output",
                hint=f"outputs: {', '.join(position)}; -o names the bundle's folder",
            )  # fmt: skip
    found = program.copy()
    results = found.results
    chosen = [position[name] for name in names]
    found.output.args = (tuple(results[i] for i in chosen),)
    for node in [n for n in found.calls() if not n.users]:
        found.erase_dead(node)
    _ask_others(found)
    kept = _needed(found)
    inputs = tuple(found.signature.inputs[i] for i in kept)
    found.example = tuple(found.example[i] for i in kept)
    for i, node in enumerate(found.placeholders):
        if i not in kept:
            found.graph.erase_node(node)
    dims = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    found.signature = Signature(
        inputs=inputs,
        outputs=tuple(program.signature.outputs[i] for i in chosen),
        dims={name: each for name, each in found.signature.dims.items() if name in dims},
    )
    return found


@dataclass(frozen=True)
class Stripped:
    """What went with the outputs that were not chosen.

    Attributes:
        modules: Paths of modules of which nothing is left; of nested ones the outermost, in the order of the graph.
        calls: Calls that are gone.
        parameters: Elements of floating tensors that nothing reads any more.
        macs: Multiply-accumulates less, every dynamic dim at its ``opt``.
    """

    modules: tuple[str, ...]
    calls: int
    parameters: int
    macs: int

    def __str__(self) -> str:
        shown = ", ".join(self.modules[:_SHOWN]) or "no whole module"
        more = f" and {len(self.modules) - _SHOWN} more" if len(self.modules) > _SHOWN else ""
        return f"{shown}{more}; {self.parameters:,} parameters, {self.macs:,} multiply-accumulates"


def stripped(before: Program, after: Program) -> Stripped:
    """What :func:`with_outputs` left out of ``before`` to make ``after``."""
    left = {prefix for node in after.calls() for prefix in _prefixes(provenance.module_path(node))}
    gone = dict.fromkeys(
        next(prefix for prefix in prefixes if prefix not in left)
        for node in before.calls()
        if (prefixes := _prefixes(provenance.module_path(node))) and prefixes[-1] not in left
    )
    was, now = cost(before), cost(after)
    return Stripped(
        tuple(gone), len(before.calls()) - len(after.calls()), was.parameters - now.parameters, was.macs - now.macs
    )


def _prefixes(path: str) -> list[str]:
    """``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    names = path.split(".") if path else []
    return [".".join(names[: i + 1]) for i in range(len(names))]


def _ask_others(program: Program) -> None:
    """Where an input is read for a size alone, read the same size off an input that is read for its values."""
    read = [n for n in program.placeholders if any(dialect.op_name(user) != _SIZE for user in n.users)]
    places = {
        size.node.expr: (node, axis)
        for node in reversed(read)
        for axis, size in reversed(list(enumerate(node.meta["val"].shape)))
        if isinstance(size, torch.SymInt)
    }
    for node in program.placeholders:
        for user in list(node.users) if node not in read else ():
            size = node.meta["val"].shape[user.args[1]]
            if isinstance(size, torch.SymInt) and size.node.expr in places:
                user.args = places[size.node.expr]


def _needed(program: Program) -> list[int]:
    """Positions of the inputs that are read, and of those by which alone a symbol is known."""
    kept = [i for i, node in enumerate(program.placeholders) if node.users]
    kept = kept or [0]
    known = {symbol for i in kept for symbol in _symbols(program.placeholders[i])}
    for i, node in enumerate(program.placeholders):
        if i not in kept and not _symbols(node) <= known:
            kept.append(i)
            known |= _symbols(node)
    return sorted(kept)


def _symbols(node: Any) -> set[Any]:
    return {
        symbol
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
