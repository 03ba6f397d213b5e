"""Orders: a sort of which the first places are read becomes a top-k, its k a constant.

Before → after::

    %1 = argsort(s, 1, True)  [b,196]                 %1 = topk(s, 137, 1, True)
    %2 = slice(%1, 1, 0, 137)                    →    %2 = getitem(%1, 1)

Where later places are read too (who is left over, in the matching of ToMe), k is the length of the axis. A sort that
was asked to be stable keeps the order of equals, which a top-k does not promise; its places are those of a key that is
unique, the number of elements that come before::

    %1 = argsort(s, stable=True, descending=True)     %1 = gt(s_j, s_i)
                                                 →    %2 = (s_j == s_i) and (j < i)
                                                      %3 = sum(%1 or %2 over j), as numbers
                                                      %4 = topk(%3, k, largest=False)[1]

Equation: the places of the k largest in descending order are the first k of the places in descending order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.writer import Writer, shape_of

aten = torch.ops.aten
SORTS = ("aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable")
LARGEST_K = 3840
"""The most that TensorRT's TopK takes (its operator reference)."""
LONGEST_STABLE = 1024
"""Elements of an axis whose order is found by comparing all pairs."""


@dataclass(frozen=True)
class Order:
    """A sort.

    Attributes:
        operand: What is sorted.
        axis: Along which axis, ≥ 0.
        descending: Largest first.
        stable: Whether equals keep their order.
        k: How many of its places are read.
        values: What reads the sorted values, as a value of its own; None if nothing does.
        places: The same of the places.
    """

    operand: Node
    axis: int
    descending: bool
    stable: bool
    k: int
    values: Node | None
    places: Node | None

    def nodes(self, sort: Node) -> tuple[Node, ...]:
        """The sort, and those readers that are rewritten with it."""
        results = [node for node in (self.values, self.places) if node is not None]
        firsts = [reader for result in results for reader in _firsts(result, self.axis, self.k)]
        return tuple(dict.fromkeys((sort, *results, *firsts)))


def find(ir: Program, node: Node) -> tuple[Node, ...] | str | None:
    """The calls of a sort that can be a top-k; why it cannot be; or None if ``node`` is no sort that is read."""
    found = order_at(node)
    return found if found is None or isinstance(found, str) else found.nodes(node)


def order_at(node: Node) -> Order | str | None:
    """What is known of a sort, or why it stays."""
    if dialect.op_name(node) not in SORTS:
        return None
    given = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
    operand: Node = given["self"]
    shape = shape_of(operand)
    if not shape:
        return None
    axis = int(given["dim"]) % len(shape)
    values, places = _results(node)
    results = [each for each in (values, places) if each is not None]
    if not results:
        return None
    if operand.meta["val"].dtype == torch.bool:
        return "it sorts true and false"
    size = shape[axis]
    if not isinstance(size, int):
        return "the length of the sorted axis depends on the input"
    k = max(_read(each, axis, size) for each in results)
    stable = bool(given.get("stable"))
    if k > LARGEST_K:
        return f"{k} places are read, more than the {LARGEST_K} that a top-k gives everywhere"
    if stable and size > LONGEST_STABLE:
        return f"a stable order of {size} elements, more than the {LONGEST_STABLE} that are compared in pairs"
    return Order(operand, axis, bool(given["descending"]), stable, k, values, places)


def _results(sort: Node) -> tuple[Node | None, Node | None]:
    """What stands for the sorted values and for the places, if it is read."""
    if "argsort" in dialect.op_name(sort):
        return None, sort if sort.users else None
    items = {user.args[1]: user for user in sort.users if user.users}
    return items.get(0), items.get(1)


def _slices(result: Node, axis: int) -> Iterator[tuple[Node, Any, Any, Any]]:
    """Slices along ``axis``, with what they begin, end and step by: numbers, or sizes of the input."""
    for user in result.users:
        if dialect.op_name(user) == "aten.slice.Tensor":
            operand, dim, start, end, step = dialect.operands(user)
            if operand is result and int(dim) % len(shape_of(result)) == axis:
                yield user, start or 0, end, step


def _read(result: Node, axis: int, size: int) -> int:
    """How many of the first elements along ``axis`` are read, ``size`` where that is not seen."""
    ends = [
        end
        for _, start, end, _ in _slices(result, axis)
        if isinstance(start, int) and isinstance(end, int) and end >= 0 and 0 <= start < size
    ]
    return min(size, max(ends)) if ends and len(ends) == len(result.users) else size


def _firsts(result: Node, axis: int, k: int) -> list[Node]:
    """Readers that take just the first ``k``."""
    return [user for user, start, end, step in _slices(result, axis) if (start, end, step) == (0, k, 1)]


def write(ir: Program, node: Node) -> str:
    """Put the top-k in place of a sort that :func:`find` found; returns what was done."""
    found = order_at(node)
    assert isinstance(found, Order)
    writer = Writer(ir, node)
    operand, axis, k = found.operand, found.axis, found.k
    if found.stable:
        picked = writer(aten.topk.default, _before_each(writer, found), k, axis, False, True)
        places = writer.item(picked, 1)
        made = {
            found.places: places,
            found.values: writer(aten.gather.default, operand, axis, places) if found.values is not None else None,
        }
    else:
        picked = writer(aten.topk.default, operand, k, axis, found.descending, True)
        made = {old: writer.item(picked, which) for which, old in enumerate((found.values, found.places))
                if old is not None}  # fmt: skip
    for old, new in made.items():
        if old is None or new is None:
            continue
        for first in _firsts(old, axis, k):
            ir.replace(first, new)
        if old.users:
            ir.replace(old, new)
    return f"{dialect.plain_name(node)} written as topk"


def _before_each(writer: Writer, found: Order) -> Node:
    """How many elements come before each, as f32: unique along the axis."""
    size = shape_of(found.operand)[found.axis]
    behind = len(shape_of(found.operand)) - found.axis - 1
    this = writer(aten.unsqueeze.default, found.operand, found.axis + 1)
    other = writer(aten.unsqueeze.default, found.operand, found.axis)
    ahead = writer(aten.gt.Tensor if found.descending else aten.lt.Tensor, other, this)
    index = torch.arange(size)
    earlier: Any = writer.stored(
        "earlier", (index[None] < index[:, None]).reshape(size, size, *(1 for _ in range(behind)))
    )
    equal = writer(aten.logical_and.default, writer(aten.eq.Tensor, other, this), earlier)
    either = writer(aten.logical_or.default, ahead, equal)
    return writer(aten.sum.dim_IntList, writer(aten._to_copy.default, either, dtype=torch.float32), [found.axis + 1])
