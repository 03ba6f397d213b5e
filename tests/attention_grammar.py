"""A grammar of attention: every spelling that a model's code may have, as a Program, and mutations that are none.

:func:`spelled` builds one attention over ``x: [batch, tokens, features]`` from a :class:`Spelling`, call by call. All
spellings of one mathematical attention give the same value; a mutation changes what is computed.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from tests.growing import finished
from vlexport.frontends.capture import capture
from vlexport.ir.program import Program

aten = torch.ops.aten
TOKENS, FEATURES, HEADS, DEPTH = 6, 10, 2, 6
WINDOWS = 2

Mutation = Literal[
    "", "softmax over heads", "softmax over queries", "map returned", "map multiplied", "heads mixed before",
    "heads mixed after", "keys not transposed", "not normalised", "scores squashed", "product returned",
]  # fmt: skip


@dataclass(frozen=True)
class Spelling:
    """One way to write attention.

    Attributes:
        projection: Where queries, keys and values come from.
        layout: Axes at the products: heads apart, heads behind tokens (einsum), heads merged into the batch, windows
            apart (rank 5).
        product: The operator.
        transposed: Scores are keys by queries.
        scale: Where it is, and how it is written.
        mask: What is added or overwritten.
        masked: How a boolean mask is written.
        softmax: The operator and how its axis is counted.
        groups: Heads of keys and values that each serve several heads, and how they are repeated.
        wide: Values are wider than keys.
        double: Weights are float64.
        dynamic: The batch is any size.
        mutation: What is wrong.
        seed: Of the weights.
    """

    projection: str
    layout: str
    product: str
    transposed: bool
    scale: str
    mask: str
    masked: str
    softmax: str
    groups: str
    wide: bool
    double: bool
    dynamic: bool
    mutation: Mutation = ""
    seed: int = 0


@st.composite
def spellings(draw: Any, *, mutations: tuple[Mutation, ...] = ("",)) -> Spelling:
    """Any spelling that is possible."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    mutation: Mutation = draw(st.sampled_from(mutations))
    straight = mutation == "keys not transposed"
    layout = pick("heads", "tokens", "merged", "windows") if not straight else pick("heads", "merged")
    product = {"heads": ("matmul", "einsum"), "tokens": ("einsum",), "merged": ("bmm", "baddbmm", "matmul", "einsum"),
               "windows": ("matmul", "einsum")}[layout]  # fmt: skip
    projection = pick("fused", "separate", "cross") if not straight else pick("fused", "separate")
    return Spelling(
        projection=projection,
        layout=layout,
        product=pick(*product) if not straight else "matmul",
        transposed=not straight and pick(False, False, True),
        scale=pick("none", "query", "key", "scores", "divided", "stored", "both", "before heads", "default"),
        mask=pick("none", "tokens", "heads", "computed", "hidden", "causal", "sum"),
        masked=pick("masked_fill", "where", "where not", "added", "finite"),
        softmax=pick("last", "positive", "_softmax"),
        groups=pick("", "", "expand", "repeat") if projection != "fused" and layout in ("heads", "merged") else "",
        wide=pick(False, True) if projection != "fused" else False,
        double=pick(False, False, False, True),
        dynamic=draw(st.integers(0, 7)) == 0,
        mutation=mutation,
        seed=draw(st.integers(0, 9)),
    )


class _Seed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@functools.cache
def _seed_program(*, dynamic: bool) -> Program:
    example = torch.randn(2, TOKENS, FEATURES, generator=torch.Generator().manual_seed(3))
    return capture(_Seed().eval(), example, dynamic="auto" if dynamic else False).program


