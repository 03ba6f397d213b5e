"""From a fresh ``torch.export`` graph to a functional one.

A fresh graph still holds in-place operators (``relu_``, ``add_``) and notes of the tracer. In-place operators whose
base is a fresh value that nothing aliases are renamed, which costs milliseconds and no error; everything else goes
through ``run_decompositions({})``, which interprets the graph twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from vlexport.frontends.compat import data_symbols
from vlexport.ir import dialect
from vlexport.ir.program import Program

_SAME_VALUE = {
    "aten.alias.default", "aten.detach.default", "aten.detach_.default", "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default", "aten.clone.default", "aten.contiguous.default", "aten.dropout.default",
    "aten.feature_dropout.default", "aten.alpha_dropout.default", "aten.dropout_.default", "aten.lift.default",
    "aten.positive.default",
}  # fmt: skip
"""Ops that return their first operand's value at inference."""
_NOTES = {"aten._assert_tensor_metadata.default"}
_DROPOUT_TRAIN = {"aten.dropout.default": 2, "aten.feature_dropout.default": 2, "aten.alpha_dropout.default": 2}


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same graph without in-place operators."""
    nodes = [n for n in exported.graph.nodes if n.op == "call_function" and _writes(n)]
    if all(_can_rename(n) for n in nodes):
        for node in nodes:
            _rename(node)
        return exported
    decomposed: ExportedProgram = exported.run_decompositions({})
    return decomposed


def clean(program: Program) -> None:
    """Remove what has no meaning at inference: aliases, copies, dropout, tracer notes, checks, unread values.

    ``view`` becomes ``reshape`` in the same step: without the copies a view may meet a layout it cannot express.
    """
    for node in program.calls():
        name = dialect.op_name(node)
        if name in _NOTES:
            program.graph.erase_node(node)
        elif name in _SAME_VALUE and not _trains(node, name):
            program.replace(node, node.args[0])  # type: ignore[arg-type]
        elif name in ("aten.to.device", "aten.to.other", "aten.to.prim_Device"):
            _cast(program, node)
        elif name in ("aten.view.default", "aten._unsafe_view.default"):
            node.target = torch.ops.aten.reshape.default
        elif name == "aten._native_batch_norm_legit_no_training.default":
            _single_output_batch_norm(node)
    checked = _erase_checks(program)
    for node in [n for n in program.calls() if not n.users and not n.is_impure()]:
        program.erase_dead(node)  # and what only it read
    for symbol in checked - _symbols(program.graph.nodes) if checked else ():
        program.ranges.pop(symbol, None)


def _erase_checks(program: Program) -> set[Any]:
    """Erase what only refuses inputs, and return the symbols that it was about.

    What checks a number that the data decides stays where the layout of a tensor hangs on it: shapes behind it were
    worked out under that check. Checks of input sizes alone stay likewise.
    """
    checks = [n for n in program.calls() if dialect.checks_at_run_time(n)]
    needed = _symbols(n for n in _upwards(program.output) if not _is_number(n)) if checks else set()
    erased = set()
    for check in checks:
        numbers = _upwards(check, through_tensors=False) - {check}
        symbols = _symbols(numbers)
        if not (symbols & needed if symbols else numbers):
            program.graph.erase_node(check)
            erased |= symbols
    return erased


def _symbols(nodes: Iterable[Node]) -> set[Any]:
    return set().union(*(data_symbols(n.meta.get("val")) for n in nodes))


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def _upwards(node: Node, *, through_tensors: bool = True) -> set[Node]:
    """``node`` and all that it is made from; without tensors, only back to where its numbers are read off them."""
    found, pending = {node}, [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in found and (through_tensors or _is_number(operand)):
                found.add(operand)
                pending.append(operand)
    return found


def _cast(program: Program, node: Node) -> None:
    """A move to a device is at most a cast: a Program runs on the CPU."""
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        program.replace(node, source)
        return
    node.target, node.args, node.kwargs = torch.ops.aten.to.dtype, (source, dtype), {}


def _trains(node: Node, name: str) -> bool:
    position = _DROPOUT_TRAIN.get(name)
    return position is not None and bool(node.args[position]) and bool(node.args[1] != 0)


def _writes(node: Node) -> bool:
    return dialect.mutates(node.target) and dialect.op_name(node) not in _SAME_VALUE


def _aliases(node: Node) -> bool:
    """Whether a node's value may share memory with one of its operands."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes != []
    return any(r.alias_info is not None for r in node.target._schema.returns) and not _writes(node)


def _twin(target: Any) -> Any:
    """The functional overload of an in-place one, or None."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _can_rename(node: Node) -> bool:
    base = node.args[0] if node.args else None
    if not isinstance(base, Node) or _aliases(base) or _twin(node.target) is None:
        return False
    target: Any = node.target
    written = [a for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if any(_dtype(other) not in (None, _dtype(base)) for other in node.all_input_nodes):
        return False  # in place, the base keeps its dtype; the functional operator would promote it
    return len(written) == 1 and not any(_aliases(u) for u in base.users if u is not node and u.op != "output")


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _rename(node: Node) -> None:
    base: Node = node.args[0]  # type: ignore[assignment]
    later = _after(node)
    for user in [u for u in base.users if u is not node and u in later]:
        user.replace_input_with(base, node)
    node.target = _twin(node.target)


def _after(node: Node) -> set[Node]:
    found = set()
    current = node.next
    while current.op != "root":
        found.add(current)
        current = current.next
    return found


def _single_output_batch_norm(node: Node) -> None:
    x, weight, bias, mean, variance, momentum, eps = node.args
    first = next((u for u in node.users if u.args[1] == 0), None)
    if first is None or len(node.users) != 1:
        return
    first.target = torch.ops.aten.batch_norm.default
    first.args = (x, weight, bias, mean, variance, False, momentum, eps, False)
    node.graph.erase_node(node)
