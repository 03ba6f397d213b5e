"""attention_taps: what others read of the query, key and value of attention that is to become one operator.

::

    k ──────────────→ softmax(q · kᵀ) · v          a tap: all of the key or the value, in heads,
    └─→ mean, or q₀ · kᵀ for the class token              or one position of the query

Whoever computes a row of the attention once more, as a choice of tokens by the class token does, or compares keys, as
merging does, reads them beside the attention itself. An operator that hides them can still serve these readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx_ir

from vlexport.targets.onnx.layout import MOVING, Numbers, Sizes, Untraceable, moved, origin

QUERY, KEY, VALUE = range(3)
_IN_HEADS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Tap:
    """Something that others read.

    Attributes:
        read: The value that they read.
        users: Who, and as which operand.
        part: QUERY, KEY or VALUE.
        position: The one that is read of a query; 0 for what is read as a whole.
        order: Axes of (batch, heads, length, width) in the order of ``read``.
    """

    read: onnx_ir.Value
    users: tuple[tuple[onnx_ir.Node, int], ...]
    part: int
    position: int
    order: tuple[int, ...]


class NoTap(Exception):  # noqa: N818  a near miss: its text is the reason
    """Others read what the operator does not give."""


def taps(made: onnx_ir.Value, roots: Sequence[onnx_ir.Value], parts: Sequence[Numbers], sizes: Sizes) -> list[Tap]:
    """What is read by others than what ends in ``made``.

    Args:
        made: The result of the attention.
        roots: What query, key and value are moved from.
        parts: Their numbers, each (batch, heads, length, width).
        sizes: Of dims without one.

    Raises:
        NoTap: Where others read something else.
    """
    search = _Search(tuple(roots), tuple(parts), sizes)
    found: dict[onnx_ir.Value, tuple[tuple[int, int, tuple[int, ...]], list[tuple[onnx_ir.Node, int]]]] = {}
    for value, user, index in _escapes(made, roots):
        for read, reader, operand in search.leaves(value, user, index):
            found.setdefault(read, (search.place(read), []))[1].append((reader, operand))
    return [Tap(read, tuple(users), *place) for read, (place, users) in found.items()]


def _escapes(made: onnx_ir.Value, roots: Sequence[onnx_ir.Value]) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Node, int]]:
    """Values between the roots and the result, and who else reads them."""
    within, above = set[onnx_ir.Node](), [made]
    while above:
        node = above.pop().producer()
        if node is not None and node not in within:
            within.add(node)
            above += [each for each in node.inputs if each is not None and each not in roots]
    waiting = list(dict.fromkeys(roots))
    seen = set(waiting)
    while waiting:
        value = waiting.pop(0)
        if value is made:
            continue
        if value.is_graph_output():
            raise NoTap("what it is projected from is an output, too")
        for user, index in value.uses():
            if user not in within:
                yield value, user, index
                continue
            waiting += [each for each in user.outputs if each not in seen]
            seen.update(user.outputs)


@dataclass(frozen=True)
class _Search:
    roots: tuple[onnx_ir.Value, ...]
    parts: tuple[Numbers, ...]
    sizes: Sizes

    def leaves(
        self, value: onnx_ir.Value, user: onnx_ir.Node, index: int
    ) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Node, int]]:
        """A reader, or those behind it where it moves values alone and what it reads is no tap itself."""
        if self._place(value) is not None:
            yield value, user, index
        elif user.op_type in MOVING and index == 0 and not any(each.is_graph_output() for each in user.outputs):
            for made in user.outputs:
                for reader, operand in made.uses():
                    yield from self.leaves(made, reader, operand)
        else:
            raise NoTap("what it is projected from is read by others, too")

    def place(self, value: onnx_ir.Value) -> tuple[int, int, tuple[int, ...]]:
        """Part, position and order of axes of what is known to be a tap."""
        found = self._place(value)
        assert found is not None
        return found

    def _place(self, value: onnx_ir.Value) -> tuple[int, int, tuple[int, ...]] | None:
        source = origin(value)
        if source.root not in self.roots or source.factor != 1.0:
            return None
        try:
            numbers = moved(value, source.root, self.sizes)
        except Untraceable:
            return None
        for part in (KEY, VALUE):
            order = _order(numbers, self.parts[part]) if self.roots[part] is source.root else None
            if order is not None:
                return part, 0, order
        query = self.parts[QUERY]
        rows = np.flatnonzero(np.isin(query[0, 0, :, 0], numbers))
        if self.roots[QUERY] is not source.root or len(rows) != 1:
            return None
        order = _order(numbers, query[:, :, rows[0] : rows[0] + 1])
        return None if order is None else (QUERY, int(rows[0]), order)


def _order(numbers: Numbers, wanted: Numbers) -> tuple[int, ...] | None:
    """How the axes of ``wanted`` stand in ``numbers``; None where those are other elements."""
    if numbers.ndim != wanted.ndim or numbers.size != wanted.size:
        return None
    orders = (each for each in permutations(_IN_HEADS) if np.array_equal(wanted.transpose(each), numbers))
    return next(orders, None)
