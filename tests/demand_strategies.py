"""Random token models and pyramids with random heads, for the pass that computes only what is read.

They grow as those of ``tests/strategies`` do: one operator at a time, with a dynamic batch and without a capture.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx import Node

from tests.growing import Grower, finished, seed_program
from vlexport.ir.program import Program

aten = torch.ops.aten
TOKENS = (5, 4)
IMAGE = (3, 6, 6)
HEADS = 2


def _norm(g: Grower, x: Node) -> Node:
    width = g.shape(x)[-1]
    return g.call(aten.layer_norm.default, x, [width], g.tensor(width), g.tensor(width), 1e-5)


def _linear(g: Grower, x: Node, out: int) -> Node:
    bias = g.tensor(out) if g.pick(True, False) else None
    return g.call(aten.linear.default, x, g.tensor(out, g.shape(x)[-1]), bias)


def _heads(g: Grower, x: Node) -> Node:
    tokens, width = g.shape(x)
    split = g.call(aten.reshape.default, x, [-1, tokens, HEADS, width // HEADS])
    return g.call(aten.permute.default, split, [0, 2, 1, 3])


def _qkv(g: Grower, x: Node, kind: str) -> tuple[Node, Node, Node]:
    """Three projections, or one that is taken apart in one of several ways."""
    tokens, width = g.shape(x)
    if kind == "apart":
        q, k, v = (_heads(g, _linear(g, x, width)) for _ in range(3))
        return q, k, v
    fused = _linear(g, x, 3 * width)
    if kind in ("split", "chunk"):
        target, size = (aten.split.Tensor, width) if kind == "split" else (aten.chunk.default, 3)
        parts = g.call(target, fused, size, -1)
        q, k, v = (_heads(g, g.call(operator.getitem, parts, i)) for i in range(3))
        return q, k, v
    if kind == "slice":
        q, k, v = (_heads(g, g.call(aten.slice.Tensor, fused, -1, i * width, (i + 1) * width)) for i in range(3))
        return q, k, v
    split = g.call(aten.reshape.default, fused, [-1, tokens, 3, HEADS, width // HEADS])
    moved = g.call(aten.permute.default, split, [2, 0, 3, 1, 4])
    if kind == "select":
        q, k, v = (g.call(aten.select.int, moved, 0, i) for i in range(3))
        return q, k, v
    parts = g.call(aten.unbind.int, moved)
    q, k, v = (g.call(operator.getitem, parts, i) for i in range(3))
    return q, k, v


def _attention(g: Grower, x: Node, projection: str, kind: str) -> Node:
    tokens, width = g.shape(x)
    q, k, v = _qkv(g, x, projection)
    if kind == "fused":
        mixed = g.call(aten.scaled_dot_product_attention.default, q, k, v)
    elif kind == "masked":
        mask = g.tensor(HEADS, tokens, tokens)
        mixed = g.call(aten.scaled_dot_product_attention.default, q, k, v, mask)
    elif kind == "causal":
        mixed = g.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True)
    else:
        scores = g.call(aten.matmul.default, q, g.call(aten.permute.default, k, [0, 1, 3, 2]))
        scores = g.call(aten.mul.Tensor, scores, 0.5)
        if kind == "written out, biased":
            scores = g.call(aten.add.Tensor, scores, g.tensor(HEADS, tokens, tokens))
        mixed = g.call(aten.matmul.default, g.call(aten.softmax.int, scores, -1), v)
    joined = g.call(aten.reshape.default, g.call(aten.permute.default, mixed, [0, 2, 1, 3]), [-1, tokens, width])
    return _linear(g, joined, width)


def _mlp(g: Grower, x: Node) -> Node:
    width = g.shape(x)[-1]
    return _linear(g, g.call(aten.gelu.default, _linear(g, x, 2 * width)), width)


@functools.cache
def _body(projection: str, kind: str, seed: int) -> Program:
    """A block of attention and MLP and a norm; it returns the block's value and the norm's."""
    program = seed_program(TOKENS).copy()
    g = Grower(program, lambda _: bool(seed % 2), torch.Generator().manual_seed(seed))
    x = program.calls()[0]
    x = g.call(aten.add.Tensor, x, _attention(g, _norm(g, x), projection, kind))
    x = g.call(aten.add.Tensor, x, _mlp(g, _norm(g, x)))
    program.output.args = ((x, _norm(g, x)),)
    return program


PROJECTIONS = ("apart", "unbind", "select", "split", "chunk", "slice")
KINDS = ("fused", "masked", "causal", "written out", "written out, biased")
BODIES = tuple((p, k, i) for i, (p, k) in enumerate(zip(PROJECTIONS * 2, KINDS * 3, strict=False)))
"""Every way to project, each with two kinds of attention; grown once."""


def _convolutions(g: Grower, x: Node) -> Node:
    for _ in range(g.pick(1, 2)):
        channels = g.shape(x)[0]
        kind = g.pick("dense", "pointwise", "depthwise", "norm", "relu", "pool", "two")
        if kind in ("dense", "pointwise"):
            kernel = 3 if kind == "dense" else 1
            weight = g.tensor(g.pick(4, 6), channels, kernel, kernel)
            x = g.call(aten.conv2d.default, x, weight, None, [1, 1], [kernel // 2] * 2)
        elif kind == "depthwise":
            bias = g.tensor(channels)
            x = g.call(aten.conv2d.default, x, g.tensor(channels, 1, 3, 3), bias, [1, 1], [1, 1], [1, 1], channels)
        elif kind == "norm":
            stored = [g.tensor(channels), g.tensor(channels), g.tensor(channels), g.tensor(channels, positive=True)]
            x = g.call(aten.batch_norm.default, x, *stored, False, 0.1, 1e-5, True)
        elif kind == "pool":
            x = g.call(aten.avg_pool2d.default, x, [2, 2]) if g.shape(x)[1] >= 4 else x
        elif kind == "two":
            x = g.call(aten.cat.default, [x, g.call(aten.relu.default, x)], 1)
        else:
            x = g.call(aten.relu.default, x)
    return x


def _cut(g: Grower, x: Node, axis: int) -> Node:
    """A part of ``x`` along ``axis``, a sample's axis; or all of it."""
    size = g.shape(x)[axis - 1]
    kind = g.pick("row", "last", "range", "stride", "list", "mean", "all")
    start = g.draw(st.integers(0, size - 1))
    if kind == "row":
        return g.call(aten.slice.Tensor, x, axis, start, start + 1)
    if kind == "last":
        return g.call(aten.unsqueeze.default, g.call(aten.select.int, x, axis, -1), axis)
    if kind == "range":
        return g.call(aten.slice.Tensor, x, axis, start, g.draw(st.integers(start + 1, size)))
    if kind == "stride":
        return g.call(aten.slice.Tensor, x, axis, start % 2, 2**63 - 1, 2)
    if kind == "list":
        rows = g.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
        index = g.program.add_tensor("rows", torch.tensor(rows), before=g.program.output, kind="constant")
        return g.call(aten.index_select.default, x, axis, index)
    if kind == "mean":
        return g.call(aten.mean.dim, x, [axis], True)
    return x


