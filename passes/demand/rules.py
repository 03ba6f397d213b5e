"""What an operator must read for a part of its value: one rule per kind of operator, as data.

A rule gets a call and the box that is asked of its value, and gives a :class:`~vlexport.passes.demand.site.Narrowing`:
the call that computes that box (or the least one around it that it can compute) from boxes of its operands. Operators
without a rule read everything.

Here are those that work on each element, and those that mix some axes and leave the others apart. Rules of products are
in ``products``, of what moves elements in ``views``, of what picks elements in ``picks``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.demand import picks, products, views
from vlexport.passes.demand.box import Box
from vlexport.passes.demand.site import Narrowing, Read, Site, shape_of

Rule = Callable[[Site, Box], Narrowing]
_SHAPED_OTHERWISE = ("aten.glu.default", "aten.type_as.default", "aten.prelu.default")
"""Elementwise by the dialect, but an axis or an operand of theirs is not broadcast to the value."""
_BATCH_NORM_TRAINING = 5


def _elementwise(site: Site, asked: Box) -> Narrowing:
    tensors = [place for place, value in enumerate(site.operands) if shape_of(value)]
    return site.kept(asked, {place: site.broadcast(asked, place) for place in tensors})


def _norm(site: Site, asked: Box) -> Narrowing:
    """Layer and RMS norm: the last axes are mixed, the others are rows."""
    return site.moved(asked, {axis: axis for axis in range(site.rank - len(site.argument("normalized_shape")))})


def _first_axis(site: Site, asked: Box) -> Narrowing:
    return site.moved(asked, {0: 0})


def _batch_norm(site: Site, asked: Box) -> Narrowing:
    """With stored statistics: every axis is apart; scale, shift and statistics lie along axis 1."""
    if site.operands[_BATCH_NORM_TRAINING]:
        return site.whole(asked, "the batch norm uses batch statistics")
    channels = Box(tuple((0, rows) for axis, rows in asked.axes if axis == 1))
    return site.kept(asked, {0: asked, 1: channels, 2: channels, 3: channels, 4: channels})


def _other_axes(site: Site, asked: Box) -> Narrowing:
    """One or several axes of ``dim`` are mixed (softmax, roll, flip, a running sum, a gated half), the others apart."""
    dims = _dims(site, site.rank)
    return site.moved(asked, {axis: axis for axis in range(site.rank) if axis not in dims})


def _reduced(site: Site, asked: Box) -> Narrowing:
    """A mean, sum or extreme over some axes, which are kept with size 1 or go."""
    rank = len(shape_of(site.operand(0)))
    dims = _dims(site, rank)
    if site.rank == rank:
        return site.moved(asked, {axis: axis for axis in range(rank) if axis not in dims})
    left = [axis for axis in range(rank) if axis not in dims]
    return site.moved(asked, dict(enumerate(left)))


def _dims(site: Site, rank: int) -> set[int]:
    given = site.argument("dim", "dims")
    if given is None or given == []:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}


def _planes(spatial: int) -> Rule:
    """Pooling and resizing mix the last axes."""
    return lambda site, asked: site.moved(asked, {axis: axis for axis in range(site.rank - spatial)})


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: Mapping[str, Rule] = {
    **{
        name: _elementwise
        for name, row in dialect.OPS.items()
        if row.category == "elementwise" and name not in _SHAPED_OTHERWISE
    },
    **_table(_elementwise, "clone.default contiguous.default dropout.default"),
    **_table(_norm, "layer_norm.default rms_norm.default"),
    **_table(_first_axis, "group_norm.default"),
    **_table(_batch_norm, "batch_norm.default"),
    **_table(
        _other_axes,
        "softmax.int log_softmax.int _softmax.default cumsum.default glu.default roll.default flip.default",
    ),
    **_table(
        _reduced,
        "mean.dim sum.dim_IntList amax.default amin.default argmax.default argmin.default prod.dim_int "
        "logsumexp.default var.correction std.correction var.dim std.dim linalg_vector_norm.default norm.ScalarOpt_dim "
        "any.dim all.dim",
    ),
    **_table(_planes(1), "avg_pool1d.default adaptive_avg_pool1d.default max_pool1d.default"),
    **_table(
        _planes(2),
        "avg_pool2d.default adaptive_avg_pool2d.default max_pool2d.default upsample_nearest2d.vec "
        "upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_nearest2d.default upsample_bilinear2d.default "
        "upsample_bicubic2d.default _upsample_bicubic2d_aa.default _upsample_bilinear2d_aa.default tril.default "
        "triu.default",
    ),
    **products.RULES,
    **views.RULES,
    **picks.RULES,
}
"""``aten.NAME.OVERLOAD`` → its rule."""


def narrowing(site: Site, asked: Box) -> Narrowing:
    """How the part ``asked`` of a call's value is computed; as the call is, where no rule says it."""
    rule = RULES.get(dialect.op_name(site.reader))
    if rule is None or not _is_plain(site.node):
        return site.whole(asked, f"nothing is known about what {dialect.plain_name(site.node)} reads")
    if asked.drawn is not None:
        found = rule(site, asked) if rule in _APART_PER_SAMPLE else None
        if found is not None and _is_drawn_from_samples(site, found):
            return found
        found = rule(site, asked.known())
        return replace(found, reason=found.reason or site.because("the input decides which row is read, per sample"))
    return rule(site, asked)


_APART_PER_SAMPLE = (
    _elementwise, _norm, _other_axes, _reduced, *(RULES[f"aten.{name}.default"] for name in (
        "linear", "matmul", "bmm", "scaled_dot_product_attention", "permute", "unsqueeze", "reshape",
    )), RULES["aten.select.int"], RULES["aten.slice.Tensor"], RULES["aten.unbind.int"],
)  # fmt: skip
"""Rules that may be asked for one row a sample."""


def _is_drawn_from_samples(site: Site, found: Narrowing) -> bool:
    """Whether one row a sample of the value is one row a sample of some operand, or is not given at all."""
    if found.gives.drawn is None:
        return True
    reads = [read for read in found.reads if read.box.drawn is not None]
    return bool(reads) and all(_has_samples(site, read) for read in reads)


def _has_samples(site: Site, read: Read) -> bool:
    drawn, shape = read.box.drawn, shape_of(site.operand(*read.place))
    if drawn is None or drawn.batch < 0 or shape[drawn.batch] != shape_of(drawn.samples)[0]:
        return False
    return read.box.rows(drawn.axis) is None and read.box.rows(drawn.batch) is None


def _is_plain(node: Node) -> bool:
    """Whether its value is one tensor, and always the same for the same operands."""
    value: Any = node.meta.get("val")
    return hasattr(value, "shape") and not dialect.is_random(node)