class Writer:
    """Appends calls to a Program."""

    def __init__(self, how: Spelling) -> None:
        self.how = how
        self.program = _seed_program(dynamic=how.dynamic).copy()
        self.generator = torch.Generator().manual_seed(how.seed)
        self.x = self.program.calls()[0]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One call."""
        return self.program.add_call(target, args, kwargs, before=self.program.output, value_of=self.program.calls()[0])

    def tensor(self, *shape: int, value: Tensor | None = None) -> Node:
        """A stored tensor; normal unless given."""
        if value is None:
            value = torch.randn(shape, generator=self.generator)
        return self.program.add_tensor("t", value, before=self.program.output)

    def finish(self, *results: Node) -> Program:
        """The Program that returns ``results``."""
        return finished(self.program, list(results), set())


def spelled(how: Spelling) -> Program:
    """The Program of a spelling."""
    write = Writer(how)
    query, key, value = _projected(write)
    mask = None if how.mask == "none" else how.mask
    query, key, after = _scaled(write, query, key)
    scores = _product(write, query, key, "queries keys")
    if how.transposed:
        scores = write.call(aten.permute.default, scores, [*range(scores.meta["val"].ndim - 2), -1, -2])
    product = scores
    scores = after(scores)
    if mask is not None:
        scores = _masked(write, scores)
    if how.mutation == "heads mixed before":
        scores = _mixed(write, scores)
    if how.mutation == "scores squashed":
        scores = write.call(aten.tanh.default, scores)
    weights = _softmax(write, scores)
    if how.mutation == "heads mixed after":
        weights = _mixed(write, weights)
    if how.mutation == "map multiplied":
        rows, keys = _mask_shape(write, "tokens")
        gate = write.tensor(keys, rows) if how.transposed else write.tensor(rows, keys)
        weights = write.call(aten.mul.Tensor, weights, gate)
    if how.transposed:
        weights = write.call(aten.permute.default, weights, [*range(weights.meta["val"].ndim - 2), -1, -2])
    made = _product(write, weights, value, "weights values")
    result = _joined(write, made)
    if how.mutation == "map returned":
        return write.finish(result, weights)
    if how.mutation == "product returned":
        return write.finish(result, product)
    return write.finish(result)


def _key_tokens(how: Spelling) -> int:
    return TOKENS if how.projection != "cross" or how.layout == "windows" else TOKENS - 2


def _projected(write: Writer) -> tuple[Node, Node, Node]:
    how = write.how
    if how.projection == "fused":
        made = write.call(aten.linear.default, write.x, write.tensor(3 * HEADS * DEPTH, FEATURES))
        if how.layout == "windows":
            shape, dims = [-1, WINDOWS, TOKENS // WINDOWS, 3, HEADS, DEPTH], [3, 0, 1, 4, 2, 5]
        elif how.layout == "tokens":
            shape, dims = [-1, TOKENS, 3, HEADS, DEPTH], [2, 0, 1, 3, 4]
        else:
            shape, dims = [-1, TOKENS, 3, HEADS, DEPTH], [2, 0, 3, 1, 4]
        moved = write.call(aten.permute.default, write.call(aten.reshape.default, made, shape), dims)
        parts = write.call(aten.unbind.int, moved)
        three = [write.call(operator.getitem, parts, i) for i in range(3)]
        if how.layout == "merged":
            three = [write.call(aten.reshape.default, each, [-1, TOKENS, DEPTH]) for each in three]
        return three[0], three[1], three[2]
    keys = _key_tokens(how)
    source = write.x if keys == TOKENS else write.call(aten.slice.Tensor, write.x, 1, 0, keys)
    width = DEPTH + 2 if how.wide else DEPTH
    heads = 1 if how.groups else HEADS
    return (
        _projection(write, write.x, TOKENS, HEADS, DEPTH, scaled=how.scale == "before heads"),
        _projection(write, source, keys, heads, DEPTH, scaled=False),
        _projection(write, source, keys, heads, width, scaled=False),
    )


def _projection(write: Writer, x: Node, tokens: int, heads: int, depth: int, *, scaled: bool) -> Node:
    how = write.how
    made = write.call(aten.linear.default, x, write.tensor(heads * depth, FEATURES), write.tensor(heads * depth))
    if scaled:
        made = write.call(aten.mul.Tensor, made, 0.37)
    if how.layout == "windows":
        made = write.call(aten.reshape.default, made, [-1, WINDOWS, tokens // WINDOWS, heads, depth])
        return write.call(aten.permute.default, made, [0, 1, 3, 2, 4])
    made = write.call(aten.reshape.default, made, [-1, tokens, heads, depth])
    if how.layout == "tokens":
        return made
    made = write.call(aten.permute.default, made, [0, 2, 1, 3])
    if heads != HEADS and how.groups == "repeat":
        made = write.call(aten.repeat_interleave.self_int, made, HEADS, 1)
    elif heads != HEADS:
        made = write.call(aten.expand.default, write.call(aten.unsqueeze.default, made, 2), [-1, -1, HEADS, -1, -1])
        made = write.call(aten.reshape.default, made, [-1, HEADS, tokens, depth])
    return write.call(aten.reshape.default, made, [-1, tokens, depth]) if how.layout == "merged" else made


def _scaled(write: Writer, query: Node, key: Node) -> Any:
    """Queries and keys, and what is done to their product."""
    scale = 0.37
    how = write.how.scale
    mul = lambda x, s: write.call(aten.mul.Tensor, x, s)  # noqa: E731
    if how == "query":
        query = mul(query, scale)
    elif how == "key":
        key = write.call(aten.div.Tensor, key, 1 / scale)
    elif how == "both":
        query, key = mul(query, math.sqrt(scale)), mul(key, math.sqrt(scale))
    elif how == "scores":
        return query, key, lambda s: mul(s, scale)
    elif how == "stored":
        return query, key, lambda s: write.call(aten.mul.Tensor, write.tensor(value=torch.tensor([scale])), s)
    elif how == "divided":
        return query, key, lambda s: write.call(aten.div.Tensor, s, 1 / scale)
    elif how == "default":
        return query, key, lambda s: write.call(aten.div.Tensor, s, math.sqrt(DEPTH))
    return query, key, lambda s: s


def _product(write: Writer, left: Node, right: Node, what: str) -> Node:
    how = write.how
    scores = what == "queries keys"
    rank = left.meta["val"].ndim
    if how.layout == "tokens":
        if scores:
            return write.call(aten.einsum.default, "bqhd,bkhd->bhqk", [left, right])
        return write.call(aten.einsum.default, "bhqk,bkhd->bqhd", [left, right])
    if how.product == "einsum":
        lead = "abc"[: rank - 2]
        equation = f"{lead}qd,{lead}kd->{lead}qk" if scores else f"{lead}qk,{lead}kd->{lead}qd"
        return write.call(aten.einsum.default, equation, [left, right])
    if scores and how.mutation != "keys not transposed":
        right = write.call(aten.permute.default, right, [*range(rank - 2), rank - 1, rank - 2])
    if how.transposed and scores:  # (q kᵀ)ᵀ = k qᵀ
        swap = [*range(rank - 2), rank - 1, rank - 2]
        left, right = write.call(aten.permute.default, right, swap), write.call(aten.permute.default, left, swap)
        made = write.call(aten.bmm.default if how.product == "bmm" else aten.matmul.default, left, right)
        return write.call(aten.permute.default, made, swap)
    if how.product == "baddbmm" and scores:
        empty = write.tensor(1, 1, 1)
        return write.call(aten.baddbmm.default, empty, left, right, beta=0, alpha=1)
    return write.call(aten.bmm.default if how.product in ("bmm", "baddbmm") else aten.matmul.default, left, right)


def _mask_shape(write: Writer, kind: str) -> tuple[int, ...]:
    rows, keys = TOKENS, _key_tokens(write.how)
    if write.how.layout == "windows":
        rows, keys = rows // WINDOWS, keys // WINDOWS
    lead = {"heads": (HEADS,), "windows": (HEADS,), "tokens": (HEADS,), "merged": ()}[write.how.layout]
    return (*lead, rows, keys) if kind == "heads" else (rows, keys)


def _masked(write: Writer, scores: Node) -> Node:
    """Masks are written for queries by keys; where the scores are keys by queries they are moved, too."""
    how = write.how
    shape = _mask_shape(write, "heads" if how.mask in ("heads", "sum") else "tokens")

    def turned(mask: Node) -> Node:
        rank = mask.meta["val"].ndim
        return write.call(aten.permute.default, mask, [*range(rank - 2), -1, -2]) if how.transposed else mask

    add = lambda s, m: write.call(aten.add.Tensor, s, turned(m))  # noqa: E731
    if how.mask in ("tokens", "heads"):
        return add(scores, write.tensor(*shape))
    if how.mask == "sum":
        return write.call(aten.add.Tensor, turned(write.tensor(*shape[-2:])), add(scores, write.tensor(*shape)))
    if how.mask == "computed":
        one = write.call(aten.sum.dim_IntList, write.x, [1, 2])
        lead = scores.meta["val"].ndim - 1
        if how.layout == "merged":
            one = write.call(aten.expand.default, write.call(aten.unsqueeze.default, one, 1), [-1, HEADS])
        mask = write.call(aten.reshape.default, one, [-1, *[1] * lead])
        return add(scores, write.call(aten.mul.Tensor, mask, write.tensor(*shape)))
    rows, keys = shape
    visible = torch.ones(rows, keys, dtype=torch.bool).tril()
    if how.mask == "hidden":
        visible = torch.rand(rows, keys, generator=write.generator) > 0.4
        visible[:, 0] = True
    if how.masked == "added":
        return add(scores, write.tensor(value=torch.zeros(rows, keys).masked_fill(~visible, float("-inf"))))
    fill = -1e9 if how.masked == "finite" else float("-inf")
    if how.masked == "where":
        return write.call(aten.where.ScalarOther, turned(write.tensor(value=visible)), scores, fill)
    if how.masked == "where not":
        return write.call(aten.where.ScalarSelf, turned(write.tensor(value=~visible)), fill, scores)
    return write.call(aten.masked_fill.Scalar, scores, turned(write.tensor(value=~visible)), fill)


def _softmax(write: Writer, scores: Node) -> Node:
    how = write.how
    rank = scores.meta["val"].ndim
    axis = rank - 2 if how.transposed else rank - 1
    if how.mutation == "softmax over heads":
        axis = rank - 3
    elif how.mutation == "softmax over queries":
        axis = rank - 1 if how.transposed else rank - 2
    if how.mutation == "not normalised":
        return write.call(aten.exp.default, scores)
    if how.softmax == "_softmax":
        return write.call(aten._softmax.default, scores, axis, False)
    return write.call(aten.softmax.int, scores, axis if how.softmax == "positive" else axis - rank)


def _mixed(write: Writer, scores: Node) -> Node:
    """A linear over the heads; over the queries where the heads are in the batch."""
    rank = scores.meta["val"].ndim
    place = rank - 3 if write.how.layout != "merged" else rank - 2
    order = [*(d for d in range(rank) if d != place), place]
    size = int(scores.meta["val"].shape[place])
    mixed = write.call(aten.linear.default, write.call(aten.permute.default, scores, order), write.tensor(size, size))
    return write.call(aten.permute.default, mixed, [order.index(d) for d in range(rank)])


def _joined(write: Writer, made: Node) -> Node:
    """Heads next to each other again, as a model writes it; one linear behind."""
    how = write.how
    width = int(made.meta["val"].shape[-1])
    if how.layout == "merged":
        made = write.call(aten.reshape.default, made, [-1, HEADS, TOKENS, width])
    if how.layout == "windows":
        made = write.call(aten.permute.default, made, [0, 1, 3, 2, 4])
    elif how.layout != "tokens":
        made = write.call(aten.permute.default, made, [0, 2, 1, 3])
    made = write.call(aten.reshape.default, made, [-1, TOKENS, HEADS * width])
    return write.call(aten.linear.default, made, write.tensor(3, HEADS * width))
