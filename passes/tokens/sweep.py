"""One walk over a Program that reduces tokens at given blocks and derives every shape behind them anew.

Each reduction begins a *generation* of fewer tokens. A call behind it that treats tokens apart is called with other
sizes, as the rules of ``tokens/rules`` say; one that needs every token gets them back: the reduction says which of its
tokens each former one went into, generation by generation.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.core.errors import InputError
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import node_macs, saving, shaped_macs
from vlexport.ir.program import Program
from vlexport.passes.base import Change
from vlexport.passes.tokens.blocks import Block, between
from vlexport.passes.tokens.emit import Emit, aten, size
from vlexport.passes.tokens.recorded import Recorded
from vlexport.passes.tokens.rules import ATTENTION, Call, Kept, Needs, Track, is_item, outcome
from vlexport.passes.tokens.weighing import heads_in_batch, mask

MARK = "tokens: "
"""How a note on a call begins at which tokens were reduced."""


@dataclass(frozen=True)
class Reduced:
    """What a reduction made of a stream.

    Attributes:
        stream: The stream of fewer tokens.
        what: In words, for the record.
        weights: How many former tokens each one stands for, [batch, tokens, 1]; None while each counts as one.
        attention: The block's attention matrix over the fewer tokens, where the block works on those already.
    """

    stream: Node
    what: str
    weights: Node | None = None
    attention: Node | None = None

    def back(self, emit: Emit, tokens: Node) -> Node:
        """Former tokens from the fewer, both [batch, tokens, channels]; each is the one that it went into.

        Raises:
            InputError: VLX0411 where dropped tokens went nowhere, as here.
        """
        raise refused(tokens, f"all tokens are needed behind it, and nothing gives them back ({self.what})")


class Reduction(abc.ABC):
    """What is done at one block."""

    block: Block
    before_attention: bool = False
    """Whether the block's own attention works on fewer tokens already."""

    @property
    def place(self) -> Node:
        """Behind which value of the stream it is done, unless before the attention."""
        return self.block.joined

    @abc.abstractmethod
    def apply(self, state: State) -> Reduced:
        """Write it in front of ``state.emit.before``."""


@dataclass(frozen=True)
class State:
    """What a reduction reads.

    Attributes:
        emit: Writes its calls.
        stream: The tokens, [batch, n, channels].
        query: Of the block's attention, [batch, heads, n, width].
        key: Likewise.
        scale: Of its scores.
        weights: How many tokens each stands for, [batch, n, 1]; None while each counts as one.
        protected: Tokens at the front that stay.
    """

    emit: Emit
    stream: Node
    query: Node
    key: Node
    scale: float
    weights: Node | None
    protected: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return size(self.stream, 1)

    @property
    def channels(self) -> int:
        """Width of the stream."""
        return size(self.stream, 2)


@dataclass(frozen=True)
class _Generation:
    count: int
    reduced: Reduced | None = None


