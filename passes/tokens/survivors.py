"""Which tokens survive a selection: the K that a mask keeps, as a top-k by a key that no two tokens share.

``key = live·N − index`` is exact in float32 and has no ties, so every runtime sorts alike: live tokens first, in the
order they had, then the others. Where there are more than K and the model compares a score to make its mask, those with
the highest scores stay (equal scores: the earlier token); without a score the first K stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.rebuild import Rebuild, aten
from vlexport.passes.tokens.values import HIDDEN, CannotFreeze, Slots, Value

MAX_PLACES = 3840
"""Most that a runtime's top-k takes (TensorRT)."""
_SAME_TOKENS = (
    "aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.ravel.default", "aten.select.int",
    "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default", "aten.slice.Tensor",
)  # fmt: skip
_HIGH = ("aten.gt.Scalar", "aten.ge.Scalar", "aten.gt.Tensor", "aten.ge.Tensor")
_LOW = ("aten.lt.Scalar", "aten.le.Scalar", "aten.lt.Tensor", "aten.le.Tensor")


@dataclass(frozen=True)
class Selection:
    """What a mask keeps.

    Attributes:
        index: int64[B, K]: places of the tokens on their axis; a place that is not live repeats the first one.
        slots: Which are live.
        tokens: N, how many there were.
        live: bool[B, N]: which of them the mask keeps; where it keeps more than K, the first K of these stay.
    """

    index: Node
    slots: Slots
    tokens: int
    live: Node


def root_of(mask: Node) -> Node:
    """The call that decides: above views that keep every token, and casts of what is true or false."""
    node = mask
    while node.op == "call_function":
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return node
        cast = dialect.is_cast(node) and source.meta["val"].dtype is torch.bool
        same = dialect.op_name(node) in _SAME_TOKENS and _count(source) == _count(node)
        if not (cast or same):
            return node
        node = source
    return node


def _count(node: Node) -> Any:
    size = node.meta["val"].numel()
    return size.node.expr if isinstance(size, torch.SymInt) else size


def score_of(mask: Node) -> tuple[Node, bool] | None:
    """What a mask compares with a threshold, and whether high values stay; None where it does something else."""
    name = dialect.op_name(mask)
    if name not in (*_HIGH, *_LOW):
        return None
    score, bound = mask.args[0], mask.args[1]
    if not isinstance(score, Node) or _count(score) != _count(mask) or not score.meta["val"].is_floating_point():
        return None
    if isinstance(bound, Node) and isinstance(bound.meta["val"], torch.Tensor) and bound.meta["val"].numel() != 1:
        return None
    return score, name in _HIGH


def selection(build: Rebuild, mask: Node, *, by_score: bool = True) -> Selection:
    """The tokens that the mask of a selection keeps; the same for every selection by the same mask.

    Raises:
        CannotFreeze: Where the mask does not depend on the input, or lies over more than one axis of tokens.
    """
    root = root_of(mask)
    if (root, "mask") in build.selections:
        found: Selection = build.selections[root, "mask"]
        return found
    value = build.values.get(root)
    if not isinstance(value, Value) or value.batch is None:
        raise CannotFreeze("its mask does not depend on the input")
    if root not in build.places:
        raise CannotFreeze("nothing was counted for its mask")
    found = selected(build, root, value, by_score=by_score)
    build.selections[root, "mask"] = found
    return found


def selected(
    build: Rebuild, root: Node, value: Value, *, by_score: bool, beside: Callable[[Value], Value] = lambda score: score
) -> Selection:
    """The tokens that a mask keeps.

    Args:
        build: The rebuild.
        root: The call of the old Program that makes the mask.
        value: What it is now.
        by_score: Where there are more than K, let those of the best score stay.
        beside: Gives the score the length that ``value`` has.

    Raises:
        CannotFreeze: As :func:`selection`.
    """
    flat, before = _row(build, value)
    tokens = int(flat.meta["val"].shape[1])
    places = min(build.places[root], tokens)
    if places > MAX_PLACES:
        raise CannotFreeze(f"{places} tokens are kept, and top-k takes at most {MAX_PLACES} on every target")
    if flat.meta["val"].dtype is not torch.bool:
        flat = build.call(aten.ne.Scalar, flat, 0)
    if before is not None:
        flat = build.call(aten.logical_and.default, flat, before.valid)
    count = build.call(aten.sum.dim_IntList, flat, [1], True, torch.int64)
    scored = score_of(root) if by_score and places < tokens else None
    if scored is not None:
        scores, _ = _row(build, beside(build.values[scored[0]]))
        flat = _best(build, flat, scores, places, high=scored[1])
    over = build.call(aten.clamp_min.default, build.call(aten.sub.Scalar, count, places), 0)
    build.truncated.append(over)
    return _chosen(build, flat, places, tokens)


