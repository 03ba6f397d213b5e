"""Classifiers: whether a Program is one, and probabilities as its first output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.fx import Node

from vlexport.core.errors import CapabilityError, UsageError
from vlexport.ir import dialect
from vlexport.ir.program import Program

Choice = Literal["auto", "on", "off"]
_OPTION = "--set coreml.classifier"
_SAME_VALUE = ("aten.to.dtype", "aten._to_copy.default", "aten.alias.default", "aten.clone.default")
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
_SIGMOID = "aten.sigmoid.default"


def is_classifier(program: Program, labels: Sequence[str], batch: int | None, choice: Choice) -> bool:
    """Whether the first output becomes a class label with probabilities.

    Args:
        program: To be lowered.
        labels: Class names, if known.
        batch: Fixed size of the first output's first dim; None where it varies.
        choice: ``auto`` says yes where everything fits.

    Raises:
        UsageError: VLX0703 when ``on`` cannot be had.
        CapabilityError: VLX0503 when labels are not unique: Core ML keys probabilities by label.
    """
    if choice == "off":
        return False
    if problem := _problem(program, labels, batch):
        if choice == "auto":
            return False
        raise UsageError("VLX0703", f"the package cannot be a classifier: {problem}", where=f"{_OPTION}=on",
                         hint=f"leave {_OPTION} at auto")  # fmt: skip
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        places = " and ".join(str(i) for i, label in enumerate(labels) if label == twice[0])
        raise CapabilityError(
            "VLX0503", f"label '{twice[0]}' stands at {places}: Core ML keys probabilities by label", where="labels",
            hint=f"make labels unique, or {_OPTION}=off",
        )  # fmt: skip
    return True


def _problem(program: Program, labels: Sequence[str], batch: int | None) -> str:
    spec = program.signature.outputs[0]
    shown = "×".join(map(str, spec.shape))
    if not labels:
        return "class names are not known"
    if len(spec.shape) != 2 or spec.shape[1] != len(labels) or not spec.dtype.startswith("float"):
        return f"output {spec.name} is {spec.dtype} {shown}, and there are {len(labels)} labels"
    if batch != 1:
        return f"output {spec.name} is {shown}, and Core ML classifies one sample at a time"
    if dialect.op_name(_last(program)) == _SIGMOID:
        return f"output {spec.name} comes out of a sigmoid: its values are not the probabilities of one label"
    return ""


def _last(program: Program) -> Node:
    """The call that computes the first output, casts and copies aside."""
    node: Any = program.results[0]
    while dialect.op_name(node) in _SAME_VALUE:
        node = node.args[0]
    found: Node = node
    return found


def ends_in_softmax(program: Program) -> bool:
    """Whether the first output (N×classes) is a softmax over classes already."""
    node = _last(program)
    return dialect.op_name(node) in _SOFTMAX and node.args[1] in (1, -1)


def with_probabilities(program: Program) -> Program:
    """A copy whose first output is a softmax over its last dim, unless it is one already."""
    changed = program.copy()
    if ends_in_softmax(changed):
        return changed
    logits = changed.results[0]
    made = changed.add_call(
        torch.ops.aten.softmax.int, (logits, -1), before=changed.output,
        value_of=logits if logits.op == "call_function" else changed.calls()[-1],
    )  # fmt: skip
    changed.output.args = ((made, *changed.results[1:]),)
    return changed
