"""The one form of an attention: rank 4, one scale, one mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.attention.arrangement import Made, Tree, arranged, made_count
from vlexport.passes.attention.axes import Axes, Axis, axes_before, is_layout, leaves, product, regrouped, sizes_of
from vlexport.passes.attention.mask import mask_of
from vlexport.passes.attention.scores import Factor, RefusedError, number_of
from vlexport.passes.attention.site import Operand, Site
from vlexport.passes.attention.stored_values import StoredValues

aten = torch.ops.aten
_SCALES = ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar")
_REPEATED = "aten.repeat_interleave.self_int"
_MAX_UP = 32


@dataclass(frozen=True)
class _Sources:
    """An operand and what stands above it.

    Attributes:
        values: From the operand upwards, with axes.
        first: The first that may be read: what is below is scaled or repeated by its own call.
        scale: What the operand is scaled by below that.
    """

    values: tuple[tuple[Node, Axes], ...]
    first: int
    scale: float


def attention_tree(ir: Program, values: StoredValues, site: Site) -> Tree:
    """The calls that compute an attention in its one form.

    Raises:
        RefusedError: Where attention cannot express it.
    """
    sources = [_sources(ir, each, scaled=i < 2) for i, each in enumerate((site.query, site.key, site.value))]
    heads = _heads(site, [each.values[-1][1] for each in sources])
    rows, keys, depth, width = site.rows, site.keys, site.depth, site.width
    scores: Axes = (*heads, rows, keys)
    mask = mask_of(ir, values, site, scores)
    heads = (leaves(heads[0]), leaves(heads[1]))
    query, key, value = (
        _picked(ir, each, (*heads, *tail), site)
        for each, tail in zip(sources, ((rows, depth), (keys, depth), (keys, width)), strict=True)
    )
    for factor in site.factors:
        query, key = _scaled(ir, factor, query, key, scores, site)
    size = product(leaves(depth))
    scale = _scale(site, size, sources[0].scale * sources[1].scale)
    args: tuple[Any, ...] = (query, key, value) if mask.operand is None else (query, key, value, mask.operand)
    kwargs: list[tuple[str, Any]] = [("is_causal", True)] if mask.causal else []
    if scale is not None:
        kwargs.append(("scale", scale))
    made = Made(aten.scaled_dot_product_attention.default, args, tuple(kwargs))
    tree = arranged(ir, made, (*heads, rows, width), site.axes)
    if tree is None:
        raise RefusedError(site.root, "its shape needs a size that no input has")
    return tree


def _scale(site: Site, depth: Any, factor: float) -> float | None:
    """None for 1/√depth."""
    if not isinstance(depth, int):
        if site.scale is None and factor == 1:
            return None
        raise RefusedError(site.root, "the size of a head depends on the input")
    own = depth**-0.5 if site.scale is None else site.scale
    if own * factor <= 0:
        raise RefusedError(site.root, f"the scores are scaled by {own * factor:g}, of which exporters take the root")
    return None if math.isclose(own * factor, depth**-0.5, rel_tol=1e-14) else own * factor


def _sources(ir: Program, operand: Operand, *, scaled: bool) -> _Sources:
    node, axes = operand.node, operand.axes
    found = [(node, axes)]
    first, scale, private = 0, 1.0, len(node.users) == 1
    for _ in range(_MAX_UP):
        above: Axes | None
        if is_layout(node):
            above = axes_before(node, axes)
            source = node.all_input_nodes[0]
        elif scaled and private and (step := _scaling(ir, node)) is not None:
            source, factor = step
            above = axes
            scale *= factor
            first = len(found)
        elif dialect.op_name(node) == _REPEATED and (above := _before_repeat(node, axes)) is not None:
            source = node.all_input_nodes[0]
            first = len(found)
        else:
            break
        if above is None:
            break
        node, axes = source, above
        private = private and len(node.users) == 1
        found.append((node, axes))
    return _Sources(tuple(found), first, scale)


def _scaling(ir: Program, node: Node) -> tuple[Node, float] | None:
    """The value that a call multiplies by a number, and the number."""
    if dialect.op_name(node) not in _SCALES:
        return None
    divided = dialect.op_name(node).startswith("aten.div")
    first, second = node.args[:2]
    for value, other in ((first, second),) if divided else ((first, second), (second, first)):
        number = number_of(ir, other)
        if number and isinstance(value, Node) and sizes_of(value) == sizes_of(node):
            same = value.meta["val"].dtype == node.meta["val"].dtype
            return (value, 1 / number if divided else number) if same else None
    return None


def _before_repeat(node: Node, axes: Axes) -> Axes | None:
    """Axes of what each of which is repeated on the spot: the inner part of one axis is gone."""
    _, times, dim, _ = dialect.operands(node)
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    dim %= len(axes)
    cut = regrouped(axes[dim], (sizes_of(node.all_input_nodes[0])[dim], times))
    return (*axes[:dim], cut[0], *axes[dim + 1 :]) if cut is not None else None


def _heads(site: Site, operands: list[Axes]) -> tuple[Axis, Axis]:
    """Batch and heads: the last of the axes that are neither rows nor keys are the heads."""
    axes = [leaves(axis) for axis in site.batch]
    if not axes:
        return (), ()
    if len(axes) == 1:
        return (axes[0][:-1], axes[0][-1:]) if len(axes[0]) > 1 else (axes[0], ())
    if len(axes) == 2:
        return axes[0], axes[1]
    lacking = [set(axes[-1]) - {a for axis in own for a in leaves(axis)} for own in operands[1:]]
    inner = 2 if axes[-1] and any(lacking) else 1  # heads that share keys and values are a part of the heads
    outer, last = axes[:-inner], axes[-inner:]
    return tuple(a for axis in outer for a in axis), tuple(a for axis in last for a in axis)


def _picked(ir: Program, sources: _Sources, wanted: Axes, site: Site) -> Tree:
    """The operand in the wanted axes, with as few calls as possible."""
    best: Tree | None = None
    for node, axes in sources.values[sources.first :]:
        tree = arranged(ir, node, axes, wanted)
        if tree is not None and (best is None or made_count(tree) <= made_count(best)):
            best = tree
    if best is None:
        raise RefusedError(site.root, "its shape needs a size that no input has")
    return best


def _scaled(ir: Program, factor: Factor, query: Tree, key: Tree, scores: Axes, site: Site) -> tuple[Tree, Tree]:
    """A factor that is the same for all keys scales the query; one that is the same for all queries, the key."""
    own = {a for axis in factor.axes for a in leaves(axis)}
    batch = tuple(axis if set(leaves(axis)) & own else () for axis in scores[:2])
    for is_query, along, other in ((True, scores[2], scores[3]), (False, scores[3], scores[2])):
        if own & set(leaves(other)):
            continue
        wanted: Axes = (*batch, along if own & set(leaves(along)) else (), ())
        tree = arranged(ir, factor.node, factor.axes, wanted)
        if tree is None:
            raise RefusedError(site.root, "its shape needs a size that no input has")
        if is_query:
            return Made(aten.mul.Tensor, (query, tree)), key
        return query, Made(aten.mul.Tensor, (key, tree))
    raise RefusedError(site.root, "the scores are multiplied by a tensor that differs over queries and over keys")
