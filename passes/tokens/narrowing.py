"""Values of which only the rows of live tokens are computed, where a dense mask leaves the others out.

A dense mask leaves every token in its place, so a value may be there in two lengths: *wide*, with the rows of all
tokens, and *narrow*, with one slot for each of the K that its mask keeps. Where both meet, the wide one is gathered, or
the narrow one is widened: in the rows left out it holds a number that :class:`LeftOut` knows. What holds anything there
stays narrow, and is refused where all its rows are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.tokens.intervals import ANY
from vlexport.passes.tokens.left_out import LeftOut, token_axis
from vlexport.passes.tokens.pick_rules import picked
from vlexport.passes.tokens.rebuild import Rebuild, aten
from vlexport.passes.tokens.survivors import selected
from vlexport.passes.tokens.values import CannotFreeze, Slots, Value

_APART = (
    "linear", "layer_norm", "rms_norm", "permute", "transpose", "unsqueeze", "expand", "squeeze", "reshape", "view",
    "flatten", "unflatten", "_unsafe_view", "zeros_like", "ones_like", "full_like", "select",
)  # fmt: skip
"""Calls of one operand, or of stored others, whose rules keep slots, or refuse."""
READ = "it reads rows of tokens that a mask leaves out"


@dataclass(frozen=True)
class Narrow:
    """The slots of one mask.

    Attributes:
        root: The call that makes the mask.
        slots: One place for each token that it keeps.
        above: Those of the mask before; None where that is the whole axis.
        index: int64[B, K]: which places of the axis above they are.
        live: bool[B, N]: which places of the axis above have a slot.
        left_out: What values hold in the rows without one.
        depth: How many masks lie above.
    """

    root: Node
    slots: Slots
    above: Narrow | None
    index: Node
    live: Node
    left_out: LeftOut
    depth: int


class Narrowing:
    """The dense masks of a rebuild, each inside the one before.

    Args:
        build: The rebuild.
        by_score: Where more than K tokens are live, let the best stay; else the first.
    """

    def __init__(self, build: Rebuild, *, by_score: bool) -> None:
        self.build, self.by_score = build, by_score
        self._all: dict[Slots, Narrow] = {}
        self._last: Narrow | None = None

    # -- beginning -----------------------------------------------------------------------------------------------

    def begin(self, root: Node, left_out: LeftOut, lead: int) -> Value:
        """The mask itself, narrow: what is computed with it is narrow from here on.

        Args:
            root: The call of the old Program that makes it; its value is there.
            left_out: By it.
            lead: So many tokens at the front are always live.

        Raises:
            CannotFreeze: Where it may keep a token that an earlier mask left out.
        """
        build, above, axis = self.build, self._last, token_axis(root)
        value: Value = build.values[root]
        if above is not None:
            if above.root.meta["val"].numel() != root.meta["val"].numel():
                raise CannotFreeze("it is a mask over other tokens than the one before")
            if above.left_out.at(root, axis).constant != 0.0:
                raise CannotFreeze("its mask may keep a token that an earlier one left out")
            value = self.narrowed(value, axis, above)

        def beside(score: Value) -> Value:
            return score if above is None else self.narrowed(score, axis, above)

        chosen = selected(build, root, value, by_score=self.by_score, beside=beside)
        slots = replace(chosen.slots, lead=min(lead, chosen.slots.size))
        depth = 0 if above is None else above.depth + 1
        self._last = Narrow(root, slots, above, chosen.index, self._kept(chosen.live, slots), left_out, depth)
        self._all[slots] = self._last
        return self.narrowed(value, axis, self._last)

    def _kept(self, live: Node, slots: Slots) -> Node:
        """Those of the live places that find a slot."""
        return self.build.call(
            aten.logical_and.default, live, self.build.call(aten.lt.Scalar, self._rank(live), slots.size)
        )

    def _rank(self, live: Node) -> Node:
        """int64[B, N]: which slot a live place has."""
        whole = self.build.call(aten._to_copy.default, live, torch.int64)
        return self.build.call(aten.sub.Scalar, self.build.call(aten.cumsum.default, whole, 1), 1)

    # -- from one length to the other ------------------------------------------------------------------------------

    def of(self, value: Any, axis: int) -> Narrow | None:
        """The mask whose slots lie on an axis."""
        return self._all.get(value.slots[axis]) if isinstance(value, Value) and axis in value.slots else None

    def axes(self, value: Any) -> list[int]:
        """Axes that hold slots of a dense mask."""
        return [a for a in value.slots if self.of(value, a) is not None] if isinstance(value, Value) else []

    def narrowed(self, value: Value, axis: int, to: Narrow) -> Value:
        """The rows of the tokens that a mask keeps."""
        here = self.of(value, axis)
        if here is to:
            return value
        if axis in value.slots and (here is None or here.depth > to.depth):
            raise CannotFreeze("tokens of two selections meet on one axis")
        index, step = to.index, to.above
        while step is not here:
            assert step is not None
            index = self.build.call(aten.gather.default, step.index, 1, index, False)
            step = step.above
        return replace(picked(self.build, value, axis, index, to.slots), old=value.old)

    def widened(self, node: Node, value: Value, axis: int, to: Narrow | None = None) -> Value:
        """All rows that the axis had at the mask ``to``; those without a slot hold the number that is known of them.

        Raises:
            CannotFreeze: Where no number is known.
        """
        here = self.of(value, axis)
        assert here is not None
        if here is to:
            return value
        fill = here.left_out.at(node, axis).constant
        if fill is None:
            raise CannotFreeze(READ)
        build = self.build
        place, live, step = self._clamped(here), here.live, here.above
        while step is not to:
            assert step is not None
            back = self._clamped(step)
            place = build.call(aten.gather.default, place, 1, back, False)
            live = build.call(
                aten.logical_and.default, step.live, build.call(aten.gather.default, live, 1, back, False)
            )
            step = step.above
        above = None if to is None else to.slots
        wide = picked(build, value, axis, place, above)
        wide = replace(wide, old=value.old)
        size = int(place.meta["val"].shape[1])
        rows = replace(wide, slots={**wide.slots, axis: Slots(size, live, 0, compact=False)})
        gone = build.call(aten.logical_not.default, build.valid_on(rows, axis))
        return replace(wide, node=build.call(aten.masked_fill.Scalar, wide.node, gone, _typed(wide.node, fill)))

    def _clamped(self, narrow: Narrow) -> Node:
        rank = self._rank(narrow.live)
        return self.build.call(aten.clamp.default, rank, 0, narrow.slots.size - 1)

    # -- operands of a call ----------------------------------------------------------------------------------------

    def meets(self, given: Sequence[Any]) -> bool:
        """Whether a dense mask is among the operands of a call."""
        return any(self.axes(v) for each in given for v in (each if isinstance(each, list) else [each]))

    def conformed(self, node: Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operands of a call in lengths that its rule takes.

        Raises:
            CannotFreeze: Where it reads rows of which nothing is known.
        """
        name, row = dialect.plain_name(node), dialect.info(node)
        if name == "scaled_dot_product_attention":
            return self._attention(node, given)
        if name in ("matmul", "bmm"):
            return self._matmul(node, given)
        if name in ("softmax", "_softmax"):
            return self._softmax(node, given)
        if name == "cat" and not any(given[1] % v.rank in v.slots for v in given[0]):
            return (self._aligned(node, list(given[0]), _operands(node)), given[1])
        if row is not None and row.category == "elementwise":
            places = [i for i, each in enumerate(given) if isinstance(each, Value)]
            nodes: list[Any] = [dialect.operands(node)[i] for i in places]
            made = dict(zip(places, self._aligned(node, [given[i] for i in places], nodes), strict=True))
            return tuple(made.get(i, each) for i, each in enumerate(given))
        if name in _APART or self._treats_apart(node, given):
            return given
        return self.all_rows(node, given)

    def all_rows(self, node: Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Every operand wide."""

        def wide(operand: Any, value: Any) -> Any:
            if isinstance(value, list):
                return [wide(o, v) for o, v in zip(operand, value, strict=True)]
            for axis in self.axes(value):
                value = self.widened(operand, value, axis)
            return value

        return tuple(wide(o, v) for o, v in zip(dialect.operands(node), given, strict=True))

    def result(self, node: Node, value: Any) -> Any:
        """An output, with all its rows."""
        for axis in self.axes(value):
            value = self.widened(node, value, axis)
        return value

    def _treats_apart(self, node: Node, given: tuple[Any, ...]) -> bool:
        """Sums of what is 0 where tokens are left out, cuts at the front, and calls along another axis."""
        names = dialect.operand_names(node)
        if "dim" not in names or not isinstance(given[0], Value):
            return False
        dims = given[names.index("dim")]
        dims = list(range(given[0].rank)) if dims is None or dims == [] else dims
        rank = given[0].rank
        mixed = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])} & set(self.axes(given[0]))
        if not mixed:
            return True
        source: Any = dialect.operands(node)[0]
        if dialect.plain_name(node) == "sum":
            return all(self._held(given[0], a).left_out.at(source, a).constant == 0.0 for a in mixed)
        if dialect.plain_name(node) == "slice":
            _, dim, start, end, step = given
            front = isinstance(end, int) and 0 <= end <= given[0].slots[dim % rank].lead
            return front and (start or 0) >= 0 and step == 1
        return False

    def _held(self, value: Value, axis: int) -> Narrow:
        found = self.of(value, axis)
        assert found is not None
        return found

    def _aligned(self, node: Node, values: Sequence[Value], operands: Sequence[Node], *, tail: int = 0) -> list[Value]:
        """Operands that broadcast against each other, of one length on each axis; the last ``tail`` do not."""
        found = list(values)
        rank = len(node.meta["val"].shape)
        for axis in range(rank - tail):
            places = [i for i, v in enumerate(found) if axis - rank + v.rank >= 0 and _is_long(v, axis - rank + v.rank)]
            at = {i: axis - rank + found[i].rank for i in places}
            while True:
                held = {i: self.of(found[i], at[i]) for i in places}
                levels = sorted({-1 if h is None else h.depth for h in held.values()})
                if len(levels) < 2:
                    break
                narrow = next(h for h in held.values() if h is not None and h.depth == levels[-1])
                low = [i for i in places if held[i] is narrow]
                known = all(narrow.left_out.at(operands[i], at[i]).constant is not None for i in low)
                if narrow.left_out.at(node, axis).constant is None and known:
                    above = next(h for h in held.values() if (-1 if h is None else h.depth) == levels[-2])
                    for i in low:
                        found[i] = self.widened(operands[i], found[i], at[i], above)
                else:
                    for i in places:
                        found[i] = self.narrowed(found[i], at[i], narrow)
        return found

    def _together(self, pairs: Sequence[tuple[Value, int]]) -> tuple[list[Value], Narrow | None]:
        """Values whose axes name the same tokens, all with the rows of the narrowest."""
        held = [h for v, a in pairs if (h := self.of(v, a)) is not None]
        if not held:
            return [v for v, _ in pairs], None
        narrow = max(held, key=lambda h: h.depth)
        return [self.narrowed(v, a, narrow) for v, a in pairs], narrow

    def _softmax(self, node: Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        axis, source = given[1] % given[0].rank, dialect.operands(node)[0]
        narrow = self.of(given[0], axis)
        if narrow is None:
            return given
        if not narrow.left_out.at(source, axis).weightless:
            raise CannotFreeze("its softmax gives weight to tokens that a mask leaves out")
        scores = self._hidden(source, given[0], axis, narrow)
        rows = [held for a in scores.slots if a != axis and (held := self.of(scores, a)) is not None]
        self._require_live_key(source, axis, narrow, rows)
        return scores, *given[1:]

    def _hidden(self, source: Node, scores: Value, axis: int, narrow: Narrow) -> Value:
        """Scores, or what is added to them, without the rows in which no key at all is live: all would have weight."""
        for row, bounds in narrow.left_out.known(source).items():
            if row is not None and row != axis and bounds.weightless and _is_long(scores, row):
                scores = self.narrowed(scores, row, narrow)
        return scores

    def _require_live_key(self, source: Node, axis: int, narrow: Narrow, rows: Sequence[Narrow]) -> None:
        """Refuse where a sample of which the mask keeps nothing may attend to all that it left out.

        Args:
            source: The scores, or what is added to them.
            axis: That of the keys.
            narrow: The mask of the keys.
            rows: Masks of the queries: a query that is live is a live key.
        """
        never = narrow.left_out.at(source, axis).high == -math.inf  # it gives NaN then, and the model refuses it
        if not (never or narrow.slots.lead or any(each.depth >= narrow.depth for each in rows)):
            raise CannotFreeze("a sample of which the mask keeps no token attends to all of them")

    def _matmul(self, node: Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        operands = dialect.operands(node)
        left, right = self._aligned(node, given, operands, tail=2)
        inner, outer = left.rank - 1, max(right.rank - 2, 0)
        (left, right), narrow = self._together([(left, inner), (right, outer)])
        if narrow is not None:
            facts = (narrow.left_out.at(operands[0], inner), narrow.left_out.at(operands[1], outer))
            if all(each.constant != 0.0 for each in facts):
                raise CannotFreeze("its product sums over tokens that a mask leaves out")
        return left, right

    def _attention(self, node: Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, mask, *rest = given
        query, key, value = self._aligned(node, (query, key, value), dialect.operands(node)[:3], tail=2)
        pairs = [(key, key.rank - 2), (value, value.rank - 2)]
        masked = mask is not None and _is_long(mask, mask.rank - 1)
        (key, value, *found), narrow = self._together([*pairs, *([(mask, mask.rank - 1)] if masked else [])])
        mask = found[0] if found else mask
        if narrow is not None:
            bias, axis = dialect.operands(node)[3], mask.rank - 1 if masked else 0
            bounds = narrow.left_out.at(bias, axis) if masked else ANY
            exact = masked and mask.node.meta["val"].dtype is torch.bool
            if not (bounds.constant == 0.0 if exact else bounds.weightless):
                raise CannotFreeze("its attention gives weight to tokens that a mask leaves out")
            mask = mask if exact else self._hidden(bias, mask, axis, narrow)
        if mask is not None and mask.rank > 1 and _is_long(mask, mask.rank - 2):
            (query, mask), _ = self._together([(query, query.rank - 2), (mask, mask.rank - 2)])
        if narrow is not None and not exact:
            held = self.of(query, query.rank - 2)
            self._require_live_key(bias, axis, narrow, [] if held is None else [held])
        return query, key, value, mask, *rest


def _operands(node: Node) -> Sequence[Node]:
    found: Sequence[Node] = dialect.operands(node)[0]
    return found


def _is_long(value: Value, axis: int) -> bool:
    """Whether an axis has more than one place."""
    return axis in value.slots or value.old[axis] != 1


def _typed(node: Node, fill: float) -> float | bool | int:
    dtype = node.meta["val"].dtype
    if dtype is torch.bool:
        return bool(fill)
    return fill if dtype.is_floating_point else int(fill)
