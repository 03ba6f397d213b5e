"""Writing to places that are known, as the pieces put together.

Before → after::

    slice_scatter(x, y, 1, 2, 5)      →   cat([slice(x, 1, 0, 2), y, slice(x, 1, 5)], 1)
    slice_scatter(x, y, 1, 1, N, 2)   →   where([0,1,0,1,…], index_select(y, 1, [0,0,0,1,…]), x)
    select_scatter(x, y, 1, 0)        →   cat([unsqueeze(y, 1), slice(x, 1, 1)], 1)

This is how an assignment to a part of a tensor is captured (``scores[:, 0] = −inf``).
Equation: ``out[i] = y[p(i)]`` for the places written to, ``x[i]`` for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.writer import Writer, shape_of

aten = torch.ops.aten
WRITES = ("aten.slice_scatter.default", "aten.select_scatter.default")


@dataclass(frozen=True)
class Written:
    """A write to known places.

    Attributes:
        target: What is written to.
        source: What is written.
        axis: Along which axis, ≥ 0.
        places: Where, in order; None for all of the axis.
        drops: Whether the source lacks the axis.
    """

    target: Node
    source: Node
    axis: int
    places: range | None
    drops: bool


def _written(node: Node) -> Written | str | None:
    if dialect.op_name(node) not in WRITES:
        return None
    target, source, dim, *rest = dialect.operands(node)
    axis = int(dim) % len(shape_of(target))
    size = shape_of(target)[axis]
    if source.meta["val"].dtype != target.meta["val"].dtype:
        return "source and target differ in type"
    if dialect.op_name(node) == "aten.select_scatter.default":
        if not isinstance(size, int):
            return "the length of the axis depends on the input"
        at = int(rest[0]) % size
        return Written(target, source, axis, range(at, at + 1), drops=True)
    start, end, step = rest
    if start in (None, 0) and step == 1 and str(shape_of(source)[axis]) == str(size):
        return Written(target, source, axis, None, drops=False)
    if not isinstance(size, int) or not all(isinstance(each, int) for each in (start or 0, end or 0)):
        return "the length of the axis depends on the input"
    places = range(*slice(start, end, step).indices(size))
    return Written(target, source, axis, places, drops=False) if places else "nothing is written"


def find(ir: Program, node: Node) -> tuple[Node, ...] | str | None:
    """The call of a write to known places, why it stays, or None."""
    found = _written(node)
    return (node,) if isinstance(found, Written) else found


def write(ir: Program, node: Node) -> str:
    """Put the pieces together in place of a write to known places."""
    found = _written(node)
    assert isinstance(found, Written)
    writer = Writer(ir, node)
    source, places, axis = found.source, found.places, found.axis
    if found.drops:
        source = writer(aten.unsqueeze.default, source, axis)
    size: Any = shape_of(found.target)[axis]
    if places is None or len(places) == size:
        new = source
    elif places.step == 1 or len(places) == 1:
        first, behind = places[0], places[-1] + 1
        pieces = [writer(aten.slice.Tensor, found.target, axis, 0, first)] if first else []
        pieces.append(source)
        if behind < size:
            pieces.append(writer(aten.slice.Tensor, found.target, axis, behind, size))
        new = writer(aten.cat.default, pieces, axis)
    else:
        index = torch.zeros(size, dtype=torch.int64)
        index[list(places)] = torch.arange(len(places))
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(places)] = True
        mask = mask.reshape(size, *(1 for _ in shape_of(found.target)[axis + 1 :]))
        spread = writer(aten.index_select.default, source, axis, writer.stored("which", index))
        new = writer(aten.where.self, writer.stored("written", mask), spread, found.target)
    ir.replace(node, new)
    return f"{dialect.plain_name(node)} written as its pieces"
