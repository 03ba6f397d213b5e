"""What products must read for a part of their value: linear, matmul, einsum, attention, convolutions.

The axis along which is summed is always read whole. Rows of the value are rows of the left operand, columns are columns
of the right one; features of a linear are rows of its weight, which is stored and so becomes smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.demand.box import WHOLE, Box, Rows
from vlexport.passes.demand.site import Narrowing, Read, Site, is_one, shape_of

_QUERY, _KEY, _VALUE, _MASK, _DROP, _CAUSAL = range(6)
"""Places of attention's operands."""


def _linear(site: Site, asked: Box) -> Narrowing:
    last = site.rank - 1
    features = _axis(0, asked.rows(last))
    if len(shape_of(site.operand(1))) != 2:  # a weight of one axis: the value has no features
        return site.whole(asked)
    return site.kept(asked, {0: asked.on(range(last)), 1: features, 2: features})


def _matmul(left: int, right: int) -> Callable[[Site, Box], Narrowing]:
    """A batched product of the operands at two places; one before them is added, broadcast."""

    def rule(site: Site, asked: Box) -> Narrowing:
        row, column = site.rank - 2, site.rank - 1
        if min(len(shape_of(site.operand(place))) for place in (left, right)) < 2:
            return site.whole(asked, "one factor is a vector")
        boxes = {
            left: site.broadcast(asked.on(range(column)), left),
            right: site.broadcast(asked.on(axis for axis in range(site.rank) if axis != row), right),
        }
        if left > 0:
            boxes[0] = site.broadcast(asked, 0)
        return site.kept(asked, boxes)

    return rule


def _einsum(site: Site, asked: Box) -> Narrowing:
    terms, arrow, result = str(site.operand(0)).replace(" ", "").partition("->")
    names = terms.split(",")
    if not arrow or "." in terms or any(len(set(term)) < len(term) for term in names):
        return site.whole(asked, "the einsum names no result, or an axis twice, or leaves axes unnamed")
    rows = {result[axis]: named for axis, named in asked.axes}
    tensors: Any = site.operand(1)
    reads = []
    for place, (term, tensor) in enumerate(zip(names, tensors, strict=True)):
        sizes = shape_of(tensor)
        found = ((axis, rows[name]) for axis, name in enumerate(term) if name in rows and not is_one(sizes[axis]))
        reads.append(Read((1, place), Box(tuple(found))))
    return site.kept(asked, {}, {1: reads})


def _attention(site: Site, asked: Box) -> Narrowing:
    """Rows are queries, and rows of the mask; features are those of the values. Keys are read whole."""
    heads, row, column = site.rank - 3, site.rank - 2, site.rank - 1
    if site.operand(_DROP):
        return site.whole(asked, "the attention drops weights at random")
    axes = set(range(site.rank))
    if site.argument("enable_gqa"):
        axes -= {heads}
    seen = asked
    queries = asked.rows(row)
    mask: Any = None
    reason = ""
    if site.operand(_CAUSAL) and asked.drawn is not None and asked.drawn.axis == row:
        seen, reason = asked.known(), "the attention is causal, and the input decides which query is read"
    if site.operand(_CAUSAL) and queries is not None:
        mask = _causal(site, queries)
        if mask is None:
            axes -= {row}
            reason = "the attention is causal over a number of tokens that the input decides"
    gives = seen.on(axes)
    boxes = {
        _QUERY: site.broadcast(gives.on(range(column)), _QUERY),
        _KEY: site.broadcast(gives.on(range(row)), _KEY),
        _VALUE: site.broadcast(gives.on(axes - {row}), _VALUE),
    }
    if isinstance(site.operand(_MASK), Node):
        boxes[_MASK] = site.broadcast(gives.on(range(column)), _MASK)
    if mask is None:
        return site.kept(gives, boxes, asked=asked, reason=reason)
    sees_all = bool(mask.all())
    return site.kept(gives, boxes, {_MASK: None if sees_all else mask, _CAUSAL: False}, asked=asked, reason=reason)


def _causal(site: Site, queries: Rows) -> torch.Tensor | None:
    """The rows of the causal mask, True where a query sees a key; None where its size is not known."""
    tokens, keys = shape_of(site.operand(_QUERY))[-2], shape_of(site.operand(_KEY))[-2]
    if not isinstance(tokens, int) or not isinstance(keys, int):
        return None
    return torch.ones(tokens, keys, dtype=torch.bool).tril()[list(queries)]


def _convolution(site: Site, asked: Box) -> Narrowing:
    """Channels of the value are rows of the weight; a depthwise one reads the same channels."""
    x, weight = shape_of(site.operand(0)), shape_of(site.operand(1))
    if len(x) != len(weight):
        return site.whole(asked, "the convolution has no batch axis")
    groups = int(site.argument("groups"))
    axes = {0, 1}
    depthwise = groups == weight[0] and is_one(weight[1])
    if groups > 1 and not depthwise:
        axes = {0}
    gives = asked.on(axes)
    channels = _axis(0, gives.rows(1))
    boxes = {0: gives if depthwise and groups > 1 else gives.on({0}), 1: channels, 2: channels}
    rows = gives.rows(1)
    settings = {site.names.index("groups"): len(rows)} if groups > 1 and rows is not None else {}
    reason = "the convolution reads neighbours" if any(axis > 1 for axis, _ in asked.axes) else "it has groups"
    return site.kept(gives, boxes, settings, asked=asked, reason=reason)


def _transposed_convolution(site: Site, asked: Box) -> Narrowing:
    if len(shape_of(site.operand(0))) != len(shape_of(site.operand(1))):
        return site.whole(asked, "the convolution has no batch axis")
    grouped = int(site.argument("groups")) > 1
    gives = asked.on({0} if grouped else {0, 1})
    rows = gives.rows(1)
    boxes = {0: gives.on({0}), 1: _axis(1, rows), 2: _axis(0, rows)}
    reason = "the convolution reads neighbours" if any(axis > 1 for axis, _ in asked.axes) else "it has groups"
    return site.kept(gives, boxes, asked=asked, reason=reason)


def _axis(axis: int, rows: Rows | None) -> Box:
    return Box(((axis, rows),)) if rows is not None else WHOLE


RULES: Mapping[str, Callable[[Site, Box], Narrowing]] = {
    "aten.linear.default": _linear,
    **dict.fromkeys(("aten.matmul.default", "aten.mm.default", "aten.bmm.default"), _matmul(0, 1)),
    **dict.fromkeys(("aten.addmm.default", "aten.baddbmm.default"), _matmul(1, 2)),
    "aten.einsum.default": _einsum,
    "aten.scaled_dot_product_attention.default": _attention,
    **dict.fromkeys(dialect.CONVOLUTIONS, _convolution),
    **dict.fromkeys(dialect.TRANSPOSED_CONVOLUTIONS, _transposed_convolution),
}
"""``aten.NAME.OVERLOAD`` → its rule."""
