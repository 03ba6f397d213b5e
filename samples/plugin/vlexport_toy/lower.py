"""Program → steps. The half that builds: it needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.fx import Node

from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport_toy.steps import FORMAT, OPERATORS


def write_steps(program: Program, folder: Path, *, max_steps: int) -> str:
    """Write a Program into ``folder``.

    Args:
        program: In vlexport's dialect.
        folder: Made where it does not exist; only once everything is known to be expressible.
        max_steps: See the target's options.

    Returns:
        Name of the main file.

    Raises:
        CapabilityError: VLX0503 naming the operator, its module path and source line.
    """
    calls = program.calls()
    if len(calls) > max_steps:
        raise CapabilityError(
            "VLX0503", f"the program has {len(calls)} steps, at most {max_steps} are written",
            hint=f"--set numpy.max_steps={len(calls)}",
        )  # fmt: skip
    tensors = {name: f"t{i}" for i, name in enumerate(program.used_tensors())}
    names = {node: f"v{i}" for i, node in enumerate([*program.placeholders, *calls])}
    names |= {node: tensors[str(node.target)] for node in program.graph.nodes if node.op == "get_attr" and node.users}
    written = {
        "format": FORMAT,
        "inputs": [names[node] for node in program.placeholders],
        "steps": [_step(node, names) for node in calls],
        "outputs": [_value(node, names, node) for node in program.results],
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "tensors.npz", **{tensors[name]: t.numpy() for name, t in program.used_tensors().items()})
    (folder / "main.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8", newline="\n")
    return "main.json"


def _step(node: Node, names: dict[Node, str]) -> dict[str, Any]:
    op = dialect.op_name(node)
    if op not in OPERATORS:
        raise _refused(node, f"{op} is not among the operators that the numpy target knows")
    if node.kwargs:
        raise _refused(node, f"{op} with {', '.join(node.kwargs)} is not written by the numpy target")
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return {"op": op, "args": [_value(arg, names, node) for arg in node.args], "dtype": dtype, "to": names[node]}


def _value(value: Any, names: dict[Node, str], at: Node) -> Any:
    """An argument as JSON: ``{"value": "v3"}`` for a node, the rest as it is."""
    if isinstance(value, Node):
        return {"value": names[value]}
    if isinstance(value, (list, tuple)):
        if any(isinstance(each, Node) for each in value):
            raise _refused(at, "a shape that depends on the input is not written by the numpy target")
        return list(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _refused(at, f"the argument {value} is not written by the numpy target")


def _refused(node: Node, why: str) -> CapabilityError:
    return CapabilityError(
        "VLX0503", why, where=provenance.describe(node), hint="see OPERATORS in vlexport_toy/steps.py"
    )
