"""Which calls coremltools converts, checked against a table with sources before anything is converted.

``op_support.json`` holds the operators that have a conversion; what a name cannot say (rank, dtype, operands that are
read as others) stands here. A test asks coremltools about programs of a few calls, and the two agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch.fx import Node

from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, deployment_target
from vlexport.targets.coreml.legalize_spelling import is_misread
from vlexport.targets.coreml.plan import plan_of
from vlexport.targets.coreml.quantized import TRANSLATED, WHAT_INSTEAD, quantizes, why_not

MAX_RANK = 5
"""Of a tensor in Core ML. Source: the table's ``rank``."""
_RESHAPE, _PERMUTE = "aten.reshape.default", "aten.permute.default"
_NO_CONVERSION = "coremltools has no conversion for it"


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """``op_support.json``: sources, operators of ATen with their overloads, and of Python."""
    text = resources.files("vlexport.targets.coreml").joinpath("op_support.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def problems_of(program: Program, brief: Brief, options: CoreMLOptions) -> list[VlexportError]:
    """Every call that conversion would stop at, and what inputs, labels and options stop before it."""
    found: list[VlexportError] = []
    try:
        program = plan_of(program, brief, options).program
    except VlexportError as error:
        found.append(error)
    excused = _split_by_coremltools(program)
    deployment = deployment_target(brief)
    refused = [(node, reason) for node in program.calls() if (reason := _refused(node, excused, deployment))]
    found += [
        CapabilityError(
            "VLX0503", f"Core ML cannot express {dialect.op_name(node)}: {reason}",
            where=provenance.describe(node),
            hint=WHAT_INSTEAD if quantizes(node) else "rewrite that line with other operators",
        )
        for node, reason in refused
    ]  # fmt: skip
    return found


def converts(name: str) -> bool:
    """Whether coremltools has a conversion for an operator, ``aten.relu.default`` or ``operator.mul``, or we do."""
    if name in TRANSLATED:
        return True
    library, _, rest = name.partition(".")
    if library != "aten":
        return rest in table()["python"].split()
    plain, _, overload = rest.partition(".")
    return overload in table()["aten"].get(plain, "").split()


def _refused(node: Node, excused: set[Node], deployment: str) -> str:
    """Why, or an empty string."""
    if reason := why_not(node, deployment):
        return reason
    if not converts(dialect.op_name(node)):
        return _NO_CONVERSION
    if is_misread(node):
        return "coremltools converts it to something else"
    for value in _values(node):
        if value.dtype is torch.bfloat16:
            return "Core ML has no bfloat16"
        if value.ndim > MAX_RANK and node not in excused:
            return f"it gives a tensor of {value.ndim} dims, Core ML takes {MAX_RANK}"
    return ""


def _values(node: Node) -> Iterator[torch.Tensor]:
    value = node.meta["val"]
    for each in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(each, torch.Tensor):
            yield each


def _split_by_coremltools(program: Program) -> set[Node]:
    """Calls of too many dims that coremltools rewrites: reshape → permute → reshape back, and reshape → reshape."""
    excused: set[Node] = set()
    for first in program.calls(_RESHAPE):
        if not _too_high(first) or not all(isinstance(size, int) for size in first.meta["val"].shape):
            continue
        chain, readers = [first], list(first.users)
        while len(readers) == 1 and dialect.op_name(readers[0]) == _PERMUTE:
            chain.append(readers[0])
            readers = list(readers[0].users)
        back = readers and all(dialect.op_name(each) == _RESHAPE and not _too_high(each) for each in readers)
        if back and (len(chain) == 1 or len(readers) == 1):
            excused.update(chain)
    return excused


def _too_high(node: Node) -> bool:
    return any(value.ndim > MAX_RANK for value in _values(node))
