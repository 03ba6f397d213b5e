"""What a Program costs: multiply-accumulates, parameters and bytes.

One MAC is one multiplication with its addition, as papers and timm count them; elementwise work, norms and softmax
count nothing. Opaque ops are listed, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program


@dataclass(frozen=True)
class Cost:
    """Cost of one run.

    Attributes:
        macs: Multiply-accumulates at the given dims.
        parameters: Elements of all floating tensors in use.
        size_bytes: Bytes of all tensors in use.
        opaque: Names of ops whose MACs are unknown.
    """

    macs: int
    parameters: int
    size_bytes: int
    opaque: tuple[str, ...]


def cost(program: Program, dims: Mapping[str, int] | None = None) -> Cost:
    """Cost with every dynamic dim at its ``opt``, or at ``dims``."""
    dims = dims or {}
    return Cost(
        macs=sum(node_macs(program, node, dims) for node in program.calls()),
        parameters=_parameters(program, program.used_tensors()),
        size_bytes=program.size_bytes,
        opaque=tuple(sorted({dialect.op_name(n) for n in program.calls() if dialect.is_opaque(n)})),
    )


def node_macs(program: Program, node: Node, dims: Mapping[str, int]) -> int:
    """MACs of one call; 0 for anything without a rule."""
    row = dialect.info(node)
    if row is None or row.macs is None:
        return 0
    arguments = dialect.operands(node)
    given = [a for each in arguments for a in (each if isinstance(each, (list, tuple)) else [each])]
    operands: list[Sequence[int]] = [
        program.sizes(a.meta["val"].shape, dims)
        for a in given
        if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)
    ]
    return shaped_macs(node, operands, program.sizes(node.meta["val"].shape, dims), arguments)


def shaped_macs(node: Node, operands: list[Sequence[int]], out: Sequence[int], arguments: tuple[Any, ...]) -> int:
    """MACs of the operator of ``node`` at other sizes.

    Args:
        node: A call.
        operands: Sizes of its tensor operands, in order, lists opened.
        out: Sizes of its value.
        arguments: All its operands, in the order of its schema.
    """
    row = dialect.info(node)
    return row.macs(operands, out, arguments) if row is not None and row.macs is not None else 0


@dataclass(frozen=True)
class Saving:
    """What goes with a node, counted as :class:`Cost` counts.

    Attributes:
        calls: Calls.
        macs: Multiply-accumulates.
        parameters: Elements of parameters that nothing else reads.
    """

    calls: int
    macs: int
    parameters: int


def saving(program: Program, node: Node) -> Saving:
    """What a Program would lose if nobody read ``node`` any more: the node, and upwards what only it read.

    Ask before the readers go elsewhere; ``Program.replace`` and ``erase_dead`` then erase exactly this.
    """
    gone = {node}
    pending = list(node.all_input_nodes)
    while pending:
        operand = pending.pop()
        if operand not in gone and operand.op in ("call_function", "get_attr") and gone.issuperset(operand.users):
            gone.add(operand)
            pending.extend(operand.all_input_nodes)
    calls = [n for n in gone if n.op == "call_function"]
    names = {str(n.target) for n in gone if n.op == "get_attr"}
    if names:
        names -= {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.users and n not in gone}
    return Saving(
        calls=len(calls),
        macs=sum(node_macs(program, n, {}) for n in calls),
        parameters=_parameters(program, names),
    )


def parameters_stored(program: Program) -> int:
    """Parameters among all tensors that a Program stores; what a rewrite saves is the difference of two counts."""
    return _parameters(program, program.tensors)


_PACKED = (torch.int8, torch.uint8, torch.int32)
"""What a ``dequantize`` or ``look_up`` may read; float8 is of floats as it is."""


def parameter_names(program: Program) -> set[str]:
    """Stored tensors that count as parameters: of floats, and integers that become floats when they are read."""
    found = {name for name, tensor in program.tensors.items() if tensor.is_floating_point()}
    if not any(tensor.dtype in _PACKED for tensor in program.tensors.values()):
        return found  # passes ask after each change
    packed = [node.args[0] for node in program.calls("vlexport.dequantize.default", "vlexport.look_up.default")]
    return found | {str(each.target) for each in packed if isinstance(each, Node) and each.op == "get_attr"}


def _parameters(program: Program, names: Iterable[str]) -> int:
    counted = parameter_names(program)
    return sum(program.tensors[name].numel() for name in names if name in counted)
