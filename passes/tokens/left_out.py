"""What values hold in the rows of the tokens that a dense mask leaves out.

A dense mask says 0 or 1 of every token, and the tokens stay where they are: ``x · mask``, ``q·kᵀ + (1 − mask) · −1e4``.
From the call that makes the mask, bounds are carried forward through the graph. With ``mask = cumulated < t``::

    mask                    0 in the rows left out
    x · mask                0
    (1 − mask) · −1e4       −1e4
    scores + that           no weight in a softmax, along the keys
    softmax of that         0, along the keys
    cumulated               at least t
    cumulated + sigmoid(x)  at least t, so that the next mask is 0 there, too

A value without an entry may hold anything there: it is read only where a 0 or no weight stands against it, or the mask
is no selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.layout.axis_maps import reshaped, sizes_of
from vlexport.passes.layout.axis_rules import whole_axis
from vlexport.passes.tokens.intervals import ANY, EITHER, ZERO, Bounds, computed, left_out_by, of_number, of_tensor

EVERYWHERE = None
"""Key of the bounds that hold in all rows."""
_Known = dict[int | None, Bounds]
_RESHAPED = {*dialect.SECOND_SPELLINGS["aten.reshape.default"], "aten.reshape.default", "aten.ravel.default"}
_SQUEEZED = {"squeeze", "unsqueeze"}
_SOFTMAX = {"softmax", "_softmax"}
_SMALLER = {"sum", "mean", "amax", "amin"}


class LeftOut:
    """Bounds in the rows that a mask leaves out.

    Args:
        program: Of batch 1.
        root: The call that makes the mask; all its axes but one have size 1. None follows no rows, only what holds
            everywhere.
    """

    def __init__(self, program: Program, root: Node | None) -> None:
        self.program = program
        self.root = root
        self._known: dict[Node, _Known] = {}
        self._given: dict[Node, _Known] = {}
        if root is not None:
            axis = token_axis(root)
            compared = left_out_by(root)
            self._given[root] = {axis: ZERO}
            if compared is not None and compared[0].meta["val"].shape == root.meta["val"].shape:
                self._given[compared[0]] = {axis: compared[1]}
        for node in program.graph.nodes:
            if isinstance(node.meta.get("val"), torch.Tensor):
                self._look_at(node)

    def at(self, node: Node, axis: int | None) -> Bounds:
        """Of ``node`` in the rows left out along ``axis``."""
        known = self._known.get(node, {})
        return known.get(axis, known.get(EVERYWHERE, ANY))

    def known(self, node: Node) -> Mapping[int | None, Bounds]:
        """All that is known of ``node``: axis → bounds in the rows left out along it."""
        return self._known.get(node, {})

    def silent(self) -> Iterator[Node]:
        """Calls that hold one known number wherever a token is left out, and something else elsewhere."""
        for node, known in self._known.items():
            if any(axis is not EVERYWHERE and bounds.constant is not None for axis, bounds in known.items()):
                yield node

    def _look_at(self, node: Node) -> None:
        stored = self.program.tensor_of(node)
        if stored is not None:
            self._known[node] = {EVERYWHERE: of_tensor(stored)}
            return
        found = self._computed(node) if node.op == "call_function" else {}
        everywhere = found.get(EVERYWHERE, ANY)
        for axis, bounds in self._given.get(node, {}).items():
            found[axis] = found.get(axis, everywhere).within(bounds)
        self._known[node] = {a: b for a, b in found.items() if a is EVERYWHERE or b != everywhere}

    def _computed(self, node: Node) -> _Known:
        name, row = dialect.plain_name(node), dialect.info(node)
        if row is not None and row.category == "elementwise":
            return self._elementwise(node)
        if name in ("full", "ones", "zeros", "full_like", "ones_like", "zeros_like"):
            fill: Any = dialect.operands(node)[1] if "full" in name else float("ones" in name)
            return {EVERYWHERE: of_number(fill) if isinstance(fill, (int, float)) else ANY}
        if name in _SOFTMAX:
            return self._softmax(node)
        if name == "matmul":
            return self._matmul(node)
        if name == "cat":
            return self._cat(node)
        if name == "linear":  # zeros stay zeros, unless a bias is added
            kept = self._moved(node) if dialect.operands(node)[2] is None else {}
            return {a: b for a, b in kept.items() if b.constant == 0.0}
        return self._moved(node) if moved_axes(node) is not None else {}

    def _elementwise(self, node: Node) -> _Known:
        shape = node.meta["val"].shape
        given = dialect.operands(node)
        axes: set[int | None] = {EVERYWHERE}
        for each in given:
            if isinstance(each, Node):
                shift = len(shape) - each.meta["val"].ndim
                axes |= {a + shift for a in self._known.get(each, {}) if a is not None}

        def bounds(each: Any, axis: int | None) -> Any:
            if not isinstance(each, Node):
                return each
            return self.at(each, axis if axis is None else axis - len(shape) + each.meta["val"].ndim)

        return {axis: computed(node, [bounds(each, axis) for each in given]) for axis in axes}

    def _moved(self, node: Node) -> _Known:
        """The operand's bounds, where its axes went."""
        source: Any = node.args[0]
        axes = moved_axes(node) or {}
        found: _Known = {EVERYWHERE: self.at(source, EVERYWHERE)}
        found |= {axes[a]: b for a, b in self._known.get(source, {}).items() if a in axes and a is not None}
        if dialect.plain_name(node) == "sum":
            found = {a: b for a, b in found.items() if b.constant == 0.0}
        return found

    def _softmax(self, node: Node) -> _Known:
        source: Any = node.args[0]
        dim = dialect.operands(node)[1] % node.meta["val"].ndim
        found: _Known = {EVERYWHERE: EITHER}
        if self.at(source, dim).weightless and dim in self._known.get(source, {}):
            found[dim] = ZERO
        return found

    def _matmul(self, node: Node) -> _Known:
        left, right = dialect.operands(node)
        rank = node.meta["val"].ndim
        found: _Known = {}
        if min(left.meta["val"].ndim, right.meta["val"].ndim) < 2:
            return found
        if self.at(left, left.meta["val"].ndim - 2).constant == 0.0:
            found[rank - 2] = ZERO
        if self.at(right, right.meta["val"].ndim - 1).constant == 0.0:
            found[rank - 1] = ZERO
        return found

    def _cat(self, node: Node) -> _Known:
        pieces, dim = dialect.operands(node)
        dim %= node.meta["val"].ndim
        axes = {a for piece in pieces for a in self._known.get(piece, {}) if a != dim} | {EVERYWHERE}
        found: _Known = {}
        for axis in axes:
            bounds = self.at(pieces[0], axis)
            for piece in pieces[1:]:
                bounds = bounds.or_(self.at(piece, axis))
            found[axis] = bounds
        return found


