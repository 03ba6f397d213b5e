"""Layout operators in a graph: chains of reshapes and permutes, what they do together, and how that is written.

What ``passes/layout/axis_maps`` says of sizes is read off nodes here, and written as calls again. ``unsqueeze`` and
``squeeze`` count as reshapes, and are written where one axis of size 1 comes or goes: they need no sizes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.layout.axis_maps import AxisMap, Permute, Reshape, Size, Step, permuted, reshaped, sizes_of, steps

aten = torch.ops.aten
PERMUTE = "aten.permute.default"
RESHAPE = "aten.reshape.default"
_RESHAPES = (
    RESHAPE, "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default",
)  # fmt: skip
LAYOUT = (PERMUTE, *_RESHAPES)
LONGEST = 12
"""Operators of a chain that are looked at together."""
Call = tuple[Any, tuple[Any, ...]]
"""An operator and its operands behind the first."""


def is_layout(node: Any) -> bool:
    """Whether a node is a permute or a reshape, or a spelling of one that drops or adds axes of size 1."""
    return isinstance(node, Node) and dialect.op_name(node) in LAYOUT


def shape_of(node: Any) -> tuple[Size, ...]:
    """The recorded sizes of a node's value as expressions."""
    return sizes_of(node.meta["val"])


def operand_of(node: Node) -> Node:
    """What a layout operator reads."""
    return cast("Node", node.args[0])


def dims_of(node: Node) -> tuple[int, ...]:
    """The order of a permute, every dim ≥ 0."""
    dims = cast("Sequence[int]", node.args[1])
    return tuple(d % len(dims) for d in dims)


def map_of(node: Node) -> AxisMap | None:
    """The map of one layout operator; None where a reshape cuts axes at other places."""
    before = shape_of(operand_of(node))
    if dialect.op_name(node) == PERMUTE:
        return permuted(before, dims_of(node))
    return reshaped(before, shape_of(node))


@dataclass(frozen=True)
class Chain:
    """Layout operators that read one another.

    Attributes:
        nodes: From the first to the last.
        axes: What they do together; None where it has no common atoms.
        spellings: The shortest ones, as steps; empty where none is known.
    """

    nodes: tuple[Node, ...]
    axes: AxisMap | None
    spellings: tuple[tuple[Step, ...], ...]

    @property
    def source(self) -> Node:
        """What the first reads."""
        return operand_of(self.nodes[0])

    @property
    def last(self) -> Node:
        """The last operator."""
        return self.nodes[-1]

    @property
    def private(self) -> int:
        """How many go when nobody reads the last any more."""
        count = 1
        for node in reversed(self.nodes[:-1]):
            if len(node.users) != 1:
                break
            count += 1
        return count


def chains_to(last: Node) -> list[Chain]:
    """Every chain that ends at a layout operator, the shortest first."""
    found: list[Chain] = []
    nodes: tuple[Node, ...] = ()
    node = last
    while is_layout(node) and len(nodes) < LONGEST:
        nodes = (node, *nodes)
        found.append(Chain(nodes, *_together(nodes)))
        node = operand_of(node)
    return found


def _together(nodes: tuple[Node, ...]) -> tuple[AxisMap | None, tuple[tuple[Step, ...], ...]]:
    """What layout operators do one after the other, and its spellings. Reshapes in a row are one reshape."""
    maps: list[AxisMap | None] = []
    for is_permute, run in itertools.groupby(nodes, lambda n: dialect.op_name(n) == PERMUTE):
        if is_permute:
            maps.extend(map(map_of, run))
        else:
            first, *rest = run
            maps.append(reshaped(shape_of(operand_of(first)), shape_of([first, *rest][-1])))
    whole = functools.reduce(together, maps)
    if whole is not None:
        return whole, steps(whole)
    return None, _without_atoms(nodes) if len(maps) == 1 else ()


def _without_atoms(nodes: tuple[Node, ...]) -> tuple[tuple[Step, ...], ...]:
    before, after = shape_of(operand_of(nodes[0])), shape_of(nodes[-1])
    return ((),) if before == after else ((Reshape(after),),)


@functools.lru_cache(maxsize=4096)
def together(first: AxisMap | None, second: AxisMap | None) -> AxisMap | None:
    """One map behind another, as :meth:`AxisMap.then`."""
    return first.then(second) if first is not None and second is not None else None


def calls_of(spelling: Sequence[Step], before: tuple[Size, ...], entries: Any = None) -> list[Call] | None:
    """The calls of a spelling; None where a reshape has two or more symbolic sizes.

    Args:
        spelling: Steps.
        before: Sizes of what the first of them reads.
        entries: Sizes that the last step may be written with if it is a reshape, as a call has them.
    """
    calls: list[Call] = []
    for i, step in enumerate(spelling):
        if isinstance(step, Permute):
            calls.append((aten.permute.default, (list(step.dims),)))
            before = tuple(before[d] for d in step.dims)
            continue
        call = _reshape_call(before, step.sizes, entries if i == len(spelling) - 1 else None)
        if call is None:
            return None
        calls.append(call)
        before = step.sizes
    return calls


def _reshape_call(before: tuple[Size, ...], after: tuple[Size, ...], entries: Any) -> Call | None:
    for axis, size in enumerate(after):
        if size == 1 and after[:axis] + after[axis + 1 :] == before:
            return aten.unsqueeze.default, (axis,)
    for axis, size in enumerate(before):
        if size == 1 and before[:axis] + before[axis + 1 :] == after:
            return aten.squeeze.dim, (axis,)
    symbolic = [size for size in after if not isinstance(size, sympy.Integer)]
    if len(symbolic) <= 1 and (not symbolic or 0 not in after):
        return aten.reshape.default, ([int(s) if isinstance(s, sympy.Integer) else -1 for s in after],)
    return (aten.reshape.default, (entries,)) if entries is not None else None


def entries_of(node: Node) -> Any:
    """The sizes a reshape is written with; None for any other operator."""
    return node.args[1] if dialect.op_name(node) == RESHAPE else None


def emit(ir: Program, calls: Sequence[Call], source: Node, *, before: Node, value_of: Node, merges: Sequence[Node] = ()
         ) -> Node:  # fmt: skip
    """Insert calls, each on the one before it, and return the last; ``source`` where there are none."""
    node = source
    for target, rest in calls:
        node = ir.add_call(target, (node, *rest), before=before, value_of=value_of, merges=merges)
    return node
