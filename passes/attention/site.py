"""A place where attention is computed: by products and a softmax, or by the operator that is attention already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.cost import node_macs
from vlexport.ir.program import Program
from vlexport.passes.attention.axes import Atom, Axes, Axis, aligned, axes_after, is_layout, leaves, sizes_of, whole
from vlexport.passes.attention.product import Product, product_of
from vlexport.passes.attention.scores import (
    Factor,
    Hidden,
    RefusedError,
    Term,
    read_scores,
    way_up,
)

ATTENTION = "aten.scaled_dot_product_attention.default"
_MAX_STEPS = 8
"""Calls below a softmax among which a product with values is looked for."""


@dataclass(frozen=True)
class Operand:
    """A value with its axes."""

    node: Node
    axes: Axes


@dataclass(frozen=True)
class Site:
    """One attention.

    Attributes:
        root: The call whose value is the result.
        nodes: All calls from the product of queries and keys to ``root``.
        query: Its axes are batch, rows and depth, in any order.
        key: Batch, keys and depth.
        value: Batch, keys and width.
        batch: Axes that are neither rows nor keys, as the scores have them.
        rows: Of the queries.
        keys: Of the keys.
        depth: Summed over by the product of queries and keys.
        width: Of the values.
        axes: Of the result.
        scale: Of the scores; None for 1/√depth.
        factors: Tensors that the scores are multiplied by.
        terms: Added to the scores.
        hidden: Overwritten scores.
        causal: Keys behind a query are hidden, both counted from the first.
    """

    root: Node
    nodes: tuple[Node, ...]
    query: Operand
    key: Operand
    value: Operand
    batch: tuple[Axis, ...]
    rows: Axis
    keys: Axis
    depth: Axis
    width: Axis
    axes: Axes
    scale: float | None
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    causal: bool = False


def site_of_softmax(ir: Program, softmax: Node) -> Site | None:
    """The attention around a softmax; None where its value meets no product.

    Raises:
        RefusedError: Where it looks like attention and is not, or cannot be said to be.
    """
    refusal = None
    try:
        down = _way_down(ir, softmax)
    except RefusedError as error:
        refusal, down = error, None
    if refusal is None and down is None:
        return None
    way = way_up(ir, softmax)
    if refusal is not None:
        raise refusal
    assert down is not None
    _require_private(ir, [*way, softmax, *down[:-1]])
    scores = read_scores(ir, way)
    after = down[-1]
    if softmax.meta["val"].dtype != scores.root.meta["val"].dtype:
        raise RefusedError(
            softmax, f"the softmax is computed in {_dtype(softmax)}, attention would in {_dtype(scores.root)}"
        )
    keys = leaves(scores.axes[int(dialect.operands(softmax)[1])])
    made = scores.product
    if keys == leaves(made.right_free):
        query, key, rows = Operand(made.left, made.left_axes), Operand(made.right, made.right_axes), made.left_free
    elif keys == leaves(made.left_free):
        query, key, rows = Operand(made.right, made.right_axes), Operand(made.left, made.left_axes), made.right_free
    else:
        raise RefusedError(softmax, "the softmax's axis is not that of the keys")
    axes: Axes | None = scores.axes
    for node in down[:-1]:
        axes = axes_after(node, axes) if axes is not None else None
    if axes is None:
        raise RefusedError(softmax, "the axes of the attention map cannot be told apart")
    values = product_of(after)
    assert values is not None
    _require_plain(values, after)
    last = down[-2] if len(down) > 1 else softmax
    value = _value(values, last, after, axes, keys, leaves(rows))
    batch = tuple(
        axis for axis in made.axes if not set(leaves(axis)) & {*leaves(made.left_free), *leaves(made.right_free)}
    )
    return Site(
        root=after, nodes=(*way, softmax, *down), query=query, key=key, value=value[0], batch=batch, rows=rows,
        keys=keys, depth=made.contracted, width=value[1], axes=values.axes, scale=scores.scale,
        factors=tuple(scores.factors),
        terms=tuple(scores.terms), hidden=tuple(scores.hidden),
    )  # fmt: skip


def site_of_attention(ir: Program, node: Node) -> Site:
    """The attention that an operator already is.

    Raises:
        RefusedError: Where it drops weights at random.
    """
    query, key, value, mask, dropout, causal, scale, grouped = dialect.operands(node)
    if dropout:
        raise RefusedError(node, "it drops weights at random")
    rank = max(len(sizes_of(each)) for each in (query, key, value))
    sizes = [(1,) * (rank - len(sizes_of(each))) + sizes_of(each) for each in (query, key, value)]
    batch: list[Axis] = []
    axes: list[list[Axis]] = [[], [], []]
    for place in range(rank - 2):
        here = [each[place] for each in sizes]
        size = next((s for s in here if s != 1), 1)
        axis = whole(size)
        if grouped and place == rank - 3 and here[1] != here[0] and here[1] != 1:
            axis = (Atom(here[1]), Atom(here[0] // here[1]))
        batch.append(axis)
        for own, each in zip(axes, here, strict=True):
            own.append(() if each == 1 else axis if each == size else axis[:1])
    rows, depth, keys, width = (whole(s) for s in (sizes[0][-2], sizes[0][-1], sizes[1][-2], sizes[2][-1]))
    operands = [
        Operand(each, (*own, *tail)[rank - len(sizes_of(each)) :])
        for each, own, tail in zip(
            (query, key, value), axes, ((rows, depth), (keys, depth), (keys, width)), strict=True
        )
    ]
    terms, hidden = [], []
    if mask is not None:
        around = aligned(mask, (*batch, rows, keys))
        if str(mask.meta["val"].dtype) == "torch.bool":
            hidden.append(Hidden(mask, around, False, float("-inf"), node))
        else:
            terms.append(Term(mask, around))
    return Site(
        root=node, nodes=(node,), query=operands[0], key=operands[1], value=operands[2], batch=tuple(batch), rows=rows,
        keys=keys, depth=depth, width=width, axes=(*batch, rows, width), scale=scale, terms=tuple(terms),
        hidden=tuple(hidden), causal=bool(causal),
    )  # fmt: skip


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _require_plain(values: Product, node: Node) -> None:
    if values.added is not None or values.alpha != 1:
        raise RefusedError(node, "the product with the values is scaled or added to by its own call")


def _value(values: Product, seen: Node, node: Node, axes: Axes, keys: Axis, rows: Axis) -> tuple[Operand, Axis]:
    """The values, once the axes of the product with them are those of the attention map; and their free axis."""
    on_left = values.left is seen
    if on_left and values.right is seen:
        raise RefusedError(node, "the attention map is multiplied by itself")
    own = values.left_axes if on_left else values.right_axes
    for bound, axis in zip(own, axes, strict=True):
        if bound:
            bound[0].parts = leaves(axis)
        if bound and not bound[0].parts:
            raise RefusedError(node, "the attention map is repeated over an axis of the values")
    if leaves(values.contracted) != leaves(keys):
        raise RefusedError(node, "the product with the values does not sum over the softmax's axis alone")
    if leaves(values.left_free if on_left else values.right_free) != rows:
        raise RefusedError(node, "the product with the values mixes another axis of the attention map")
    if on_left:
        return Operand(values.right, values.right_axes), values.right_free
    return Operand(values.left, values.left_axes), values.left_free


def _way_down(ir: Program, softmax: Node) -> list[Node] | None:
    """Calls below a softmax down to the product with the values, included; None where there is none.

    Raises:
        RefusedError: Where another call stands between, or the attention map is read elsewhere.
    """
    way: list[Node] = []
    current = softmax
    while len(way) < _MAX_STEPS:
        users = list(current.users)
        if len(users) != 1:
            if not any(_leads_to_product(ir, user, current) for user in users):
                return None
            raise _shared(ir, softmax, len(users) - 1)
        reader = users[0]
        if _is_value_product(ir, reader, current):
            return [*way, reader]
        if not is_layout(reader):
            if not _leads_to_product(ir, reader, current):
                return None
            raise RefusedError(reader, _between(reader))
        way.append(reader)
        current = reader
    return None


def _between(node: Node) -> str:
    name = dialect.plain_name(node)
    if dialect.is_cast(node):
        return "the softmax is computed in another dtype than the product with the values"
    if name in ("linear", "conv2d", "conv1d", "matmul", "einsum"):
        return f"a {name} mixes the heads between the softmax and the product with the values"
    return f"a {name} stands between the softmax and the product with the values"


def _shared(ir: Program, softmax: Node, others: int) -> RefusedError:
    macs = 0
    above: Any = softmax.args[0]
    for _ in range(_MAX_STEPS):
        if product_of(above) is not None:
            macs = node_macs(ir, above, {})
            break
        if not above.all_input_nodes:
            break
        above = above.all_input_nodes[0]
    cost = f"; computing it beside attention would cost {macs:,} multiply-accumulates more" if macs else ""
    return RefusedError(softmax, f"the attention map is used by {others} other(s){cost}")


def _is_value_product(ir: Program, node: Node, seen: Node) -> bool:
    made = product_of(node)
    if made is None:
        return False
    other = made.right if made.left is seen else made.left
    return not (ir.tensor_of(other) is not None and len(sizes_of(other)) == 2)


def _leads_to_product(ir: Program, node: Node, seen: Node) -> bool:
    """Whether a product of computed values stands at ``node`` or a few single readers below."""
    for _ in range(_MAX_STEPS):
        if node.op != "call_function":
            return False
        if _is_value_product(ir, node, seen):
            return True
        if not (is_layout(node) or _may_stand_between(node)) or len(node.users) != 1:
            return False
        seen, node = node, next(iter(node.users))
    return False


def _may_stand_between(node: Node) -> bool:
    row = dialect.info(node)
    return row is not None and (row.category in ("elementwise", "view") or row.macs is not None)


def _require_private(ir: Program, nodes: list[Node]) -> None:
    for node in nodes:
        if len(node.users) > 1:
            what = "attention map" if product_of(node) is None else "product of queries and keys"
            name = dialect.plain_name(node)
            macs = node_macs(ir, nodes[0], {})
            raise RefusedError(
                node, f"the {what} ({name}) is used by {len(node.users) - 1} other(s); computing it beside attention "
                f"would cost {macs:,} multiply-accumulates more",
            )  # fmt: skip
