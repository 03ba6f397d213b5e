"""What a call does to the channels of its operand: the rules by which operators enter the affine domain.

Weights and constants must be stored: a value that is computed, dequantized weights among them, is no part of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.affine.bands import whole
from vlexport.passes.affine.expression import Leaf, Spec
from vlexport.passes.affine.taps import Taps
from vlexport.passes.layout.axis_maps import AxisMap
from vlexport.passes.layout.views import LAYOUT, map_of, operand_of
from vlexport.passes.match import same_shape

BATCH_NORM = "aten.batch_norm.default"
_LINEAR = "aten.linear.default"
_ADDMM = "aten.addmm.default"
_PRODUCTS = ("aten.matmul.default", "aten.mm.default")
_POOLS = ("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
_TRAINING, _EPSILON = 5, 7


@dataclass(frozen=True)
class Mapped:
    """A convolution, linear or pool of one value.

    Attributes:
        operand: The value.
        axis: Its channels, and those of the result.
        leaf: The map.
    """

    operand: Node
    axis: int
    leaf: Leaf


@dataclass(frozen=True)
class Rescaled:
    """A value times a constant plus a constant.

    Attributes:
        operand: The value.
        axis: The channels; None where both constants are numbers.
        factor: A number, or one a channel in float64.
        shift: Likewise.
    """

    operand: Node
    axis: int | None
    factor: Tensor | float
    shift: Tensor | float


@dataclass(frozen=True)
class Added:
    """``first + factor · second``, values of one shape."""

    first: Node
    second: Node
    factor: float


@dataclass(frozen=True)
class Joined:
    """Values side by side along ``axis``."""

    operands: tuple[Node, ...]
    axis: int


@dataclass(frozen=True)
class Picked:
    """Some channels in a row."""

    operand: Node
    axis: int
    first: int
    count: int


@dataclass(frozen=True)
class Viewed:
    """A value with its axes cut, joined or in another order."""

    operand: Node
    axes: AxisMap


@dataclass(frozen=True)
class Refused:
    """A call that is affine in general but not here.

    Attributes:
        reason: Why not.
    """

    reason: str


Reading = Mapped | Rescaled | Added | Joined | Picked | Viewed | Refused


def read(program: Program, node: Node) -> Reading | None:
    """The map of a call; None for one that has none."""
    value = node.meta.get("val")
    rule = _RULES.get(dialect.op_name(node))
    if rule is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    found = rule(program, node)
    if found is not None and not isinstance(found, Refused):
        operands = found.operands if isinstance(found, Joined) else _operands(found)
        if any(operand.meta["val"].dtype != value.dtype for operand in operands):
            return None
    if isinstance(found, Rescaled) and not all(_is_held(each, value.dtype) for each in (found.factor, found.shift)):
        return Refused("the scale or shift is not finite")
    return found


def _is_held(number: Tensor | float, dtype: torch.dtype) -> bool:
    """Whether a dtype holds a number: by a variance of 0, or one that is far too small, nothing can be divided."""
    return bool(torch.as_tensor(number, dtype=torch.float64).to(dtype).isfinite().all())


def _operands(found: Mapped | Rescaled | Added | Picked | Viewed) -> tuple[Node, ...]:
    return (found.first, found.second) if isinstance(found, Added) else (found.operand,)


def _stored(program: Program, *operands: Any) -> bool:
    return all(operand is None or program.tensor_of(operand) is not None for operand in operands)


def _convolution(program: Program, node: Node) -> Reading | None:
    x, weight, bias, stride, padding, dilation, groups = dialect.operands(node)
    stored = program.tensor_of(weight)
    if stored is None or not _stored(program, bias):
        return Refused("the convolution's weight or bias is computed, not stored")
    rank = stored.ndim - 2
    if x.meta["val"].ndim != stored.ndim:
        return Refused("the convolution's input has no batch axis, so batch norm takes another axis for its channels")
    strides, dilations = _each(stride, rank), _each(dilation, rank)
    taps, reach = [], []
    for i, count in enumerate(stored.shape[2:]):
        span = dilations[i] * (count - 1)
        before, after = _padding(padding, i, span)
        taps.append(Taps(-before, dilations[i] if count > 1 else 1, count))
        reach.append(before + after - span)
    outputs, inputs = stored.shape[0], stored.shape[1] * groups
    spec = Spec(
        outputs, inputs, whole(outputs, inputs, groups), strides, tuple(taps), tuple(reach), biased=bias is not None
    )
    return Mapped(x, 1, Leaf(spec, 0, stored, program.tensor_of(bias)))


def _padding(padding: Any, axis: int, span: int) -> tuple[int, int]:
    if isinstance(padding, str):
        return (span // 2, span - span // 2) if padding == "same" else (0, 0)
    width = padding[axis] if len(padding) > 1 else padding[0]
    return width, width


def _each(given: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(given) if len(given) == rank else tuple(given) * rank


def _transposed(program: Program, node: Node) -> Reading | None:
    x, weight, bias, stride, padding, output_padding, groups, dilation = dialect.operands(node)
    stored = program.tensor_of(weight)
    if stored is None or not _stored(program, bias):
        return Refused("the convolution's weight or bias is computed, not stored")
    rank = stored.ndim - 2
    if x.meta["val"].ndim != stored.ndim:
        return Refused("the convolution's input has no batch axis, so batch norm takes another axis for its channels")
    outputs, inputs = stored.shape[1] * groups, stored.shape[0]
    spec = Spec(
        outputs, inputs, whole(outputs, inputs, groups), (1,) * rank,
        tuple(Taps(0, 1, count) for count in stored.shape[2:]), (0,) * rank, biased=bias is not None,
        scatter=tuple(_each(given, rank) for given in (stride, padding, output_padding, dilation)),
    )  # fmt: skip
    return Mapped(x, 1, Leaf(spec, 0, stored, program.tensor_of(bias), inputs_first=True))


def _linear(program: Program, node: Node) -> Reading | None:
    x, weight, bias = dialect.operands(node)
    return _matrix(program, x, weight, bias, inputs_first=False)


def _product(program: Program, node: Node) -> Reading | None:
    x, weight = dialect.operands(node)
    return _matrix(program, x, weight, None, inputs_first=True)


def _addmm(program: Program, node: Node) -> Reading | None:
    bias, x, weight, beta, alpha = dialect.operands(node)
    if beta != 1 or alpha != 1 or bias.meta["val"].ndim != 1:
        return None
    return _matrix(program, x, weight, bias, inputs_first=True)


def _matrix(program: Program, x: Any, weight: Any, bias: Any, *, inputs_first: bool) -> Reading | None:
    stored = program.tensor_of(weight)
    if stored is None or not _stored(program, bias):
        return Refused("the linear's weight or bias is computed, not stored")
    if stored.ndim != 2 or not isinstance(x, Node) or x.meta["val"].ndim < 2 or program.tensor_of(x) is not None:
        return None
    axis = x.meta["val"].ndim - 1
    outputs, inputs = reversed(stored.shape) if inputs_first else stored.shape
    rank = axis - 1
    spec = Spec(
        outputs, inputs, whole(outputs, inputs, 1), (1,) * rank, (Taps(),) * rank, (0,) * rank, biased=bias is not None
    )
    return Mapped(x, axis, Leaf(spec, 0, stored, program.tensor_of(bias), inputs_first=inputs_first))


def _batch_norm(program: Program, node: Node) -> Reading | None:
    x, gamma, beta, mean, variance, training, _, epsilon, *_ = dialect.operands(node)
    if training:
        return Refused("the batch norm uses batch statistics (train mode)")
    if mean is None or variance is None or not _stored(program, mean, variance):
        return Refused("the batch norm's statistics are computed, not stored")
    if not _stored(program, gamma, beta):
        return Refused("the batch norm's scale or shift is computed, not stored")
    factor = torch.rsqrt(program.tensors[_name(variance)].double() + float(epsilon))
    if gamma is not None:
        factor = factor * program.tensors[_name(gamma)].double()
    shift = -program.tensors[_name(mean)].double() * factor
    if beta is not None:
        shift = shift + program.tensors[_name(beta)].double()
    return Rescaled(x, 1, factor, shift)


def _name(node: Node) -> str:
    return str(node.target)


def _pool(program: Program, node: Node) -> Reading | None:
    x, kernel, stride, padding, ceil_mode, counts_padding, *rest = dialect.operands(node)
    divisor = rest[0] if rest else None
    rank = int(dialect.plain_name(node)[len("avg_pool")])
    if x.meta["val"].ndim != rank + 2:
        return None
    kernels, pads = _each(kernel, rank), _each(padding, rank)
    strides = _each(stride, rank) if stride else kernels
    if ceil_mode:
        return Refused("the pool rounds its size up (ceil_mode)")
    if not counts_padding and any(pads) and divisor is None:
        return Refused("the pool divides by what lies inside (count_include_pad is off)")
    taps = tuple(Taps(-pad, 1, count) for pad, count in zip(pads, kernels, strict=True))
    reach = tuple(2 * pad - count + 1 for pad, count in zip(pads, kernels, strict=True))
    channels = int(x.meta["val"].shape[1])
    spec = Spec(channels, channels, whole(channels, channels, channels), strides, taps, reach)
    return Mapped(x, 1, Leaf(spec, 0, fill=1.0 / (divisor or math.prod(kernels))))


def _arithmetic(program: Program, node: Node) -> Reading | None:
    name = dialect.plain_name(node)
    operands = dialect.operands(node)
    if name == "neg":
        return Rescaled(operands[0], None, -1.0, 0.0)
    a, b, *rest = operands
    alpha = float(rest[0]) if rest and isinstance(rest[0], (int, float)) else 1.0
    constant_a, constant_b = _constant(program, a), _constant(program, b)
    if constant_a is None and constant_b is None:
        return _of_two(name, a, b, alpha, node)
    if constant_a is not None and constant_b is not None:
        return None
    value, constant = (a, constant_b) if constant_a is None else (b, constant_a)
    if constant is None or not isinstance(value, Node) or value.meta["val"].ndim < 2:
        return None
    if not same_shape(value.meta["val"].shape, node.meta["val"].shape):
        return None
    placed = _per_channel(constant, value.meta["val"])
    if placed is None:
        return None
    axis, stored = placed
    return _rescaled(name, value, axis, stored, alpha, constant_first=constant_a is not None)


def _rescaled(
    name: str, value: Node, axis: int | None, stored: Any, alpha: float, *, constant_first: bool
) -> Reading | None:
    if name == "mul":
        return Rescaled(value, axis, stored, 0.0)
    if name == "div":
        divides = constant_first or not bool(torch.as_tensor(stored).all())
        return None if divides else Rescaled(value, axis, 1.0 / stored, 0.0)
    if name == "rsub":  # b − alpha · a
        return Rescaled(value, axis, 1.0, -alpha * stored) if constant_first else Rescaled(value, axis, -alpha, stored)
    sign = 1.0 if name == "add" else -1.0
    if constant_first:
        return Rescaled(value, axis, sign * alpha, stored)
    return Rescaled(value, axis, 1.0, sign * alpha * stored)


def _of_two(name: str, a: Any, b: Any, alpha: float, node: Node) -> Reading | None:
    if name not in ("add", "sub", "rsub") or not isinstance(a, Node) or not isinstance(b, Node):
        return None
    shape = node.meta["val"].shape
    if not all(same_shape(each.meta["val"].shape, shape) for each in (a, b)):
        return None
    if name == "rsub":
        return Added(b, a, -alpha)
    return Added(a, b, alpha if name == "add" else -alpha)


def _constant(program: Program, operand: Any) -> Tensor | float | None:
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return float(operand)
    return program.tensor_of(operand)


def _per_channel(constant: Tensor | float, value: Tensor) -> tuple[int | None, Tensor | float] | None:
    """The axis along which a constant differs and what it is there in float64; None where it differs along others."""
    if not isinstance(constant, Tensor) or constant.numel() == 1:
        number = float(constant)
        return (None, number) if math.isfinite(number) else None
    wide = [axis for axis, size in enumerate(constant.shape) if size != 1]
    axis = wide[0] + value.ndim - constant.ndim
    if len(wide) > 1 or axis < 1 or not constant.is_floating_point() or not bool(constant.isfinite().all()):
        return None
    return axis, constant.double().flatten()


def _join(program: Program, node: Node) -> Reading | None:
    parts, dim = dialect.operands(node)
    rank = node.meta["val"].ndim
    if any(part.meta["val"].ndim != rank for part in parts) or dim % rank == 0:
        return None
    return Joined(tuple(parts), dim % rank)


def _slice(program: Program, node: Node) -> Reading | None:
    x, dim, start, stop, step = dialect.operands(node)
    shape = x.meta["val"].shape
    axis = dim % len(shape)
    size = shape[axis]
    ends = (start if start is not None else 0, stop if stop is not None else size)
    if axis == 0 or step != 1 or not all(isinstance(each, int) for each in (size, *ends)):
        return None
    first, last, _ = slice(*ends).indices(size)
    return Picked(x, axis, first, last - first) if last > first else None


def _piece(program: Program, node: Node) -> Reading | None:
    cut, index = node.args
    if not isinstance(cut, Node) or not isinstance(index, int):
        return None
    if dialect.op_name(cut) not in ("aten.split_with_sizes.default", "aten.split.Tensor", "aten.chunk.default"):
        return None
    x, _, dim = dialect.operands(cut)
    axis = dim % x.meta["val"].ndim
    sizes = [piece.shape[axis] for piece in cut.meta["val"]]
    if axis == 0 or not all(isinstance(size, int) for size in sizes):
        return None
    return Picked(x, axis, sum(sizes[:index]), sizes[index])


def _view(program: Program, node: Node) -> Reading | None:
    axes = map_of(node)
    return Viewed(operand_of(node), axes) if axes is not None else None


_Rule = Callable[[Program, Node], "Reading | None"]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(dialect.CONVOLUTIONS, _convolution),
    **dict.fromkeys(dialect.TRANSPOSED_CONVOLUTIONS, _transposed),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(LAYOUT, _view),
    **dict.fromkeys(
        (
            "aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor", "aten.mul.Tensor", "aten.div.Tensor",
            "aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar", "aten.mul.Scalar", "aten.div.Scalar",
            "aten.neg.default",
        ),
        _arithmetic,
    ),
    _LINEAR: _linear, _ADDMM: _addmm, BATCH_NORM: _batch_norm, "aten.cat.default": _join,
    "aten.slice.Tensor": _slice, "operator.getitem": _piece,
}  # fmt: skip