def _joined(g: Grower, x: Node) -> Node:
    """Twice as many rows: those of ``x``, and what is computed from it or from a stored tensor."""
    kind = g.pick("linear", "relu", "stored")
    if kind == "stored":
        other = g.call(aten.add.Tensor, g.call(aten.mul.Tensor, x, 0.0), g.tensor(*g.shape(x)))
    elif kind == "relu":
        other = g.call(aten.relu.default, x)
    else:
        other = _linear(g, x, g.shape(x)[-1])
    pieces = [x, other] if g.pick(True, False) else [other, x]
    return g.call(aten.cat.default, pieces, 1)


def _head(g: Grower, x: Node) -> Node:
    if g.pick(True, False, False, False):
        x = _joined(g, x)
    for axis in range(1, len(g.shape(x)) + 1):
        x = _cut(g, x, axis) if g.pick(True, axis == 1, False) else x
    flat = g.call(aten.reshape.default, x, [-1, _elements(g, x)])
    return _linear(g, flat, 3) if g.pick(True, False) else flat


def _elements(g: Grower, x: Node) -> int:
    count = 1
    for size in g.shape(x):
        count *= int(size)
    return count


@st.composite
def token_models(draw: Any) -> Program:
    """A block of attention and MLP, and one to three heads that read some of its value or of the norm behind it."""
    program = _body(*draw(st.sampled_from(BODIES))).copy()
    return _with_heads(draw, program, program.results)


@st.composite
def pyramids(draw: Any) -> Program:
    """Convolutions, norms and pools, and heads that read some channels or pixels."""
    program = seed_program(IMAGE).copy()
    g = Grower(program, draw, torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    first = _convolutions(g, program.calls()[0])
    return _with_heads(draw, program, (first, _convolutions(g, first)))


def _with_heads(draw: Any, program: Program, values: tuple[Node, ...]) -> Program:
    g = Grower(program, draw, torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    results = [_head(g, values[-1]), *(_head(g, g.pick(*values)) for _ in range(g.pick(0, 0, 1, 2)))]
    return finished(program, results, set())
