"""Every rule of the demand analysis, against the operator itself: the narrowed call computes that part of the value."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from tests.growing import Grower, seed_program
from vlexport.ir import dialect
from vlexport.passes.demand.box import Box, box_of
from vlexport.passes.demand.rules import RULES, narrowing
from vlexport.passes.demand.site import Read, Site

aten = torch.ops.aten
TOKENS, IMAGE = (6, 4), (4, 6, 6)
TOLERANCE = 1e-12
"""Largest difference in float64 of values of size about 1: kernels of other sizes sum in another order."""


def heads(g: Grower, x: Node, count: int = 2) -> Node:
    split = g.call(aten.reshape.default, x, [-1, *g.shape(x)[:-1], count, g.shape(x)[-1] // count])
    return g.call(aten.permute.default, split, [0, 2, 1, 3])


def attention(g: Grower, x: Node, *mask: int, causal: bool = False) -> Node:
    q, k, v = (heads(g, g.call(aten.mul.Tensor, x, g.tensor(4))) for _ in range(3))
    given = g.tensor(*mask) if mask else None
    return g.call(aten.scaled_dot_product_attention.default, q, k, v, given, 0.0, causal)


def grouped_attention(g: Grower, x: Node) -> Node:
    q, k = heads(g, x, 4), heads(g, g.call(aten.slice.Tensor, x, -1, 0, 2), 2)
    return g.call(aten.scaled_dot_product_attention.default, q, k, k, enable_gqa=True)


def convolution(g: Grower, x: Node, out: int, groups: int = 1, kernel: int = 3) -> Node:
    weight = g.tensor(out, 4 // groups, kernel, kernel)
    return g.call(aten.conv2d.default, x, weight, g.tensor(out), [1, 1], [kernel // 2] * 2, [1, 1], groups)


def transposed(g: Grower, x: Node, groups: int = 1) -> Node:
    weight = g.tensor(4, 3, 2, 2)
    return g.call(aten.conv_transpose2d.input, x, weight, g.tensor(3 * groups), [2, 2], [0, 0], [0, 0], groups)


def batch_norm(g: Grower, x: Node) -> Node:
    stored = [g.tensor(4), g.tensor(4), g.tensor(4), g.tensor(4, positive=True)]
    return g.call(aten.batch_norm.default, x, *stored, False, 0.1, 1e-5, True)


def index(g: Grower, *rows: int) -> Node:
    return g.program.add_tensor("rows", torch.tensor(rows), before=g.program.output, kind="constant")


def gather(g: Grower, x: Node) -> Node:
    rows = g.call(aten.argsort.default, x, 1)
    return g.call(aten.gather.default, x, 1, g.call(aten.slice.Tensor, rows, 2, 0, 3))


def embedding(g: Grower, x: Node) -> Node:
    places = g.call(aten.argmax.default, x, 2)
    return g.call(aten.embedding.default, g.tensor(4, 5), places)


def part(g: Grower, x: Node, target: Any, place: int, *args: Any) -> Node:
    return g.call(operator.getitem, g.call(target, x, *args), place)


def reshape(*sizes: int) -> Callable[[Grower, Node], Node]:
    return lambda g, x: g.call(aten.reshape.default, x, list(sizes))


def call(target: Any, *args: Any) -> Callable[[Grower, Node], Node]:
    return lambda g, x: g.call(target, x, *args)


Build = Callable[[Grower, Node], Node]
CASES: dict[str, tuple[tuple[int, ...], Build, Iterable[int]]] = {
    "relu": (TOKENS, call(aten.relu.default), (1, 2)),
    "add, broadcast from the right": (TOKENS, lambda g, x: g.call(aten.add.Tensor, x, g.tensor(4)), (1, 2)),
    "add, broadcast along columns": (TOKENS, lambda g, x: g.call(aten.add.Tensor, g.tensor(6, 1), x), (1, 2)),
    "clamp between tensors": (TOKENS, lambda g, x: g.call(aten.clamp.Tensor, x, None, g.tensor(4)), (1, 2)),
    "layer_norm": (TOKENS, lambda g, x: g.call(aten.layer_norm.default, x, [4], g.tensor(4)), (1,)),
    "layer_norm of two axes": (TOKENS, call(aten.layer_norm.default, [6, 4]), ()),
    "group_norm": (IMAGE, call(aten.group_norm.default, 2), ()),
    "batch_norm": (IMAGE, batch_norm, (1, 2, 3)),
    "softmax of columns": (TOKENS, call(aten.softmax.int, -1), (1,)),
    "softmax of rows": (TOKENS, call(aten.softmax.int, 1), (2,)),
    "roll": (TOKENS, call(aten.roll.default, [1], [1]), (2,)),
    "roll of all": (TOKENS, call(aten.roll.default, [1]), ()),
    "flip": (TOKENS, call(aten.flip.default, [-1]), (1,)),
    "cumsum": (TOKENS, call(aten.cumsum.default, 1), (2,)),
    "glu": (TOKENS, call(aten.glu.default, -1), (1,)),
    "mean": (TOKENS, call(aten.mean.dim, [1]), (1,)),
    "mean, kept": (TOKENS, call(aten.mean.dim, [1], True), (2,)),
    "mean of columns": (IMAGE, call(aten.mean.dim, [-1]), (1, 2)),
    "sum of two": (IMAGE, call(aten.sum.dim_IntList, [1, 3]), (1,)),
    "var": (TOKENS, call(aten.var.correction, [2]), (1,)),
    "norm": (TOKENS, call(aten.linalg_vector_norm.default, 2, [2], True), (1,)),
    "avg_pool2d": (IMAGE, call(aten.avg_pool2d.default, [2, 2]), (1,)),
    "adaptive_avg_pool1d": (TOKENS, call(aten.adaptive_avg_pool1d.default, [2]), (1,)),
    "upsample": (IMAGE, call(aten.upsample_nearest2d.vec, None, [2.0, 2.0]), (1,)),
    "triu": (TOKENS, call(aten.triu.default), ()),
    "linear": (TOKENS, lambda g, x: g.call(aten.linear.default, x, g.tensor(5, 4), g.tensor(5)), (1, 2)),
    "linear without bias": (IMAGE, lambda g, x: g.call(aten.linear.default, x, g.tensor(5, 6)), (1, 2, 3)),
    "matmul": (TOKENS, lambda g, x: g.call(aten.matmul.default, x, g.tensor(4, 5)), (1, 2)),
    "matmul, broadcast": (IMAGE, lambda g, x: g.call(aten.matmul.default, g.tensor(4, 3, 6), x), (1, 2, 3)),
    "matmul of a vector": (TOKENS, lambda g, x: g.call(aten.matmul.default, x, g.tensor(4)), ()),
    "bmm": (TOKENS, lambda g, x: g.call(aten.bmm.default, x, g.call(aten.permute.default, x, [0, 2, 1])), (1, 2)),
    "baddbmm": (
        TOKENS,
        lambda g, x: g.call(
            aten.baddbmm.default, g.tensor(1, 6, 1), x, g.call(aten.permute.default, x, [0, 2, 1]), beta=0.5, alpha=2
        ),
        (1, 2),
    ),
    "einsum": (
        TOKENS, lambda g, x: g.call(aten.einsum.default, "bij,ikj->bki", [x, g.tensor(6, 3, 4)]), (1, 2)
    ),
    "attention": (TOKENS, attention, (1, 2, 3)),
    "attention, masked": (TOKENS, lambda g, x: attention(g, x, 2, 6, 6), (1, 2, 3)),
    "attention, one mask for all queries": (TOKENS, lambda g, x: attention(g, x, 1, 6), (1, 2, 3)),
    "attention, causal": (TOKENS, lambda g, x: attention(g, x, causal=True), (1, 2, 3)),
    "attention, grouped": (TOKENS, grouped_attention, (2, 3)),
    "conv2d": (IMAGE, lambda g, x: convolution(g, x, 5), (1,)),
    "conv2d, depthwise": (IMAGE, lambda g, x: convolution(g, x, 4, 4), (1,)),
    "conv2d, two channels a group": (IMAGE, lambda g, x: convolution(g, x, 8, 4), ()),
    "conv2d, grouped": (IMAGE, lambda g, x: convolution(g, x, 6, 2), ()),
    "conv_transpose2d": (IMAGE, transposed, (1,)),
    "conv_transpose2d, grouped": (IMAGE, lambda g, x: transposed(g, x, 2), ()),
    "permute": (IMAGE, call(aten.permute.default, [0, 3, -3, 2]), (1, 2, 3)),
    "unsqueeze": (TOKENS, call(aten.unsqueeze.default, 1), (2, 3)),
    "squeeze": (
        TOKENS, lambda g, x: g.call(aten.squeeze.dim, g.call(aten.slice.Tensor, x, 1, 0, 1), 1), (1,)
    ),
    "squeeze of all": (
        IMAGE, lambda g, x: g.call(aten.squeeze.default, g.call(aten.slice.Tensor, x, 2, 0, 1)), (1, 2)
    ),
    "expand": (
        TOKENS,
        lambda g, x: g.call(aten.expand.default, g.call(aten.unsqueeze.default, x, 1), [-1, 3, -1, 4]),
        (1, 2, 3),
    ),
    "repeat": (TOKENS, call(aten.repeat.default, [1, 2, 1]), (2,)),
    "reshape that splits": (TOKENS, reshape(-1, 2, 3, 4), (3,)),
    "reshape that merges": (IMAGE, reshape(-1, 4, 36), (1,)),
    "reshape to heads": (TOKENS, reshape(-1, 6, 2, 2), (1, 2, 3)),
    "reshape with ones": (TOKENS, reshape(-1, 1, 6, 1, 4, 1), (2, 4)),
    "reshape of the batch": (IMAGE, reshape(-1, 6, 6), (1, 2)),
    "reshape that regroups": (IMAGE, reshape(-1, 6, 4, 6), (3,)),
    "cat": (TOKENS, lambda g, x: g.call(aten.cat.default, [x, g.call(aten.relu.default, x), x], 1), (1, 2)),
    "stack": (TOKENS, lambda g, x: g.call(aten.stack.default, [x, g.call(aten.relu.default, x)], 1), (1, 2, 3)),
    "pad": (TOKENS, call(aten.constant_pad_nd.default, [0, 0, 2, 1], 0.5), (2,)),
    "pad by reflection": (TOKENS, call(aten.pad.default, [1, 1], "reflect"), (1,)),
    "select": (IMAGE, call(aten.select.int, 2, -1), (1, 2)),
    "slice": (IMAGE, call(aten.slice.Tensor, -2, 1, -1, 2), (1, 2, 3)),
    "narrow": (TOKENS, call(aten.narrow.default, 1, 2, 3), (1, 2)),
    "index_select": (TOKENS, lambda g, x: g.call(aten.index_select.default, x, 1, index(g, 3, 1, 1)), (1, 2)),
    "index": (IMAGE, lambda g, x: g.call(aten.index.Tensor, x, [None, None, index(g, -1, 2, 0)]), (1, 2, 3)),
    "gather": (TOKENS, gather, (2,)),
    "embedding": (TOKENS, embedding, (1, 2)),
    "part of split": (TOKENS, lambda g, x: part(g, x, aten.split.Tensor, 1, 4, 1), (1, 2)),
    "part of split with sizes": (
        IMAGE, lambda g, x: part(g, x, aten.split_with_sizes.default, 1, [1, 5], -1), (1, 2, 3)
    ),
    "part of chunk": (TOKENS, lambda g, x: part(g, x, aten.chunk.default, 2, 4, 1), (1, 2)),
    "part of unbind": (IMAGE, lambda g, x: part(g, x, aten.unbind.int, 3, 2), (1, 2)),
}  # fmt: skip


@functools.cache
def built(case: str) -> tuple[Site, dict[Node, Any]]:
    """The call, and the value of every node in float64 at batch 2."""
    shape, build, _ = CASES[case]
    program = seed_program(shape).copy()
    generator = torch.Generator().manual_seed(0)
    node = build(Grower(program, lambda _: None, generator), program.calls()[0])
    values: dict[Node, Any] = {}
    program.tensors = {k: t.double() if t.is_floating_point() else t for k, t in program.tensors.items()}
    program.run(torch.randn(2, *shape, generator=generator, dtype=torch.float64) + 1, observe=values.__setitem__)
    values.update({n: program.tensors[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"})
    return Site(program, node), values


def taken(value: Tensor, box: Box) -> Tensor:
    for axis, rows in box.axes:
        value = value.index_select(axis, torch.tensor(rows))
    return value


def computed(site: Site, values: dict[Node, Any], operands: Any, target: Any) -> Tensor:
    def filled(operand: Any) -> Any:
        if isinstance(operand, list):
            return [filled(each) for each in operand]
        if isinstance(operand, Read):
            value = values[site.operand(*operand.place)]
            return taken(value, operand.box) if isinstance(value, Tensor) else value
        return operand

    given = [filled(each) for each in operands]
    if target is None:
        value: Tensor = given[0]
        return value
    args, kwargs = dialect.arguments(target, given)
    made: Tensor = target(*args, **kwargs)
    return made


@settings(max_examples=12, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@pytest.mark.parametrize("case", CASES)
@given(st.data())
def test_narrowed_call_computes_the_part_that_is_asked_for_when_it_is(case: str, data: st.DataObject) -> None:
    site, values = built(case)
    shape = site.shape
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, int)]
    chosen = data.draw(st.lists(st.sampled_from(axes), unique=True)) if axes else []
    rows = {axis: data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1)) for axis in chosen}
    asked = box_of(rows, shape)
    found = narrowing(site, asked)
    assert found.gives.contains(asked)
    assert bool(found.reason) == (found.gives != asked)
    apart = set(CASES[case][2])
    assert asked.on(apart) == found.gives.on(apart), "an axis that is apart is computed in part"
    expected = taken(values[site.node], found.gives)
    ours = computed(site, values, found.operands, found.target)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    if ours.numel():
        assert float((ours.double() - expected.double()).abs().max()) <= TOLERANCE * max(1, math.sqrt(ours.numel()))


def test_cases_cover_every_rule_when_listed() -> None:
    met = {RULES[dialect.op_name(built(case)[0].reader)] for case in CASES}
    assert met == set(RULES.values())
