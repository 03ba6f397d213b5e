"""Where the token axis of a value goes through an operator, and how the operator is called for fewer tokens.

A value that holds one row a token is *tracked*: :class:`Track` says on which axis the tokens lie. A rule gets a call of
which some operands are tracked and says what becomes of the axis:

- :class:`Kept`: the call treats the tokens apart, and is called with other sizes where it names them;
- :class:`Gone`: it reads protected tokens only, or one row a sample comes out: its value stays as it was;
- :class:`Needs`: it must have every token as it was, and why.

Operators without a rule need all tokens. What one row a token looks like is read off the recorded shapes, so that no
size is guessed from its number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.layout.axis_maps import reshaped, sizes_of
from vlexport.passes.layout.axis_rules import whole_axis

ATTENTION = "aten.scaled_dot_product_attention.default"
_SHAPED_OTHERWISE = ("aten.glu.default", "aten.type_as.default", "aten.prelu.default")
_MASK, _CAUSAL = 3, 5


@dataclass(frozen=True)
class Track:
    """Where the tokens of a value lie.

    Attributes:
        axis: Not negative.
        generation: How many reductions lie above the value.
        skipped: Protected tokens at the front that the value no longer holds.
    """

    axis: int
    generation: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Call:
    """A call of which some operands are tracked.

    Attributes:
        node: The call, as recorded before anything was reduced.
        tracks: Tracked value → where its tokens lie.
        shapes: Shape of an operand before anything was reduced.
        count: A track → how many tokens such a value holds now.
        protected: Tokens at the front that are never dropped or merged.
        merging: Tokens stand for several by now, so that a plain mean over them is another one.
    """

    node: Node
    tracks: Mapping[Node, Track]
    shapes: Callable[[Node], torch.Size]
    count: Callable[[Track], int]
    protected: int
    merging: bool

    @property
    def operands(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return dialect.operands(self.node)

    @property
    def shape(self) -> torch.Size:
        """Of the value, before anything was reduced."""
        shape: torch.Size = self.node.meta["val"].shape
        return shape

    @property
    def first(self) -> Track:
        """The track of the first operand, which is tracked unless said otherwise."""
        return self.tracks[self.operands[0]]

    def tokens(self, node: Node) -> int:
        """How many tokens a tracked operand held before."""
        return int(self.shapes(node)[self.tracks[node].axis])


@dataclass(frozen=True)
class Kept:
    """The call works on fewer tokens.

    Attributes:
        tracks: Of its value, or of each of several values; None for one that holds no tokens.
        operands: All operands as it is called now; None where they stay.
    """

    tracks: Track | tuple[Track | None, ...]
    operands: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Gone:
    """The value holds no tokens, and is shaped as before."""


@dataclass(frozen=True)
class Needs:
    """The call must have every token.

    Attributes:
        reason: In words.
    """

    reason: str


Outcome = Kept | Gone | Needs
Rule = Callable[[Call], Outcome]


def _along(track: Track, axis: int) -> Track:
    return Track(axis, track.generation, track.skipped)


def _elementwise(call: Call) -> Outcome:
    rank = len(call.shape)
    found: set[Track] = set()
    for value in call.node.all_input_nodes:
        if value in call.tracks:
            track = call.tracks[value]
            found.add(_along(track, track.axis + rank - len(call.shapes(value))))
    if len(found) != 1:
        return Needs("it joins values of different tokens")
    (track,) = found
    for value in call.node.all_input_nodes:
        shape = call.shapes(value)
        axis = track.axis - (rank - len(shape))
        if value not in call.tracks and axis >= 0 and shape[axis] != 1:
            return Needs(f"it reads another value for each of the {shape[axis]} tokens")
    return Kept(track)


def _norm(call: Call) -> Outcome:
    if call.first.axis >= len(call.shape) - len(call.operands[1]):
        return Needs("it normalizes over the tokens")
    return Kept(call.first)


def _linear(call: Call) -> Outcome:
    if call.operands[0] not in call.tracks or call.first.axis == len(call.shape) - 1:
        return Needs("it mixes the tokens")
    return Kept(call.first)


def _along_dim(call: Call) -> Outcome:
    dims = call.operands[1]
    rank = len(call.shapes(call.operands[0]))
    if call.first.axis in {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}:
        return Needs("it mixes the tokens")
    return Kept(call.first)


def _mean(call: Call) -> Outcome:
    source, dims, keep = call.operands[:3]
    rank = len(call.shapes(source))
    gone = {d % rank for d in dims} if dims else set(range(rank))
    axis = call.first.axis
    if axis in gone:
        return Needs("it averages tokens that stand for several") if call.merging else Gone()
    return Kept(call.first if keep else _along(call.first, axis - sum(d < axis for d in gone)))


def _permute(call: Call) -> Outcome:
    dims = [d % len(call.shape) for d in call.operands[1]]
    return Kept(_along(call.first, dims.index(call.first.axis)))


def _unsqueeze(call: Call) -> Outcome:
    dim = call.operands[1] % len(call.shape)
    return Kept(_along(call.first, call.first.axis + (dim <= call.first.axis)))


def _reshape(call: Call) -> Outcome:
    source, sizes = call.operands[0], list(call.operands[1])
    before, after = sizes_of(source.meta["val"]), sizes_of(call.node.meta["val"])
    # the operand's recorded shape may be the reduced one by now: its size along the tokens is what it was
    before = tuple(sympy.Integer(call.tokens(source)) if i == call.first.axis else s for i, s in enumerate(before))
    axes = reshaped(before, after)
    found = [j for j in range(len(after)) if axes is not None and whole_axis(axes, j) == call.first.axis]
    if not found:
        return Needs(f"it lays the tokens out as {_shown(call.shape)}")
    if sizes[found[0]] != -1:
        sizes[found[0]] = call.count(call.first)
    return Kept(_along(call.first, found[0]), (source, sizes))


def _expand(call: Call) -> Outcome:
    source, sizes, *rest = call.operands
    axis = call.first.axis + len(sizes) - len(call.shapes(source))
    given = [*sizes]
    if given[axis] != -1:
        given[axis] = call.count(call.first)
    return Kept(_along(call.first, axis), (source, given, *rest))


def _slice(call: Call) -> Outcome:
    source, dim, start, end, step = call.operands
    track = call.first
    if dim % len(call.shape) != track.axis:
        return Kept(track)
    tokens = call.tokens(source)
    low, high, _ = slice(start, end, step).indices(tokens)
    if high + track.skipped <= call.protected:
        return Gone()
    if low + track.skipped <= call.protected and high == tokens and step == 1:
        return Kept(Track(track.axis, track.generation, track.skipped + low), (source, dim, low, _TO_THE_END, 1))
    return Needs(f"it reads tokens {low} to {high} of {tokens}")


def _select(call: Call) -> Outcome:
    source, dim, row = call.operands
    track = call.first
    if dim % len(call.shapes(source)) != track.axis:
        return Kept(_along(track, track.axis - (dim % len(call.shapes(source)) < track.axis)))
    row %= call.tokens(source)
    return Gone() if row + track.skipped < call.protected else Needs(f"it reads token {row}")


def _split(call: Call) -> Outcome:
    source, sizes, dim = call.operands
    track = call.first
    values = call.node.meta["val"]
    if dim % values[0].ndim != track.axis:
        return Kept((track,) * len(values))
    if not isinstance(sizes, (list, tuple)) or sum(sizes[:-1]) + track.skipped > call.protected:
        return Needs("it cuts between tokens")
    last = Track(track.axis, track.generation, track.skipped + sum(sizes[:-1]))
    return Kept((*[None] * (len(sizes) - 1), last), (source, [*sizes[:-1], call.count(last)], dim))


def _unbind(call: Call) -> Outcome:
    source, dim = call.operands
    dim %= len(call.shapes(source))
    if dim == call.first.axis:
        return Needs("it takes the tokens apart")
    return Kept((_along(call.first, call.first.axis - (dim < call.first.axis)),) * len(call.node.meta["val"]))


def _concat(call: Call) -> Outcome:
    values = call.operands[0]
    found = {call.tracks.get(value) for value in values}
    (track, *others) = found
    if others or track is None:
        return Needs("it joins values of different tokens")
    if call.operands[1] % len(call.shape) == track.axis:
        return Needs("it puts tokens behind tokens")
    return Kept(track)


def _matmul(call: Call) -> Outcome:
    left, right = call.operands[:2]
    rank = len(call.shape)
    if right in call.tracks or left not in call.tracks or rank != len(call.shapes(left)):
        return Needs("it multiplies tokens with tokens, and is no attention that is known")
    return Needs("it mixes the tokens") if call.first.axis == rank - 1 else Kept(call.first)


def _attention(call: Call) -> Outcome:
    query, key, value, mask = call.operands[:4]
    rank = len(call.shape)
    if call.operands[_CAUSAL]:
        return Needs("its attention is causal")
    if mask is not None:
        return Needs("its attention has a mask, or a bias for each pair of tokens")
    tracks = [call.tracks.get(each) for each in (query, key, value)]
    if tracks[1] is None or tracks[1] != tracks[2] or tracks[1].axis != rank - 2:
        return Needs("its keys and values are not those of the same tokens")
    if tracks[0] is None:
        return Gone()
    return Kept(tracks[0]) if tracks[0] == tracks[1] else Needs("it asks for other tokens than it attends to")


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: dict[str, Rule] = {
    **{
        name: _elementwise
        for name, row in dialect.OPS.items()
        if row.category == "elementwise" and name not in _SHAPED_OTHERWISE
    },
    **_table(_norm, "layer_norm.default rms_norm.default"),
    **_table(_linear, "linear.default"),
    **_table(_along_dim, "softmax.int log_softmax.int"),
    **_table(_mean, "mean.dim"),
    **_table(_permute, "permute.default"),
    **_table(_unsqueeze, "unsqueeze.default"),
    **_table(_reshape, "reshape.default"),
    **_table(_expand, "expand.default"),
    **_table(_slice, "slice.Tensor"),
    **_table(_select, "select.int"),
    **_table(_split, "split_with_sizes.default split.Tensor chunk.default"),
    **_table(_unbind, "unbind.int"),
    **_table(_concat, "cat.default"),
    **_table(_matmul, "matmul.default"),
    ATTENTION: _attention,
}
"""``aten.NAME.OVERLOAD`` → its rule."""
_TO_THE_END = torch.iinfo(torch.int64).max


def outcome(call: Call) -> Outcome:
    """What becomes of the token axis in a call that reads at least one tracked value."""
    rule = RULES.get(dialect.op_name(call.node))
    if rule is None:
        return Needs("it needs its tokens as they were")
    return rule(call)


def is_item(node: Node) -> bool:
    """Whether a node takes one of several values."""
    return node.target is operator.getitem


def _shown(shape: Sequence[Any]) -> str:
    return f"[{','.join(map(str, shape))}]"
