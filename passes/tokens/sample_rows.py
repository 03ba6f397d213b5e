"""Looking up rows sample by sample, in a batch that was flattened for it.

Before → after::

    %1 = arange(b) · N  [b,1]                             (gone)
    %2 = reshape(x, [−1,c])                               (gone)
    %3 = reshape(index + %1, [−1])  [b·k]            →    %3 = index as wide as x  [b,k,c]
    %4 = reshape(index(%2, [%3]), [−1,k,c])               %4 = gather(x, 1, %3)

    index(x, [arange(b) [b,1], index [b,k]])         →    gather(x, 1, index as wide as x)

Equation: ``flat[N·b + i] = x[b, i]`` for ``0 ≤ i < N``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.index_range import bounds
from vlexport.passes.tokens.writer import Writer, shape_of, wide

aten = torch.ops.aten
INDEX = "aten.index.Tensor"
_REPEATED = ("aten.reshape.default", "aten.unsqueeze.default", "aten.expand.default", "aten._to_copy.default")


@dataclass(frozen=True)
class SampleRows:
    """Rows ``index`` ``[B, k]`` of ``x`` ``[B, N, …]``.

    Attributes:
        x: What is looked up in.
        index: Which rows of each sample.
        last: The call whose value they are, ``[B, k, …]`` or, with ``flat``, ``[B·k, …]``.
        flat: Whether that value has the samples joined.
        nodes: Calls that go, operands before readers.
    """

    x: Node
    index: Node
    last: Node
    flat: bool
    nodes: tuple[Node, ...]


def each_sample(ir: Program, node: Any, like: Node) -> int | None:
    """The step ``s`` of ``s · [0, 1, …, B − 1]`` where ``node`` is that, as a column or a flat row; else None.

    Args:
        ir: The Program.
        node: Whole numbers, one for each sample.
        like: A value whose first axis is the batch.
    """
    batch = shape_of(like)[0]
    shape = shape_of(node) if isinstance(node, Node) else ()
    if not shape or str(shape[0]) != str(batch) or any(size != 1 for size in shape[1:]):
        return None
    step = 1
    while True:
        tensor = ir.tensor_of(node)
        if tensor is not None:
            flat = tensor.reshape(-1)
            first = int(flat[1]) if flat.numel() > 1 else 0
            whole = not tensor.is_floating_point() and flat.numel() > 1
            return first * step if whole and bool((flat == torch.arange(flat.numel()) * first).all()) else None
        name = dialect.op_name(node)
        if name == "aten.mul.Tensor" and any(isinstance(each, int) for each in node.args):
            number, node = sorted(node.args, key=lambda each: isinstance(each, Node))
            step *= number
        elif name in _REPEATED:
            node = node.args[0]
        elif name == "aten.arange.default":
            return step
        elif name == "aten.arange.start":
            return step if node.args[0] == 0 else None
        elif name == "aten.arange.start_step":
            return step * dialect.operands(node)[2] if node.args[0] == 0 else None
        else:
            return None


def sample_rows_at(ir: Program, node: Node) -> SampleRows | str | None:
    """A lookup sample by sample whose ``index`` call is ``node``, why it stays, or None where it is another lookup."""
    if dialect.op_name(node) != INDEX:
        return None
    source, indices = dialect.operands(node)
    if any(index is None for index in indices) or any(ir.tensor_of(index) is not None for index in indices[1:]):
        return None
    if len(indices) == 2:
        return _by_two(ir, node, source, *indices)
    return _flattened(ir, node, source, indices[0]) if len(indices) == 1 else None


def _by_two(ir: Program, node: Node, x: Node, rows: Node, index: Node) -> SampleRows | str | None:
    if each_sample(ir, rows, x) != 1 or len(shape_of(rows)) != 2:
        return None
    if len(shape_of(index)) != 2 or str(shape_of(index)[0]) != str(shape_of(x)[0]):
        return "its index is not one row of places for each sample"
    return _inside(ir, x, index) or SampleRows(x, index, node, flat=False, nodes=(node,))


def _flattened(ir: Program, node: Node, flat: Node, places: Node) -> SampleRows | str | None:
    if dialect.op_name(flat) != "aten.reshape.default":
        return None
    x: Any = flat.args[0]
    joined = len(shape_of(places)) == 1
    if joined and dialect.op_name(places) == "aten.reshape.default":
        places = places.args[0]  # type: ignore[assignment]
    if dialect.op_name(places) != "aten.add.Tensor" or len(shape_of(places)) != 2:
        return None
    index, offset, alpha = dialect.operands(places)
    if not isinstance(index, Node) or not isinstance(offset, Node) or alpha != 1:
        return None
    if each_sample(ir, offset, x) is None:
        index, offset = offset, index
    step = each_sample(ir, offset, x)
    if step is None or len(shape_of(offset)) != 2:
        return None
    if len(shape_of(x)) < 2 or shape_of(x)[1] != step or list(shape_of(flat)[1:]) != list(shape_of(x)[2:]):
        return f"samples are {step} rows apart, and have {shape_of(x)[1:2]} rows each"
    if str(shape_of(index)[0]) != str(shape_of(x)[0]):
        return "its index is not one row of places for each sample"
    reason = _inside(ir, x, index)
    if reason:
        return reason
    readers = list(node.users)
    wanted = (*shape_of(index), *shape_of(x)[2:])
    if not joined:
        return SampleRows(x, index, node, flat=False, nodes=(node,))
    apart = len(readers) == 1 and dialect.op_name(readers[0]) == "aten.reshape.default"
    if apart and list(map(str, shape_of(readers[0]))) == list(map(str, wanted)):
        return SampleRows(x, index, readers[0], flat=False, nodes=(node, readers[0]))
    return SampleRows(x, index, node, flat=True, nodes=(node,))


def _inside(ir: Program, x: Node, index: Node) -> str:
    limits, size = bounds(ir, index), shape_of(x)[1]
    if limits is None or not isinstance(size, int):
        return "its places are not known to lie inside a sample"
    if limits[0] < 0 or limits[1] >= size:
        return f"its places reach from {limits[0]} to {limits[1]}, outside a sample of {size} rows"
    return "" if all(isinstance(s, int) for s in shape_of(x)[2:]) else "the size of a row depends on the input"


def find(ir: Program, node: Node) -> tuple[Node, ...] | str | None:
    """The calls of a lookup sample by sample, why it stays, or None."""
    found = sample_rows_at(ir, node)
    return found.nodes if isinstance(found, SampleRows) else found


def write(ir: Program, node: Node) -> str:
    """Put a gather in place of a lookup sample by sample."""
    found = sample_rows_at(ir, node)
    assert isinstance(found, SampleRows)
    writer = Writer(ir, found.last, merges=found.nodes[:-1])
    new = writer(aten.gather.default, found.x, 1, wide(writer, found.index, 1, found.x))
    if found.flat:
        new = writer(aten.reshape.default, new, [-1, *shape_of(found.x)[2:]])
    ir.replace(found.last, new)
    return "lookup in a flattened batch written as gather"
