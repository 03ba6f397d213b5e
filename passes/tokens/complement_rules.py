"""Complements: the places that a selection left out, found by comparing and not by sorting.

EViT writes zeros over the chosen places of 0 … N − 1, sorts, and takes what is behind the zeros. Before → after::

    %1 = scatter(0 … N−1, −1, chosen, 0)  [b,N]      %1 = eq(chosen [b,1,k], 0 … N−1 [N,1])  [b,N,k]
    %2 = sort(%1)[0]                                 %2 = amax(%1 as numbers, −1)  [b,N]
    %3 = slice(%2, 1, k)  [b,N−k]               →    %3 = topk(%2 · N + (0 … N−1), N−k, largest=False)[1]

and where only a weighted sum over those places is made of it, nothing is looked up at all::

    %4 = gather(x, 1, %3 as wide as x)               %3 = (1 − %2) · w  [b,N]
    %5 = gather(w, 1, %3)                       →    %4 = matmul(%3 [b,1,N], x [b,N,c])  [b,1,c]
    %6 = sum(%4 · %5 [b,N−k,1], 1, keepdim)

Weights of chosen places are set to 0. The sum over all places less the sum over the chosen ones would be the same
number and is not: it cancels where the chosen hold most of the weight.

Equation: ``Σ_{j ∉ S} w_j x_j = Σ_j (1 − [j ∈ S]) w_j x_j``.
Source: Liang et al. 2022, EViT, arXiv 2202.07800, equation 4 (the fused token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import Found, bind, match, op
from vlexport.passes.tokens.index_range import bounds, distinct
from vlexport.passes.tokens.order_rules import LARGEST_K
from vlexport.passes.tokens.writer import Writer, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Complement:
    """What a selection of ``k`` of ``size`` places left out, in ascending order.

    Attributes:
        chosen: The places chosen, ``[B, k]``.
        size: Number of all places.
        nodes: The calls that find what is left, operands before readers.
    """

    chosen: Node
    size: int
    nodes: tuple[Node, ...]

    @property
    def count(self) -> int:
        """How many are chosen."""
        return int(shape_of(self.chosen)[1])


def complement_at(ir: Program, node: Any) -> Complement | str | None:
    """The complement whose last call is ``node``, why it is none, or None where nothing looks like one."""
    if not isinstance(node, Node) or dialect.op_name(node) != "aten.slice.Tensor":
        return None
    item, dim, start, end, step = dialect.operands(node)
    if dialect.op_name(item) != "operator.getitem" or item.args[1] != 0:
        return None
    sort = item.args[0]
    if dialect.op_name(sort) not in ("aten.sort.default", "aten.sort.stable"):
        return None
    scatter = sort.args[0]
    if dialect.op_name(scatter) != "aten.scatter.value":
        return None
    numbers, along, chosen, value = dialect.operands(scatter)[:4]
    given = dict(zip(dialect.operand_names(sort), dialect.operands(sort), strict=True))
    if len(shape_of(scatter)) != 2 or {int(each) % 2 for each in (dim, along, given["dim"])} != {1}:
        return "what is sorted is not one row of places for each sample"
    size, count = shape_of(scatter)[1], shape_of(chosen)[1]
    if not isinstance(size, int) or not isinstance(count, int):
        return "the number of places depends on the input"
    if not _counts_up(ir, numbers, size) or value != 0:
        return "it is not 0 that is written over the places in order"
    if given["descending"] or step != 1 or start != count or end < size:
        return "it is not all that is behind the zeros"
    if not distinct(ir, chosen, 1):
        return "a place may be chosen twice"
    limits = bounds(ir, chosen)
    if limits is None or limits[0] < 0 or limits[1] >= size:
        return "the places chosen are not known to be below the number of places"
    return Complement(chosen, size, (scatter, sort, item, node))


def _counts_up(ir: Program, node: Node, size: int) -> bool:
    while dialect.op_name(node) in ("aten.expand.default", "aten.unsqueeze.default", "aten.repeat.default"):
        node = node.args[0]  # type: ignore[assignment]
    tensor = ir.tensor_of(node)
    if tensor is not None:
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
        return rows.shape[1] == size and bool((rows == torch.arange(size)).all())
    return dialect.op_name(node) == "aten.arange.default" and dialect.operands(node)[0] == size


def find_places(ir: Program, node: Node) -> tuple[Node, ...] | str | None:
    """The calls of a complement, why it is none, or None."""
    found = complement_at(ir, node)
    if isinstance(found, Complement):
        kept = found.size - found.count
        return found.nodes if kept <= LARGEST_K else f"{kept} places are left, more than the {LARGEST_K} of a top-k"
    return found


def write_places(ir: Program, node: Node) -> str:
    """Put a top-k of what is not chosen in place of a complement."""
    found = complement_at(ir, node)
    assert isinstance(found, Complement)
    writer = Writer(ir, node, merges=found.nodes[:-1])
    chosen = _is_chosen(writer, found, torch.float32)
    key = writer(
        aten.add.Tensor,
        writer(aten.mul.Tensor, chosen, found.size),
        writer.stored("order", torch.arange(found.size, dtype=torch.float32)),
    )
    picked = writer(aten.topk.default, key, found.size - found.count, 1, False, True)
    ir.replace(node, writer.item(picked, 1))
    return "complement by sorting written as topk of what is not chosen"


def _is_chosen(writer: Writer, found: Complement, dtype: torch.dtype) -> Node:
    """1 for each place that is chosen, 0 for the others, ``[B, size]``."""
    rows = writer(aten.unsqueeze.default, found.chosen, 1)
    equal = writer(aten.eq.Tensor, rows, writer.places(found.size, behind=1))
    return writer(aten.amax.default, writer(aten._to_copy.default, equal, dtype=dtype), [-1])


_LOOKED_UP = op("aten.gather.default", bind("x"), bind("axis"), op(
    "aten.expand.default", op("aten.unsqueeze.default", bind("left"), bind("behind"), noun="the places left"),
))  # fmt: skip
_WEIGHTED = op(
    "aten.sum.dim_IntList",
    op("aten.mul.Tensor", _LOOKED_UP, op(
        "aten.unsqueeze.default", op("aten.gather.default", bind("w"), bind("axis"), bind("left")), bind("behind"),
    ), commutes=True),
    noun="a weighted sum",
)  # fmt: skip


def _sum_at(ir: Program, node: Node) -> tuple[Found, Complement] | str | None:
    if dialect.op_name(node) != "aten.sum.dim_IntList":
        return None
    found = match(ir, _WEIGHTED, node)
    if not isinstance(found, Found):
        return None
    left = complement_at(ir, found["left"])
    if not isinstance(left, Complement):
        return None
    x, w = found["x"], found["w"]
    _, dims, _, dtype = dialect.operands(node)
    if [int(d) % 3 for d in dims] != [1] or found["axis"] % 3 != 1 or len(shape_of(x)) != 3 or len(shape_of(w)) != 2:
        return "it is not summed over the places left"
    if shape_of(x)[1] != left.size or shape_of(w)[1] != left.size:
        return "values and weights are not those of the places among which was chosen"
    if dtype is not None or x.meta["val"].dtype != w.meta["val"].dtype or not x.meta["val"].is_floating_point():
        return "values and weights differ in type"
    return found, left


def find_sum(ir: Program, node: Node) -> tuple[Node, ...] | str | None:
    """The calls of a weighted sum over a complement, why it is none, or None."""
    found = _sum_at(ir, node)
    if found is None or isinstance(found, str):
        return found
    return tuple(dict.fromkeys((*found[1].nodes, *found[0].nodes)))


def write_sum(ir: Program, node: Node) -> str:
    """Put a product with masked weights in place of a weighted sum over a complement."""
    found = _sum_at(ir, node)
    assert isinstance(found, tuple)
    matched, left = found
    writer = Writer(ir, node, merges=[n for n in (*left.nodes, *matched.nodes) if n is not node])
    x, w = matched["x"], matched["w"]
    others = writer(aten.rsub.Scalar, _is_chosen(writer, left, w.meta["val"].dtype), 1)
    weights = writer(aten.unsqueeze.default, writer(aten.mul.Tensor, others, w), 1)
    new = writer(aten.matmul.default, weights, x)
    if not dialect.operands(node)[2]:
        new = writer(aten.squeeze.dim, new, 1)
    ir.replace(node, new)
    return "sum over a complement written with masked weights"