def _row(build: Rebuild, value: Value) -> tuple[Node, Slots | None]:
    """A value as ``[B, N]``, and the slots that its tokens had already."""
    counted = list(value.slots.items())
    hidden = build.hidden(value)
    axes = [size for size in hidden.sizes if size != 1]
    if counted and (len(counted) > 1 or max(hidden.sizes) != counted[0][1].size or len(axes) > 1):
        raise CannotFreeze("its mask lies over more than the axis of the tokens")
    tokens = 1
    for size in axes:
        tokens *= size
    node = hidden.node if hidden.rank == 1 else build.reshaped(hidden.node, [tokens])
    return node, counted[0][1] if counted else None


def _best(build: Rebuild, live: Node, scores: Node, places: int, *, high: bool) -> Node:
    """Of the live tokens those of which fewer than ``places`` live ones are better: bool[B, N].

    ``better[i, j]``: token j comes before token i, by its score or, when those are equal, by its place.
    """
    tokens = int(live.meta["val"].shape[1])
    mine, theirs = build.reshaped(scores, [tokens, 1]), build.reshaped(scores, [1, tokens])
    order = build.stored("token_order", torch.arange(tokens, dtype=torch.float32))
    across, down = (build.call(aten.unsqueeze.default, order, axis) for axis in (0, 1))
    earlier = build.call(aten.lt.Tensor, across, down)
    better = build.call(aten.gt.Tensor if high else aten.lt.Tensor, theirs, mine)
    tied = build.call(aten.logical_and.default, build.call(aten.eq.Tensor, theirs, mine), earlier)
    ahead = build.call(aten.logical_or.default, better, tied)
    ahead = build.call(aten.logical_and.default, ahead, build.reshaped(live, [1, tokens]))
    rank = build.call(aten.sum.dim_IntList, ahead, [2], False, torch.int64)
    return build.call(aten.logical_and.default, live, build.call(aten.lt.Scalar, rank, places))


def _chosen(build: Rebuild, live: Node, places: int, tokens: int) -> Selection:
    """The top-k. With no live token at all, the first one stands in: a finite answer, and no right one."""
    order = build.stored("token_order", torch.arange(tokens, dtype=torch.float32))
    weight = build.call(aten.mul.Scalar, build.call(aten._to_copy.default, live, torch.float32), float(tokens))
    key = build.call(aten.sub.Tensor, weight, order)
    pair = build.call(aten.topk.default, key, places, 1, True, True)
    taken = build.call(operator.getitem, pair, 0)
    index = build.call(operator.getitem, pair, 1)
    first = build.stored("first_place", torch.arange(places) == 0)
    valid = build.call(aten.logical_or.default, build.call(aten.gt.Scalar, taken, 0.0), first)
    head = build.call(aten.slice.Tensor, index, 1, 0, 1, 1)
    index = build.call(aten.where.self, valid, index, head)
    return Selection(index, Slots(places, valid, lead=1, compact=True), tokens, live)


def coordinates(build: Rebuild, mask: Node, *, by_score: bool) -> Value:
    """What ``nonzero`` gives of a mask that has one axis of tokens: ``[K, axes of the mask]``, in hidden form.

    Raises:
        CannotFreeze: For a mask over several axes.
    """
    chosen = selection(build, mask, by_score=by_score)
    shape = mask.meta["val"].shape
    wide = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt) or size != 1] or [len(shape) - 1]
    if len(wide) != 1:
        raise CannotFreeze("it names tokens by their places on several axes")
    column = build.reshaped(chosen.index, [chosen.slots.size, 1])
    if len(shape) > 1:
        zero = build.call(aten.mul.Scalar, column, 0)
        column = build.call(aten.cat.default, [column if a == wide[0] else zero for a in range(len(shape))], 2)
    return Value(column, (None, len(shape)), HIDDEN, {0: chosen.slots}, index=True)
