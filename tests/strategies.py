"""Random Programs for property tests.

A Program grows by one operator at a time from a captured seed with a dynamic batch, so no example costs a capture.
``OPERATORS`` maps a name to a builder ``(grower, node) -> node``; a builder returns None where it does not apply. To
cover a new operator, write a builder and add its line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx import Node

from tests.growing import Grower, finished, seed_program
from tests.layout_growing import LAYOUT
from vlexport.ir.program import Program

aten = torch.ops.aten


def _conv2d(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) != 3:
        return None
    channels, height, width = g.shape(x)
    groups = g.pick(1, channels)
    out = groups * g.pick(1, 2) if groups > 1 else g.pick(2, 3, 4)
    kernel = g.pick(1, 3)
    dilation = g.pick(1, 2)
    reach = dilation * (kernel - 1) + 1
    padding = g.pick(0, kernel // 2)
    if min(height, width) + 2 * padding < reach or not g.small(x):
        return None
    weight = g.tensor(out, channels // groups, kernel, kernel)
    bias = g.tensor(out) if g.pick(True, False) else None
    if g.pick(False, False, True):
        return g.call(aten.conv2d.padding, x, weight, bias, [1, 1], "same", [dilation, dilation], groups)
    stride = g.pick(1, 2)
    return g.call(
        aten.conv2d.default, x, weight, bias, [stride, stride], [padding, padding], [dilation, dilation], groups
    )


def _conv_transpose2d(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) != 3 or not g.small(x) or max(g.shape(x)[1:]) > 8:
        return None
    channels = g.shape(x)[0]
    groups = g.pick(1, 2) if channels % 2 == 0 else 1
    per_group = g.pick(1, 2)
    weight = g.tensor(channels, per_group, 2, 2)
    bias = g.tensor(per_group * groups) if g.pick(True, False) else None
    stride = g.pick(1, 2)
    return g.call(aten.conv_transpose2d.input, x, weight, bias, [stride, stride], [0, 0], [0, 0], groups)


def _batch_norm(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) not in (1, 2, 3):
        return None
    channels = g.shape(x)[0]
    affine = g.pick(True, True, False)
    gamma, beta = (g.tensor(channels), g.tensor(channels)) if affine else (None, None)
    mean, variance = g.tensor(channels, kind="buffer"), g.tensor(channels, positive=True, kind="buffer")
    return g.call(aten.batch_norm.default, x, gamma, beta, mean, variance, False, 0.1, g.pick(1e-5, 1e-3), False)


def _then_batch_norm(first: Callable[[Grower, Node], Node | None]) -> Callable[[Grower, Node], Node | None]:
    def build(g: Grower, x: Node) -> Node | None:
        made = first(g, x)
        return _batch_norm(g, made) if made is not None else None

    return build


def _read_twice_then_batch_norm(g: Grower, x: Node) -> Node | None:
    made = _conv2d(g, x)
    normed = _batch_norm(g, made) if made is not None else None
    return g.call(aten.add.Tensor, normed, made) if normed is not None else None


def _tied_weight(g: Grower, x: Node) -> Node | None:
    """The same weight in two linears, each with its own batch norm."""
    if len(g.shape(x)) != 1:
        return None
    width = g.shape(x)[-1]
    weight = g.tensor(width, width)
    left = _batch_norm(g, g.call(aten.linear.default, x, weight))
    return _batch_norm(g, g.call(aten.linear.default, left, weight))


def _linear(g: Grower, x: Node) -> Node | None:
    out = g.pick(2, 3, 5)
    bias = g.tensor(out) if g.pick(True, False) else None
    return g.call(aten.linear.default, x, g.tensor(out, g.shape(x)[-1]), bias)


def _layer_norm(g: Grower, x: Node) -> Node | None:
    width = g.shape(x)[-1]
    if width < 2:
        return None  # one value normalises to its bias whatever it is
    return g.call(aten.layer_norm.default, x, [width], g.tensor(width), g.tensor(width))


def _norm_then_linears(g: Grower, x: Node) -> Node | None:
    """A norm that one or two linears read, one of them perhaps behind a view."""
    if len(g.shape(x)) < 2 or g.shape(x)[-1] < 2 or not g.small(x):
        return None
    width, rank = g.shape(x)[-1], len(g.shape(x)) + 1
    shift = g.tensor(width) if g.pick(True, False) else None
    norm = g.call(aten.layer_norm.default, x, [width], g.tensor(width), shift)
    swapped = g.call(aten.permute.default, norm, [0, *range(rank - 2, 0, -1), rank - 1])
    read = g.pick(norm, norm, swapped)
    left = g.call(aten.linear.default, read, g.tensor(3, width), g.tensor(3) if g.pick(True, True, False) else None)
    if g.pick(True, False):
        return left
    return g.call(aten.mul.Tensor, left, g.call(aten.linear.default, read, g.tensor(3, width), g.tensor(3)))


def _linear_then_scale(g: Grower, x: Node) -> Node | None:
    """A linear, views, and a factor for each channel, for each token, or for all; perhaps of a part."""
    if len(g.shape(x)) != 2 or not g.small(x):
        return None
    length, width = g.shape(x)
    made = g.call(aten.linear.default, x, g.tensor(4, width), g.tensor(4) if g.pick(True, False) else None)
    form = g.pick("plain", "heads", "swapped", "part", "tokens")
    if form == "plain":
        return g.call(aten.mul.Tensor, made, g.pick(g.tensor(4), 0.3))
    if form == "tokens":
        return g.call(aten.mul.Tensor, made, g.tensor(length, 1))
    if form == "part":
        half = g.call(aten.slice.Tensor, made, g.pick(1, 2), 0, 2)
        rest = g.call(aten.slice.Tensor, made, g.pick(1, 2), 2, 4)
        scaled = g.call(aten.mul.Tensor, half, g.tensor(g.shape(half)[-1]))
        return scaled if g.shape(half) != g.shape(rest) else g.call(aten.add.Tensor, scaled, rest)
    if form == "swapped":
        swapped = g.call(aten.permute.default, made, [0, 2, 1])
        return g.call(aten.div.Tensor, swapped, g.tensor(4, 1, positive=True))
    split = g.call(aten.reshape.default, made, [-1, length, 2, 2])
    return g.call(aten.mul.Tensor, g.call(aten.permute.default, split, [0, 2, 1, 3]), g.tensor(2, 1, 1))


def _scaled_input_then_conv(g: Grower, x: Node) -> Node | None:
    """Factors and shifts of an input's channels, then a convolution."""
    image = g.program.placeholders[0]
    if len(g.shape(image)) != 3 or not g.small(image):
        return None
    channels = g.shape(image)[0]
    value = image
    for _ in range(g.pick(1, 2, 3)):
        target = g.pick(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
        operand = g.pick(g.tensor(channels, 1, 1, positive=True), 0.5)
        swapped = target in (aten.mul.Tensor, aten.sub.Tensor) and isinstance(operand, Node) and g.pick(True, False)
        value = g.call(target, operand, value) if swapped else g.call(target, value, operand)
    return _conv2d(g, value)


def _linears_of_one(g: Grower, x: Node) -> Node | None:
    """Two or three linears of one value, with and without bias, perhaps one that is tied or of a part."""
    if not g.small(x):
        return None
    width = g.shape(x)[-1]
    first = g.tensor(3, width)
    weights = [first, g.tensor(3, width), g.pick(g.tensor(3, width), first)][: g.pick(2, 3)]
    biases = [g.tensor(3) if g.pick(True, False) else None for _ in weights]
    made = [g.call(aten.linear.default, x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return functools.reduce(lambda a, b: g.call(g.pick(aten.mul.Tensor, aten.sub.Tensor), a, b), made)


def _unary(target: Any, **kwargs: Any) -> Callable[[Grower, Node], Node | None]:
    return lambda g, x: g.call(target, x, **kwargs)


def _with_parameter(target: Any) -> Callable[[Grower, Node], Node | None]:
    def build(g: Grower, x: Node) -> Node | None:
        sizes = g.shape(x)
        parameter = g.tensor(*g.pick((sizes[-1],), (sizes[0], *[1] * (len(sizes) - 1))))
        return g.call(target, x, parameter) if g.pick(True, False) else g.call(target, parameter, x)

    return build


def _residual(g: Grower, x: Node) -> Node | None:
    return g.call(aten.add.Tensor, x, g.call(g.pick(aten.tanh.default, aten.neg.default), x))


def _softmax(g: Grower, x: Node) -> Node | None:
    return g.call(aten.softmax.int, x, -1) if g.shape(x)[-1] > 1 else None


def _matmul(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) == 2 and g.pick(True, False) and g.small(x):
        scores = g.call(aten.matmul.default, x, g.call(aten.transpose.int, x, -2, -1))
        return g.call(aten.matmul.default, g.call(aten.softmax.int, scores, -1), x)
    return g.call(aten.matmul.default, x, g.tensor(g.shape(x)[-1], g.pick(2, 4)))


def _mean(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) < 2:
        return None
    return g.call(aten.mean.dim, x, g.pick([-1], [1], [-2]), g.pick(True, False))


def _difference(g: Grower, x: Node) -> Node | None:
    return g.call(aten.diff.default, x) if g.shape(x)[-1] > 1 else None


def _pool(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) != 3 or min(g.shape(x)[1:]) < 2:
        return None
    return g.call(g.pick(aten.max_pool2d.default, aten.avg_pool2d.default), x, [2, 2], g.pick([1, 1], [2, 2]))


def _pad(g: Grower, x: Node) -> Node | None:
    if not g.small(x):
        return None
    return g.call(aten.pad.default, x, [g.pick(0, 1), 1], "constant", g.pick(0.0, 0.5))


def _upsample(g: Grower, x: Node) -> Node | None:
    if len(g.shape(x)) != 3 or not g.small(x) or max(g.shape(x)[1:]) > 8:
        return None
    if g.pick(True, False):
        return g.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    return g.call(aten.upsample_bilinear2d.vec, x, None, False, [2.0, 2.0])


def _no_op(g: Grower, x: Node) -> Node | None:
    target = g.pick(aten.clone.default, aten.contiguous.default, aten.view_as.default, aten.type_as.default)
    if target in (aten.view_as.default, aten.type_as.default):
        return g.call(target, x, x)
    return g.call(target, x)


def _constant(g: Grower, x: Node) -> Node | None:
    """A stored tensor, or a made one, goes through some operators and then meets the value."""
    width = g.shape(x)[-1]
    if g.pick(True, True, False):
        value = g.tensor(width, 2) if g.pick(True, False) else g.tensor(width, 1)
    else:
        value = g.call(aten.unsqueeze.default, g.call(aten.full.default, [width], g.pick(0.5, 2.0)), -1)
    for _ in range(g.pick(1, 2, 3)):
        target = g.pick(
            aten.tanh.default, aten.sigmoid.default, aten.add.Tensor, aten.permute.default, aten.expand.default
        )
        if target is aten.add.Tensor:
            value = g.call(target, value, g.tensor(1))
        elif target is aten.permute.default:
            value = g.call(target, g.call(target, value, [1, 0]), [1, 0])
        elif target is aten.expand.default:
            value = g.call(target, value, [-1, -1])
        else:
            value = g.call(target, value)
    column = g.call(aten.select.int, value, 1, 0)
    made = g.call(aten.mul.Tensor, x, column)
    if g.pick(False, False, True):  # the constant is also read as it was
        return g.call(aten.add.Tensor, made, g.call(aten.sum.dim_IntList, value, [1]))
    return made


def _duplicates(g: Grower, x: Node) -> Node | None:
    """Equal calls, in chains and with operands that are equal tensors stored twice."""
    weight = g.tensor(g.shape(x)[-1])
    twins = []
    for _ in range(g.pick(2, 3)):
        copy = g.program.tensors[str(weight.target)].clone()
        again = g.program.add_tensor("twin", copy, before=g.program.output) if g.pick(True, False) else weight
        twins.append(g.call(aten.tanh.default, g.call(aten.mul.Tensor, x, again)))
    total = twins[0]
    for twin in twins[1:]:
        total = g.call(aten.add.Tensor, total, twin)
    return total


def _near_duplicates(g: Grower, x: Node) -> Node | None:
    """Calls that differ in a keyword, a constant or a tensor's content alone."""
    kind = g.pick("keyword", "constant", "tensor")
    if kind == "keyword":
        pair = [g.call(aten.gelu.default, x, approximate=a) for a in ("none", "tanh")]
    elif kind == "constant":
        pair = [g.call(aten.clamp.default, x, low) for low in (-0.5, 0.0)]
    else:
        pair = [g.call(aten.mul.Tensor, x, g.tensor(g.shape(x)[-1])) for _ in range(2)]
    return g.call(aten.add.Tensor, pair[0], pair[1])  # a difference of twins would be all rounding


def _masks(g: Grower, x: Node) -> Node | None:
    """relu, by two masks joined with Python's operators: continuous, so that rounding decides nothing."""
    target, other = g.pick((aten.__and__.Tensor, -1.0), (aten.__or__.Tensor, 1.0), (aten.__xor__.Tensor, 1e9))
    mask = g.call(target, g.call(aten.gt.Scalar, x, 0.0), g.call(aten.gt.Scalar, x, other))
    return g.call(aten.where.ScalarOther, mask, x, 0.0)


def _fill(g: Grower, x: Node) -> Node | None:
    """A slice of zeros or of a stored number in place of the first values."""
    if g.shape(x)[-1] < 2:
        return None
    head = g.call(aten.slice.Tensor, x, -1, 0, 1)
    if g.pick(True, False):
        filled = g.call(aten.fill.Scalar, head, g.pick(0.0, 0.5))
    else:
        filled = g.call(aten.fill.Tensor, head, g.tensor())
    return g.call(aten.slice_scatter.default, x, filled, -1, 0, 1)


def _dead(g: Grower, x: Node) -> Node | None:
    """A chain that nobody reads, with a tensor of its own."""
    made = g.call(aten.mul.Tensor, x, g.tensor(g.shape(x)[-1]))
    g.dead.add(g.call(aten.tanh.default, made) if g.pick(True, False) else made)
    return x


def _round_trip(g: Grower, x: Node) -> Node | None:
    """Out of a layout, some operators there, and back; or on from there."""
    sizes = g.shape(x)
    if len(sizes) < 2 or not g.small(x):
        return None
    dims = [0, *g.draw(st.permutations(list(range(1, len(sizes) + 1))))]
    kind = g.pick("permute", "permute", "join", "tokens")
    if kind == "permute":
        value = g.call(aten.permute.default, x, dims)
    elif kind == "join":
        value = g.call(aten.reshape.default, x, [-1, sizes[0] * sizes[1], *sizes[2:]])
    else:
        flat = g.call(aten.reshape.default, x, [-1, sizes[0], math.prod(sizes[1:])])
        value = g.call(aten.permute.default, flat, [0, 2, 1])
    steps = (
        "tanh",
        "add",
        "sub",
        "mul",
        "softmax",
        "residual",
        "linear",
        "layer_norm",
        "mean",
        "split",
        "cat",
        "slice",
    )
    for _ in range(g.pick(1, 1, 2, 3)):
        value = OPERATORS[g.pick(*steps)](g, value) or value
    if g.pick(False, False, True):
        return value
    rank = len(g.shape(value)) + 1
    if kind == "permute" and rank == len(dims):
        return g.call(aten.permute.default, value, [dims.index(i) for i in range(len(dims))])
    if kind == "join" and g.shape(value)[0] == sizes[0] * sizes[1]:
        return g.call(aten.reshape.default, value, [-1, *sizes[:2], *g.shape(value)[1:]])
    return g.call(aten.permute.default, value, [0, 2, 1]) if rank == 3 else value


OPERATORS: dict[str, Callable[[Grower, Node], Node | None]] = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "batch_norm": _batch_norm,
    "conv2d, batch_norm": _then_batch_norm(_conv2d),
    "conv_transpose2d, batch_norm": _then_batch_norm(_conv_transpose2d),
    "linear, batch_norm": _then_batch_norm(_linear),
    "conv2d read twice, batch_norm": _read_twice_then_batch_norm,
    "tied linears": _tied_weight,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "relu": _unary(aten.relu.default),
    "gelu": _unary(aten.gelu.default),
    "gelu tanh": _unary(aten.gelu.default, approximate="tanh"),
    "silu": _unary(aten.silu.default),
    "sigmoid": _unary(aten.sigmoid.default),
    "add": _with_parameter(aten.add.Tensor),
    "sub": _with_parameter(aten.sub.Tensor),
    "mul": _with_parameter(aten.mul.Tensor),
    "smaller": _with_parameter(aten.min.other),
    "larger": _with_parameter(aten.max.other),
    "residual": _residual,
    "softmax": _softmax,
    "matmul": _matmul,
    **LAYOUT,
    "round trip": _round_trip,
    "mean": _mean,
    "difference": _difference,
    "pool": _pool,
    "pad": _pad,
    "tanh": _unary(aten.tanh.default),
    "upsample": _upsample,
    "no-op": _no_op,
    "constant": _constant,
    "duplicates": _duplicates,
    "near duplicates": _near_duplicates,
    "masks": _masks,
    "fill": _fill,
    "dead": _dead,
    "layer_norm, linears": _norm_then_linears,
    "linear, scale": _linear_then_scale,
    "linears of one value": _linears_of_one,
    "scaled input, conv2d": _scaled_input_then_conv,
}
"""Name → builder."""

INPUT_SHAPES = ((3, 6, 6), (2, 5, 7), (4, 6), (8,))


@st.composite
def programs(draw: Any, *, most: int = 9, including: tuple[str, ...] = ()) -> Program:
    """A random Program of at most ``most`` operators, one or two outputs and a dynamic batch.

    Args:
        draw: Hypothesis' own.
        most: Operators at most.
        including: Names that are drawn half of the time, so that the pass under test has something to do.
    """
    program = seed_program(draw(st.sampled_from(INPUT_SHAPES))).copy()
    grower = Grower(program, draw, torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    value = program.calls()[0]
    passed = [value]
    everything = tuple(OPERATORS)
    for _ in range(draw(st.integers(min(4, most), most))):
        names = including if including and draw(st.booleans()) else everything
        made = OPERATORS[draw(st.sampled_from(names))](grower, value)
        if made is not None:
            value = made
            passed.append(made)
    second = draw(st.sampled_from(passed)) if draw(st.integers(0, 3)) == 0 else None
    return finished(program, [value] if second in (None, value) else [value, second], grower.dead)
