"""One row a sample that the input decides: when an index says that, and where it can be computed.

``value[arange(batch), argmax(ids == end)]`` reads the end-of-text token of every sample. Narrowing moves that read up
in front of what it is computed from, so the index must follow from the inputs without any value that is narrowed: it is
made of whole numbers alone. It is an argmax, hence never negative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.demand.site import shape_of

_RANGES = ("aten.arange.default", "aten.arange.start")
_PLACES = ("aten.argmax.default", "aten.argmin.default")


def is_one_a_sample(program: Program, value: Any, samples: Any, places: Any) -> bool:
    """Whether ``value[samples, places]`` is one row a sample, for samples along axis 0 and rows along axis 1."""
    if dialect.op_name(places) not in _PLACES or not _counts_up(program, samples):
        return False
    batch = shape_of(value)[:1]
    if shape_of(samples) != batch or shape_of(places) != batch:
        return False
    return all(map(_is_whole_number, origin_of(samples, places)))


def _counts_up(program: Program, samples: Any) -> bool:
    """Whether it is 0, 1, 2 …: computed, or stored where the batch is fixed."""
    stored = program.tensor_of(samples)
    if stored is not None:
        return stored.ndim == 1 and torch.equal(stored, torch.arange(len(stored), dtype=stored.dtype))
    name = dialect.op_name(samples)
    return name == _RANGES[0] or (name == _RANGES[1] and samples.args[0] == 0)


def origin_of(*nodes: Node) -> list[Node]:
    """The calls and stored tensors that ``nodes`` are computed from, and they, in any order."""
    found: dict[Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and node.op != "placeholder":
            found[node] = None
            pending.extend(node.all_input_nodes)
    return list(found)


def compute_first(program: Program, *nodes: Node) -> None:
    """Move what ``nodes`` are computed from in front of every other call."""
    chain = set(origin_of(*nodes))
    last_input = program.placeholders[-1]
    for node in reversed([node for node in program.graph.nodes if node in chain]):
        last_input.append(node)


def drawn_out(program: Program, node: Node, drawn: Any, *, before: Node, value_of: Node) -> Node:
    """The rows ``drawn`` of the value of ``node``; their axis has size 1."""
    rank = len(shape_of(node))
    front = [drawn.batch, drawn.axis]
    order = [*front, *(axis for axis in range(rank) if axis not in front)]
    aten = torch.ops.aten

    def add(target: Any, *args: Any) -> Node:
        return program.add_call(target, args, before=before, value_of=value_of)

    moved = node if order == list(range(rank)) else add(aten.permute.default, node, order)
    taken = add(aten.unsqueeze.default, add(aten.index.Tensor, moved, [drawn.samples, drawn.places]), 1)
    if order == list(range(rank)):
        return taken
    return add(aten.permute.default, taken, [order.index(axis) for axis in range(rank)])


def _is_whole_number(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point
