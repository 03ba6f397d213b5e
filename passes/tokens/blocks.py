"""The blocks of an encoder: attention over one residual stream of tokens, found by propagation.

A block is an attention whose result is added to the stream that its queries, keys and values come from::

    stream ─ norm ─ q, k, v ─ attention ─ projection ─(scale)─ + ─ …
       └───────────────────────────────────────────────────────┘

Whether the stream's tokens reach the attention one by one, and the next block, is what the rules of ``tokens/rules``
say; which tokens at its front are stored (class, distillation, register) is read off where the stream begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.base import NearMiss
from vlexport.passes.tokens.rules import ATTENTION, Call, Kept, Needs, Track, is_item, outcome

ADD = "aten.add.Tensor"
PATTERN = "attention over a residual stream of tokens"
_STREAM_RANK = 3
_ON_THE_WAY = (
    "aten.permute.default", "aten.reshape.default", "aten.linear.default", "aten.mul.Tensor", "aten.layer_norm.default",
    "aten.rms_norm.default", "aten._to_copy.default", "aten.add.Tensor",
)  # fmt: skip
_SPREAD = ("aten.expand.default", "aten.repeat.default", "aten._to_copy.default", "aten.unsqueeze.default",
           "aten.reshape.default")  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        number: As papers count, from 1.
        attention: The call.
        stream: What it reads.
        joined: The stream with the attention's result added.
    """

    number: int
    attention: Node
    stream: Node
    joined: Node


@dataclass(frozen=True)
class Encoder:
    """Blocks over one stream.

    Attributes:
        blocks: In order.
        tokens: How many there are, protected ones among them.
        protected: Stored tokens at the front: class, distillation, registers.
        end: The stream behind the last block.
    """

    blocks: tuple[Block, ...]
    tokens: int
    protected: int
    end: Node


def flow(program: Program, start: Node, protected: int) -> tuple[dict[Node, Track], dict[Node, Needs]]:
    """Where the tokens of ``start``, which lie on its axis 1, go while nothing is reduced.

    Returns:
        Tracked values, and the calls that need all tokens.
    """
    tracks: dict[Node, Track] = {start: Track(1)}
    stops: dict[Node, Needs] = {}
    pieces: dict[Node, tuple[Track | None, ...]] = {}
    tokens = int(start.meta["val"].shape[1])
    behind = False
    for node in program.graph.nodes:
        behind = behind or node is start
        if not behind or node is start or node.op != "call_function":
            continue
        if is_item(node):
            found = pieces.get(node.args[0], ())
            if found and found[node.args[1]] is not None:
                tracks[node] = found[node.args[1]]
            continue
        if not any(value in tracks for value in node.all_input_nodes):
            continue
        result = outcome(_unreduced(node, tracks, protected, tokens))
        if isinstance(result, Needs):
            stops[node] = result
        elif isinstance(result, Kept):
            if isinstance(result.tracks, tuple):
                pieces[node] = result.tracks
            else:
                tracks[node] = result.tracks
    return tracks, stops


def _unreduced(node: Node, tracks: Mapping[Node, Track], protected: int, tokens: int) -> Call:
    def shape(value: Node) -> torch.Size:
        found: torch.Size = value.meta["val"].shape
        return found

    return Call(node, tracks, shape, lambda track: tokens - track.skipped, protected, merging=False)


def find_encoder(program: Program) -> tuple[Encoder | None, list[NearMiss]]:
    """The longest chain of blocks, and why other attentions are none of it."""
    misses: list[NearMiss] = []
    candidates: list[tuple[Node, Node, Node]] = []
    for attention in program.calls(ATTENTION):
        found = _residual(attention)
        if isinstance(found, str):
            misses.append(NearMiss(PATTERN, attention, found))
        else:
            candidates.append((attention, *found))
    best: Encoder | None = None
    left = candidates
    while left:
        encoder, reason = _chain(program, left)
        if encoder is None:
            misses.append(NearMiss(PATTERN, left[0][0], reason))
            left = left[1:]
            continue
        mine = {block.attention for block in encoder.blocks}
        left = [each for each in left if each[0] not in mine]
        shorter = encoder
        if best is None or len(encoder.blocks) > len(best.blocks):
            best, shorter = encoder, best
        if shorter is not None:
            why = "it belongs to another, shorter encoder"
            misses += [NearMiss(PATTERN, block.attention, why) for block in shorter.blocks]
    return best, misses


def _residual(attention: Node) -> tuple[Node, Node] | str:
    """The stream and where the attention's result is added to it, or why there is none."""
    node = attention
    while True:
        users = list(node.users)
        if len(users) != 1:
            return f"its result is read by {len(users)}, and not added to a stream"
        (user,) = users
        others = [each for each in user.all_input_nodes if each is not node and each.op != "get_attr"]
        if dialect.op_name(user) == ADD and others:
            if len(others[0].meta["val"].shape) != _STREAM_RANK:
                return "its stream is no sequence of tokens"
            return others[0], user
        if dialect.op_name(user) not in _ON_THE_WAY:
            return f"its result goes through {dialect.plain_name(user)}, and is not added to a stream"
        node = user


