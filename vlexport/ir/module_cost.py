"""What a Program costs, module by module: rows that add up to :func:`vlexport.ir.cost.cost`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlexport.ir import provenance
from vlexport.ir.cost import node_macs, parameter_names
from vlexport.ir.program import Program


@dataclass
class ModuleCost:
    """What one module costs.

    Attributes:
        calls: Calls in it.
        macs: Multiply-accumulates, every dynamic dim at its ``opt``.
        parameters: Elements of floating tensors that it reads first.
        size_bytes: Bytes of all tensors that it reads first.
    """

    calls: int = 0
    macs: int = 0
    parameters: int = 0
    size_bytes: int = 0


def cost_by_module(program: Program, *, depth: int = 1, dims: Mapping[str, int] | None = None) -> dict[str, ModuleCost]:
    """Module path, cut after ``depth`` names → its cost, in the order of first use; empty for what lies in no module.

    A tensor that several modules read counts for the first of them.
    """
    found: dict[str, ModuleCost] = {}
    seen: set[str] = set()
    used, counted = program.used_tensors(), parameter_names(program)
    for node in program.calls():
        path = ".".join(provenance.module_path(node).split(".")[:depth])
        row = found.setdefault(path, ModuleCost())
        row.calls += 1
        row.macs += node_macs(program, node, dims or {})
        for operand in node.all_input_nodes:
            name = str(operand.target)
            if operand.op == "get_attr" and name not in seen:
                seen.add(name)
                row.parameters += used[name].numel() if name in counted else 0
                row.size_bytes += used[name].numel() * used[name].element_size()
    _add_returned(program, found, seen)
    return found


def _add_returned(program: Program, found: dict[str, ModuleCost], seen: set[str]) -> None:
    """Tensors that nothing reads but the caller."""
    counted = parameter_names(program)
    for name, tensor in program.used_tensors().items():
        if name not in seen:
            row = found.setdefault("", ModuleCost())
            row.parameters += tensor.numel() if name in counted else 0
            row.size_bytes += tensor.numel() * tensor.element_size()
