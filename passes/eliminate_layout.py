"""eliminate-layout: layout operators whose result is their operand go.

Before → after::

    slice(x, 1, 0, 9223372036854775807)                 →  x
    expand(x, [-1, 197, 192])   of a [%batch, 197, 192] →  x
    pad(x, [0,0,0,0]), repeat(x, [1,1]), roll(x, [0], [1]), flip of an axis of size 1  →  x
    cat([x], 1)                                         →  x
    split(x, 8, 1)[0]           of an axis of size 8    →  x
    permute(x, [0,2,1])         of a [%batch, 1, 1]     →  x

Equation: ``y[i] = x[i]`` for every index tuple ``i``.

Sizes that depend on the input are equal where they are the same expression. It stands first of the layout passes: what
they follow through the graph should not be parted by something that does nothing.

Does not apply when: sizes are not known to be equal; a cat of one operand changes its dtype.
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.layout.views import LAYOUT, chains_to, shape_of


class EliminateLayout(Pass[Program]):
    """Layout operators whose result is their operand go."""

    name: ClassVar[str] = "eliminate-layout"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if _operand(node) is not None:
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        what = dialect.plain_name(node)
        if what == "getitem":
            what = dialect.plain_name(cast("Node", node.args[0]))
        where = (provenance.module_path(node),)
        operand = _operand(node)  # read again: another match of this sweep may have replaced it
        assert operand is not None
        return Change(what=f"{what} without effect removed", where=where, saved_nodes=ir.replace(node, operand))


def _operand(node: Node) -> Node | None:
    """The operand that a call gives back as it is, or None."""
    rule = _RULES.get(dialect.op_name(node))
    return rule(node) if rule is not None else None


def _same_shape(node: Node) -> Node | None:
    """For operators that take all elements in order, or repeat some: with the size kept, nothing is left to do."""
    operand = cast("Node", node.args[0])
    return operand if shape_of(operand) == shape_of(node) else None


def _layout(node: Node) -> Node | None:
    return cast("Node", node.args[0]) if chains_to(node)[0].spellings[:1] == ((),) else None


def _pad(node: Node) -> Node | None:
    operand, amounts = dialect.operands(node)[:2]
    return operand if all(isinstance(a, int) and a == 0 for a in amounts) else None


def _roll(node: Node) -> Node | None:
    operand, shifts, dims = dialect.operands(node)[:3]
    shape = shape_of(operand)
    moved = [1 for shift, dim in zip(shifts, dims, strict=False) if shift != 0 and shape[dim] != 1]
    return operand if not any(shifts) or (dims and not moved) else None


def _flip(node: Node) -> Node | None:
    operand, dims = dialect.operands(node)[:2]
    shape = shape_of(operand)
    return operand if all(shape[d] == 1 for d in dims) else None


def _cat(node: Node) -> Node | None:
    pieces = cast("list[Node]", node.args[0])
    same = len(pieces) == 1 and pieces[0].meta["val"].dtype == node.meta["val"].dtype
    return pieces[0] if same else None


def _item(node: Node) -> Node | None:
    several, index = cast("tuple[Node, Any]", node.args)
    if dialect.op_name(several) not in _PARTS or index != 0:
        return None
    operand = cast("Node", several.args[0])
    return operand if shape_of(operand) == shape_of(node) else None


_PARTS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_RULES: dict[str, Callable[[Node], Node | None]] = {
    **dict.fromkeys(LAYOUT, _layout),
    "aten.slice.Tensor": _same_shape,
    "aten.narrow.default": _same_shape,
    "aten.expand.default": _same_shape,
    "aten.repeat.default": _same_shape,
    "aten.tile.default": _same_shape,
    "aten.repeat_interleave.self_int": _same_shape,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.roll.default": _roll,
    "aten.flip.default": _flip,
    "aten.cat.default": _cat,
    "operator.getitem": _item,
}