def _chain(program: Program, candidates: list[tuple[Node, Node, Node]]) -> tuple[Encoder | None, str]:
    """The encoder that begins with the first candidate, or why there is none."""
    _, start, _ = candidates[0]
    tokens = start.meta["val"].shape[1]
    if isinstance(tokens, torch.SymInt):
        return None, "how many tokens there are depends on the input"
    protected = _protected(start)
    if isinstance(protected, str):
        return None, protected
    tracks, stops = flow(program, start, protected)
    blocks: list[Block] = []
    reason = ""
    for attention, stream, joined in candidates:
        if stream not in tracks:
            continue
        reason = _why_not(attention, stream, joined, tracks, stops)
        if reason:
            break
        blocks.append(Block(len(blocks) + 1, attention, stream, joined))
    if not blocks:
        return None, reason or "its queries, keys and values do not come from its stream"
    return Encoder(tuple(blocks), int(tokens), protected, _end(blocks[-1].joined, tracks)), ""


def _why_not(
    attention: Node, stream: Node, joined: Node, tracks: Mapping[Node, Track], stops: Mapping[Node, Needs]
) -> str:
    if attention in tracks and joined in tracks:
        return ""
    above = [node for node in between(stream, attention) if node in stops and node is not attention]
    if above:
        first = min(above)
        return (
            f"the {dialect.plain_name(first)} in front of its attention cannot do without tokens: {stops[first].reason}"
        )
    return stops[attention].reason if attention in stops else "its queries, keys and values do not come from its stream"


def between(stream: Node, attention: Node) -> Iterator[Node]:
    """Calls from a stream to an attention, from the attention upwards."""
    pending, seen = [attention], {stream}
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function" or node < stream:
            continue
        seen.add(node)
        yield node
        pending.extend(node.all_input_nodes)


def _end(joined: Node, tracks: Mapping[Node, Track]) -> Node:
    """The last value of the stream: sums of it with what is computed from it."""
    while True:
        following = [
            user for user in joined.users
            if dialect.op_name(user) == ADD and user in tracks and len(user.all_input_nodes) > 1
        ]  # fmt: skip
        following = [u for u in following if all(v in tracks for v in u.all_input_nodes)]
        if not following:
            return joined
        joined = following[0]


def _protected(stream: Node) -> int | str:
    """How many stored tokens stand at the front of a stream, or why that is not known."""
    front, tail = _stored_tokens(stream)
    return "stored tokens stand behind those of the image" if tail else front


def _stored_tokens(node: Any) -> tuple[int, int]:
    """Stored tokens at the front and at the back of a value [batch, tokens, channels]."""
    name = dialect.op_name(node)
    size = _rows(node)
    if name == "get_attr" or (name in _SPREAD and _is_stored(node)):
        return size, 0
    if name == "aten.cat.default" and dialect.operands(node)[1] in (1, -2):
        return _concatenated([(_rows(each), *_stored_tokens(each)) for each in dialect.operands(node)[0]])
    if name == "aten.slice.Tensor" and dialect.operands(node)[1] in (1, -2):
        source, _, start, end, _ = dialect.operands(node)
        low, high, _ = slice(start, end).indices(_rows(source))
        front, tail = _stored_tokens(source)
        return min(max(front - low, 0), size), max(min(tail, tail - (_rows(source) - high)), 0)
    if name in (ADD, "aten.layer_norm.default", "aten.rms_norm.default", "aten.mul.Tensor", "aten._to_copy.default"):
        data = [each for each in node.all_input_nodes if each.op != "get_attr"]
        if len(data) == 1:
            return _stored_tokens(data[0])
        spread = [each for each in data if not _is_stored(each)]
        return _stored_tokens(spread[0]) if len(spread) == 1 else (0, 0)
    return 0, 0


def _concatenated(parts: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Stored tokens at both ends of several parts (size, at its front, at its back), one behind the other."""
    front = tail = 0
    for size, own, _ in parts:
        front += own
        if own < size:
            break
    for size, own, back in reversed(parts):
        tail += size if own == size else back
        if own < size:
            break
    return front, (0 if front == sum(size for size, _, _ in parts) else tail)


def _is_stored(node: Node) -> bool:
    """Whether a value is a stored one, however spread over the batch."""
    while node.op == "call_function" and dialect.op_name(node) in (*_SPREAD, ADD):
        data = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), torch.Tensor)]
        others = [each for each in data if each.op != "get_attr"]
        if not others:
            return bool(data)
        if len(others) != 1:
            return False
        node = others[0]
    return node.op == "get_attr"


def _rows(node: Node) -> int:
    shape = node.meta["val"].shape
    rows = shape[-2] if len(shape) > 1 else 1
    return int(rows) if not isinstance(rows, torch.SymInt) else 0
