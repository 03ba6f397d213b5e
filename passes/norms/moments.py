"""Reads means, sums and spreads of a value over some of its axes, however they are spelled.

``mean``, ``sum``, ``var`` and ``std`` in their overloads, the parts of a ``var_mean``, and vector norms of order 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.idioms import axes
from vlexport.passes.match import as_number

Kind = Literal["mean", "sum", "variance", "deviation", "norm"]


@dataclass(frozen=True)
class Moment:
    """One number for each place along the axes that stay.

    Attributes:
        kind: A variance is the mean square distance from the mean, a deviation its root, a norm the root of the sum of
            squares.
        of: The value.
        dims: Axes it is taken over, each ≥ 0, in order.
        unbiased: Whether a variance or deviation divides by one less than the number of elements.
        nodes: The calls, operands before readers.
    """

    kind: Kind
    of: Node
    dims: tuple[int, ...]
    unbiased: bool
    nodes: tuple[Node, ...]


def moment(program: Program, node: Any) -> Moment | None:
    """What ``node`` is of its operand, or None."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    name = dialect.op_name(node)
    if name == "operator.getitem":
        return _part_of_both(node)
    if name not in _KINDS:
        return None
    args = dialect.operands(node)
    kind, place = _KINDS[name]
    of: Any = args[0]
    if kind == "norm" and not _is_euclidean(program, name, args):
        return None
    if any(isinstance(a, torch.dtype) and a is not of.meta["val"].dtype for a in args):
        return None
    dims = axes(args[place] if place else None, of.meta["val"].ndim)
    return Moment(kind, of, dims, _is_unbiased(name, args), (node,))


def square(program: Program, node: Any) -> Node | None:
    """What ``node`` is the square of, or None."""
    if not isinstance(node, Node):
        return None
    name, args = dialect.op_name(node), dialect.operands(node)
    base: Any = args[0] if args else None
    squared = name == "aten.square.default"
    if name in ("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor"):
        squared = as_number(program, args[1]) == 2.0
    elif name == "aten.mul.Tensor":
        squared = args[0] is args[1]
    return base if squared and isinstance(base, Node) else None


def elements(of: Node, dims: tuple[int, ...]) -> int | None:
    """How many elements one moment is made of; None where the input decides."""
    count = 1
    for dim in dims:
        size = of.meta["val"].shape[dim]
        if isinstance(size, torch.SymInt):
            return None
        count *= int(size)
    return count


def reduced(of: Node, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """The shape of ``of`` with size 1 along ``dims``."""
    return tuple(1 if i in dims else size for i, size in enumerate(of.meta["val"].shape))


def _part_of_both(node: Node) -> Moment | None:
    """A variance or a mean that were computed together."""
    both: Any = node.args[0]
    if dialect.op_name(both) not in ("aten.var_mean.correction", "aten.var_mean.dim"):
        return None
    args = dialect.operands(both)
    dims = axes(args[1], args[0].meta["val"].ndim)
    unbiased = _is_unbiased(dialect.op_name(both), args)
    return Moment("variance" if node.args[1] == 0 else "mean", args[0], dims, unbiased, (both, node))


def _is_unbiased(name: str, args: tuple[Any, ...]) -> bool:
    if name.endswith((".dim", ".correction")) and not name.startswith(("aten.mean", "aten.sum")):
        correction = args[2]
        return correction is None or float(correction) != 0.0
    return False


def _is_euclidean(program: Program, name: str, args: tuple[Any, ...]) -> bool:
    """Whether a norm is the root of the sum of squares over its axes."""
    if args[1] is None:
        return True  # of all orders the second
    several = isinstance(args[2], (list, tuple)) and len(args[2]) > 1
    return as_number(program, args[1]) == 2.0 and not (several and name == "aten.linalg_norm.default")


_KINDS: dict[str, tuple[Kind, int]] = {
    "aten.mean.dim": ("mean", 1),
    "aten.mean.default": ("mean", 0),
    "aten.sum.dim_IntList": ("sum", 1),
    "aten.sum.default": ("sum", 0),
    "aten.var.correction": ("variance", 1),
    "aten.var.dim": ("variance", 1),
    "aten.std.correction": ("deviation", 1),
    "aten.std.dim": ("deviation", 1),
    "aten.linalg_vector_norm.default": ("norm", 2),
    "aten.linalg_norm.default": ("norm", 2),
    "aten.norm.ScalarOpt_dim": ("norm", 2),
}
"""Operator → what it computes, and the place of its axes; 0 where it takes all."""