@dataclass
class Sweep:
    """The walk.

    Attributes:
        program: It is changed.
        reductions: What to do, in the order of their blocks.
        protected: Tokens at the front that stay.
        tokens: How many there are before the first.
        unmerge: Give tokens back to calls that need all; else such a call is refused.
        gives_fewer: Outputs hold fewer tokens.
    """

    program: Program
    reductions: Sequence[Reduction]
    protected: int
    tokens: int
    unmerge: bool
    gives_fewer: bool = False
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tracks: dict[Node, Track] = {}
        self._pieces: dict[Node, tuple[Track | None, ...]] = {}
        self._shapes: dict[Node, torch.Size] = {}
        self._generations = [_Generation(self.tokens)]
        self._restored: dict[Node, Node] = {}
        self._masks: dict[tuple[int, int, int], Node] = {}
        self._saved = [0, 0]
        self._recorded = Recorded(self.program)
        self._replaced: dict[Node, Node] = {}
        self._former: dict[Node, tuple[Any, Any, Any]] = {}
        self._spared = False  # whether a call that multiplies got fewer tokens
        self._given_back = ""

    def run(self) -> list[Change]:
        """Reduce, and return one change per reduction.

        Raises:
            InputError: VLX0411 where a call needs tokens that cannot be given back, or no call works on fewer.
        """
        behind = {each.place: each for each in self.reductions if not each.before_attention}
        inside = {each.block.attention: each for each in self.reductions if each.before_attention}
        for node in list(self.program.graph.nodes):
            if node in inside:
                self._reduce_inside(inside[node])
                continue
            if node.op == "output":
                self._output(node)
            elif node.op == "call_function" and self._generations[1:]:
                self._visit(node)
            if node in behind:
                self._reduce(behind[node])
        self._settle()
        if not self._spared and not self.gives_fewer:
            last = self.reductions[-1].block.attention
            raise refused(last, f"nothing behind it would work on fewer: {self._given_back or 'all is elementwise'}")
        return self.changes

    def _settle(self) -> None:
        """What was saved since the last reduction is its doing."""
        if self.changes:
            nodes, macs = self._saved
            last = self.changes[-1]
            self.changes[-1] = last.model_copy(
                update={"saved_nodes": last.saved_nodes + nodes, "saved_macs": last.saved_macs + macs}
            )
        self._saved = [0, 0]

    def _reduce(self, reduction: Reduction) -> None:
        """Behind the attention's residual sum."""
        joined = reduction.place
        before = self._marked()
        state = self._state(reduction.block, joined, Emit(self.program, joined.next, joined, self._recorded))
        readers = list(joined.users)
        reduced = reduction.apply(state)
        for reader in readers:
            reader.replace_input_with(joined, reduced.stream)
        provenance.remember(joined, f"{MARK}{reduced.what}")
        self._begin(reduced, joined, reduction.block)
        self._count_made(before)

    def _reduce_inside(self, reduction: Reduction) -> None:
        """In front of the attention's values: they are computed anew from fewer tokens, and the matrix is given."""
        block = reduction.block
        attention = block.attention
        before = self._marked()
        emit = Emit(self.program, attention, attention, self._recorded)
        stream = self._replaced.get(block.stream, block.stream)
        reduced = reduction.apply(self._state(block, stream, emit))
        assert reduced.attention is not None
        value = dialect.operands(attention)[2]
        self._begin(reduced, stream, block)
        values = self._computed_anew(value, stream, reduced.stream, attention)
        product = emit(aten.matmul.default, reduced.attention, values)
        self._tracks[product] = Track(2, len(self._generations) - 1)
        self._shapes[product] = attention.meta["val"].shape
        block.joined.replace_input_with(stream, reduced.stream)
        provenance.remember(block.joined, f"{MARK}{reduced.what}")
        self._count_made(before)
        lost = saving(self.program, attention)
        self._saved[0] += lost.calls
        self._saved[1] += lost.macs - node_macs(self.program, attention, {}) + self._macs_before(attention)
        self.program.replace(attention, product)

    def _state(self, block: Block, stream: Node, emit: Emit) -> State:
        latest = len(self._generations) - 1
        if latest and self._tracks.get(stream) != Track(1, latest):
            raise refused(block.attention, "its stream is read in full")
        query, key = dialect.operands(block.attention)[:2]
        scale = dialect.operands(block.attention)[6]
        scale = size(query, 3) ** -0.5 if scale is None else float(scale)
        return State(emit, stream, query, key, scale, self._weights(-1), self.protected)

    def _begin(self, reduced: Reduced, stream: Node, block: Block) -> None:
        self._settle()
        shape = self._shape(stream)
        self._generations.append(_Generation(size(reduced.stream, 1), reduced))
        self._tracks[reduced.stream] = Track(1, len(self._generations) - 1)
        self._shapes[reduced.stream] = shape
        self._replaced[stream] = reduced.stream
        self.changes.append(Change(what=reduced.what, where=(provenance.module_path(block.attention),)))

    def _computed_anew(self, value: Node, stream: Node, fewer: Node, before: Node) -> Node:
        """What ``value`` is when it is computed from fewer tokens."""
        made: dict[Node, Node] = {stream: fewer}
        saved = list(self._saved)
        for node in sorted(between(stream, value)):
            if not any(operand in made for operand in node.all_input_nodes):
                continue
            with self.program.graph.inserting_before(before):
                twin = self.program.graph.node_copy(node, lambda n: made.get(n, n))
            twin.args, twin.kwargs, twin.meta["val"] = self._as_it_was(node, made)
            made[node] = twin
            self._visit(twin)
        self._saved = saved  # a twin was never larger: what it costs is counted with what is made
        return made[value]

    def _as_it_was(self, node: Node, made: Mapping[Node, Node]) -> tuple[Any, Any, Any]:
        args, kwargs, value = self._former.get(node, (node.args, node.kwargs, node.meta["val"]))
        args, kwargs = map_arg((args, kwargs), lambda n: made.get(n, n))
        return args, kwargs, value

    def _marked(self) -> set[Node]:
        return set(self.program.graph.nodes)

    def _count_made(self, before: set[Node]) -> None:
        """Calls that were written since are what the reduction costs."""
        made = [n for n in self.program.graph.nodes if n not in before and n.op == "call_function"]
        self._saved[0] -= len(made)
        self._saved[1] -= sum(node_macs(self.program, n, {}) for n in made)

    def _visit(self, node: Node) -> None:
        if is_item(node):
            self._item(node)
            return
        if not any(value in self._tracks for value in node.all_input_nodes):
            return
        self._former[node] = (node.args, node.kwargs, node.meta["val"])
        result = outcome(self._call(node))
        if isinstance(result, Needs):
            self._restore(node, result.reason)
            return
        before = self._macs_before(node)
        if isinstance(result, Kept):
            self._keep(node, result)
        if dialect.op_name(node) == ATTENTION:
            self._weigh(node)
        now = node_macs(self.program, node, {})
        self._saved[1] += before - now
        self._spared = self._spared or now < before

    def _call(self, node: Node) -> Call:
        tracked = [self._tracks[v] for v in node.all_input_nodes if v in self._tracks]
        merging = any(self._weights(each.generation) is not None for each in tracked)
        return Call(node, self._tracks, self._shape, self._count, self.protected, merging)

    def _weights(self, generation: int) -> Node | None:
        reduced = self._generations[generation].reduced
        return None if reduced is None else reduced.weights

    def _shape(self, node: Node) -> torch.Size:
        found = self._shapes.get(node)
        return node.meta["val"].shape if found is None else found

    def _count(self, track: Track) -> int:
        return self._generations[track.generation].count - track.skipped

    def _macs_before(self, node: Node) -> int:
        """MACs of a call that reads tokens, before there were fewer."""
        arguments = dialect.operands(node)
        given = [a for each in arguments for a in (each if isinstance(each, (list, tuple)) else [each])]
        operands: list[Sequence[int]] = [
            self.program.sizes(self._shape(a), {})
            for a in given
            if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)
        ]
        value = node.meta["val"]
        return (
            shaped_macs(node, operands, self.program.sizes(value.shape, {}), arguments)
            if isinstance(value, torch.Tensor)
            else 0
        )

    def _item(self, node: Node) -> None:
        values: Any = node.args[0]
        place: Any = node.args[1]
        if values in self._pieces:
            self._former[node] = (node.args, node.kwargs, node.meta["val"])
            self._shapes[node] = node.meta["val"].shape
            node.meta["val"] = values.meta["val"][place]
            track = self._pieces[values][place]
            if track is not None:
                self._tracks[node] = track

    def _keep(self, node: Node, kept: Kept) -> None:
        old = node.meta["val"]
        if kept.operands is not None:
            target: Any = node.target
            node.args, node.kwargs = dialect.arguments(target, kept.operands)
        if isinstance(kept.tracks, tuple):
            self._pieces[node] = kept.tracks
            pairs = zip(old, kept.tracks, strict=True)
            node.meta["val"] = tuple(value if track is None else self._fewer(value, track) for value, track in pairs)
        else:
            self._shapes[node] = old.shape
            self._tracks[node] = kept.tracks
            node.meta["val"] = self._fewer(old, kept.tracks)

    def _fewer(self, value: torch.Tensor, track: Track) -> torch.Tensor:
        return self._recorded.resized(value, track.axis, self._count(track))

    def _weigh(self, attention: Node) -> None:
        """A token that stands for several is attended to as so many."""
        key: Any = attention.args[1]
        generation = self._tracks[key].generation
        weights = self._weights(generation)
        if weights is None:
            return
        times = heads_in_batch(key, weights)
        if times is None:
            raise refused(attention, "its batch holds more than samples, and merged tokens must be weighed in it")
        rank = key.meta["val"].ndim
        kind = (generation, rank, times)
        if kind not in self._masks:
            known = self._marked()
            self._masks[kind] = mask(Emit(self.program, attention, attention, self._recorded), weights, rank, times)
            self._count_made(known)
        attention.args = (*attention.args[:3], self._masks[kind], *attention.args[4:])

    def _restore(self, node: Node, reason: str) -> None:
        self._given_back = self._given_back or _met(node, reason)
        for value in list(node.all_input_nodes):
            if value in self._tracks:
                node.replace_input_with(value, self._all_of(value, node, reason))

    def _output(self, node: Node) -> None:
        if not self.gives_fewer:
            self._restore(node, "it is an output")
            return
        signature = self.program.signature
        outputs = list(signature.outputs)
        for place, value in enumerate(self.program.results):
            if value in self._tracks:
                axis, count = self._tracks[value].axis, self._count(self._tracks[value])
                shape = tuple(count if i == axis else s for i, s in enumerate(outputs[place].shape))
                outputs[place] = outputs[place].model_copy(update={"shape": shape})
        if outputs == list(signature.outputs):
            raise refused(
                self.reductions[0].block.attention, "no output holds patch tokens, so none are left to choose"
            )
        self.program.signature = signature.model_copy(update={"outputs": tuple(outputs)})

    def _all_of(self, value: Node, reader: Node, reason: str) -> Node:
        if value in self._restored:
            return self._restored[value]
        track = self._tracks[value]
        before = value.next if reader.op == "output" else reader
        found = self._give_back(value, track, before, reason)
        self._restored[value] = found
        return found

    def _give_back(self, value: Node, track: Track, before: Node, reason: str) -> Node:
        place = before if before.op == "call_function" else value
        if not self.unmerge:
            raise refused(place, f"{reason}, and unmerge is off")
        known = self._marked()
        emit = Emit(self.program, before, value, self._recorded)
        rank = value.meta["val"].ndim
        if rank != 3 or track.axis not in (1, 2):
            raise refused(place, f"{reason}, and tokens cannot be given back there")
        tokens = value if track.axis == 1 else emit(aten.permute.default, value, [0, 2, 1])
        if track.skipped:  # rows of protected tokens, which no other token goes into: anything may stand there
            tokens = emit.joined([emit.cut(tokens, 1, 0, track.skipped), tokens], 1)
        for generation in reversed(self._generations[1 : track.generation + 1]):
            if generation.reduced is not None:
                tokens = generation.reduced.back(emit, tokens)
        found = emit.cut(tokens, 1, track.skipped)
        found = found if track.axis == 1 else emit(aten.permute.default, found, [0, 2, 1])
        self._count_made(known)
        return found


def _met(node: Node, reason: str) -> str:
    return reason if node.op == "output" else f"{dialect.plain_name(node)} follows, and {reason}"


def refused(node: Node, reason: str, *, hint: str = "reduce in later layers, or leave --tokens out") -> InputError:
    """The model's tokens cannot be reduced."""
    return InputError(
        "VLX0411", f"the tokens cannot be reduced: {reason}", where=provenance.describe(node),
        hint=hint,
    )  # fmt: skip
