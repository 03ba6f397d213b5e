"""A ``.pt2`` that ``torch.export.save`` wrote: its graph as it was traced, with names and dims read off the graph.

It goes through the guard of :mod:`vlexport.frontends.archive`, stripped of what the guard never lets pass and a graph
can do without (stack traces, guards). What is refused then opens only with the user's consent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from vlexport.core.errors import CaptureError, ModelFileError
from vlexport.core.numerics import relative_error
from vlexport.frontends import compat
from vlexport.frontends.archive import ARCHIVE_SCHEMA, MAX_PROGRAM_BYTES, PROGRAM, check_members, stripped_members
from vlexport.frontends.archive_rules import strict_json
from vlexport.frontends.archive_zip import damaged, read_members
from vlexport.frontends.capture import TOLERANCE, DimChoice, program_of
from vlexport.frontends.clean import functional
from vlexport.frontends.consented import load_exported
from vlexport.frontends.decomposed import own_quantization
from vlexport.frontends.inline import inline_regions
from vlexport.frontends.model_file import METADATA_MEMBER
from vlexport.frontends.module_source import digest_of
from vlexport.ir.draw import draw
from vlexport.ir.program import Program

BATCH = "batch"
_CONSENT = "--allow-code opens it with torch's own reader, which runs what the file holds, if you trust it"


@dataclass(frozen=True)
class ExportedFile:
    """A Program, the hash of the file's content, and what the user should know."""

    program: Program
    source_hash: str
    notes: tuple[str, ...]


def open_exported_file(path: Path, *, allow_code: bool) -> ExportedFile:
    """Open an exported program that vlexport did not write.

    Raises:
        ModelFileError: VLX0105 damaged, VLX0106 refused, VLX0108 it fails with its own code, VLX0111 of a later
            version, VLX0112 of a format that has pickles throughout.
        CaptureError: VLX03xx.
    """
    notes: tuple[str, ...] = ()
    try:
        exported = _guarded(path)
    except ModelFileError as error:
        error.where = error.where or str(path)
        if error.code not in ("VLX0106", "VLX0112"):
            raise
        if not allow_code:
            error.hint = _CONSENT
            raise
        exported = load_exported(path)
        notes = ("the file's own code was run (--allow-code)",)
    program = _program(exported)
    return ExportedFile(program, digest_of(b"", path), notes)


def _guarded(path: Path) -> ExportedProgram:
    with path.open("rb") as file:
        members: dict[str, Any] = dict(read_members(file))
    if PROGRAM not in members:
        raise ModelFileError(
            "VLX0112", "the file is a .pt2 of an older format, whose members are pickles", where=str(path),
            hint="export it again with torch 2.8 or later",
        )  # fmt: skip
    strict_json(members[PROGRAM], PROGRAM, MAX_PROGRAM_BYTES)
    kept = {name: content for name, content in members.items() if not name.startswith("extra/")}
    try:
        kept = dict(stripped_members(kept))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise damaged("its graph is not written as torch writes one", PROGRAM) from error
    kept[METADATA_MEMBER] = json.dumps({"schema": ARCHIVE_SCHEMA}).encode()
    return check_members({name: memoryview(content) for name, content in kept.items()}).exported_program()


def _program(exported: ExportedProgram) -> Program:
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    if len(names) != len(exported.graph_signature.user_inputs):
        raise CaptureError(
            "VLX0302", "the exported program takes an input that is no tensor", hint="export it with tensors only"
        )
    wanted = exported.example_inputs
    chosen = _dims(exported, names)
    if wanted is None:
        program = program_of(functional(inline_regions(exported)), names, (), chosen)
        sizes = {name: max(2, each.min) for name, each in program.signature.dims.items()}
        program.example = draw(program, torch.Generator().manual_seed(0), sizes)
        own_quantization(program)
        return program
    with torch.no_grad():
        expected = compat.tensor_leaves(exported.module()(*wanted[0], **wanted[1]))
    example = compat.tensor_leaves(wanted)
    program = program_of(functional(inline_regions(exported)), names, example, chosen)
    for spec, found, value in zip(program.signature.outputs, program.run(*example), expected, strict=True):
        worst = relative_error(found.float().numpy(), value.detach().float().numpy())
        if not worst <= TOLERANCE:
            raise CaptureError("VLX0304", f"output {spec.name} differs from the exported program's by {worst:.1e}")
    own_quantization(program)
    return program


def _dims(exported: ExportedProgram, names: list[str]) -> Mapping[str, Mapping[int, DimChoice]]:
    """Input → axis → name and range of its symbol: ``batch`` where the first input begins with it."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    called: dict[Any, tuple[str, int, int | None]] = {}
    found: dict[str, dict[int, DimChoice]] = {}
    for name in names:
        for axis, size in enumerate(nodes[name].meta["val"].shape):
            if not isinstance(size, torch.SymInt):
                continue
            symbol = size.node.expr
            if not symbol.is_symbol:
                raise CaptureError(
                    "VLX0302", f"size {axis} of input {name} depends on another size: {symbol}",
                    hint="export it with dims of their own",
                )  # fmt: skip
            if symbol not in called:
                text = BATCH if axis == 0 and not called else f"{name}_{axis}"
                called[symbol] = (text, *compat.bounds_of(exported.range_constraints.get(symbol)))
            found.setdefault(name, {})[axis] = called[symbol]
    return found