def token_axis(mask: Node) -> int:
    """The one axis of a mask that has more than one place."""
    return next(a for a, size in enumerate(mask.meta["val"].shape) if size != 1)


def moved_axes(node: Node) -> Mapping[int, int] | None:
    """Where whole axes of the first operand stand in the value of a call that moves, cuts or treats rows apart.

    An axis of which the call drops or mixes places is not there. None for other calls.
    """
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    operands, rank = dialect.operands(node), source.meta["val"].ndim
    name = dialect.plain_name(node)
    if dialect.op_name(node) in _RESHAPED or name in _SQUEEZED:
        axes = reshaped(sizes_of(source.meta["val"]), sizes_of(node.meta["val"]))
        found = {} if axes is None else {j: whole_axis(axes, j) for j in range(node.meta["val"].ndim)}
        return {i: j for j, i in found.items() if i is not None}
    if name == "permute":
        return {d % rank: j for j, d in enumerate(operands[1])}
    if name in ("transpose", "swapaxes"):
        a, b = operands[1] % rank, operands[2] % rank
        return {i: b if i == a else a if i == b else i for i in range(rank)}
    if name == "expand":
        shift = node.meta["val"].ndim - rank
        return {i: i + shift for i in range(rank) if source.meta["val"].shape[i] == node.meta["val"].shape[i + shift]}
    if name in dialect.COPIES or dialect.op_name(node) in dialect.COPIES:
        return {i: i for i in range(rank)}
    if name == "linear":
        return {i: i for i in range(rank - 1)}
    if name in ("select", "slice"):
        dim, gone = operands[1] % rank, name == "select"
        return {i: i - (gone and i > dim) for i in range(rank) if i != dim}
    if name in _SMALLER and "dim" in dialect.operand_names(node):
        dims = operands[1]
        dims = range(rank) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
        gone_axes = {d % rank for d in dims}
        kept = bool(operands[2])
        return {i: i - (0 if kept else sum(d < i for d in gone_axes)) for i in range(rank) if i not in gone_axes}
    return None
