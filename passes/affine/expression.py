"""Lazy affine expressions: what a value is of its root, without a weight computed.

An expression is a tree of convolutions, scales, sums, joins and picks with a :class:`Spec`, which says all that a
decision needs: channels, who reads whom, taps, number of results, cost. ``passes/affine/kernel`` computes the weights
of those expressions that are worth it.

Equation: ``y[n, o, i] = Σ W[o, c, t] · x0[n, c, stride · i + t] + b[o]``, where ``x0`` is the root with zeros on all
sides. The rules below return a reason where this does not hold at the border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vlexport.passes.affine.bands import Band, Bands, behind, groups_of, moved, picked, together, whole
from vlexport.passes.affine.taps import Taps, is_zero_outside, reaches

Lengths = tuple[int | None, ...]
"""Sizes of the root's axes but the first and the channels; None for one that the input decides."""
DEEPEST = 200
"""Expressions within expressions beyond which nothing is merged any more: evaluation is recursive."""


@dataclass(frozen=True)
class Spec:
    """What an expression is like.

    Attributes:
        outputs: Channels of the value.
        inputs: Channels of the root.
        bands: Which outputs read which inputs.
        stride: Of every axis but the first and the channels.
        taps: Offsets of the kernel along these axes.
        reach: See ``passes/affine/taps``.
        biased: Whether something is added.
        scatter: Stride, padding, output padding and dilation of a transposed convolution, whose taps are only counted.
    """

    outputs: int
    inputs: int
    bands: Bands
    stride: tuple[int, ...]
    taps: tuple[Taps, ...]
    reach: tuple[int, ...]
    biased: bool = False
    scatter: tuple[tuple[int, ...], ...] | None = None

    @property
    def groups(self) -> int:
        """The most groups in which all bands fit."""
        return groups_of(self.bands, self.outputs, self.inputs)

    @property
    def is_pointwise(self) -> bool:
        """Whether every result reads one position, its own."""
        rank = len(self.taps)
        return self.scatter is None and (self.stride, self.taps, self.reach) == (
            (1,) * rank,
            (Taps(),) * rank,
            (0,) * rank,
        )


@dataclass(frozen=True)
class Expression:
    """What all expressions have.

    Attributes:
        spec: What it is like.
        depth: Expressions within it.
    """

    spec: Spec
    depth: int


@dataclass(frozen=True)
class Leaf(Expression):
    """One convolution, linear, pool or identity of the graph.

    Attributes:
        weight: As stored; None where every tap is ``fill``, channel by channel.
        bias: As stored.
        inputs_first: The weight is ``[inputs, outputs per group, …]``, as of a transposed convolution or a matmul.
        fill: Value of every tap where there is no weight.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    inputs_first: bool = False
    fill: float = 1.0


@dataclass(frozen=True)
class Composed(Expression):
    """``outer`` behind ``inner``."""

    outer: Leaf
    inner: Expression


@dataclass(frozen=True)
class Scaled(Expression):
    """``of · factor + shift``, a number or one a channel in float64."""

    of: Expression
    factor: Tensor | float
    shift: Tensor | float


@dataclass(frozen=True)
class Sum(Expression):
    """The sum of expressions, each times a number."""

    parts: tuple[tuple[Expression, float], ...]


@dataclass(frozen=True)
class Join(Expression):
    """Expressions side by side along the channels."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Pick(Expression):
    """Channels from ``first`` on, as many as the spec has outputs."""

    of: Expression
    first: int


@dataclass(frozen=True)
class Reranked(Expression):
    """A pointwise expression of a value that has more or fewer axes, its channels among them."""

    of: Expression


def identity(channels: int, rank: int) -> Leaf:
    """The root itself."""
    spec = Spec(channels, channels, whole(channels, channels, channels), (1,) * rank, (Taps(),) * rank, (0,) * rank)
    return Leaf(spec, 0)


def is_identity(expression: Expression) -> bool:
    """Whether an expression is the root itself, or its channels times something."""
    while isinstance(expression, (Scaled, Reranked)):
        expression = expression.of
    return isinstance(expression, Leaf) and expression.weight is None and expression.spec.is_pointwise


def reranked(of: Expression, rank: int) -> Expression:
    """A pointwise expression for values of ``rank`` axes beside the first and the channels."""
    spec = replace(of.spec, stride=(1,) * rank, taps=(Taps(),) * rank, reach=(0,) * rank)
    return Reranked(spec, of.depth + 1, of)


def composed(outer: Leaf, inner: Expression, lengths: Lengths) -> Expression | str:
    """``outer`` behind ``inner``, or why that is no convolution of the root."""
    late, early = outer.spec, inner.spec
    if inner.depth >= DEEPEST:
        return f"more than {DEEPEST} operators stand in a row"
    if late.scatter is not None or early.scatter is not None:
        reason = _scattered(late, early)
    else:
        reason = _border(late, early, lengths)
    if reason:
        return reason
    scatters = late.scatter is not None
    spec = Spec(
        outputs=late.outputs,
        inputs=early.inputs,
        bands=behind(late.bands, early.bands),
        stride=tuple(a * b for a, b in zip(late.stride, early.stride, strict=True)),
        taps=late.taps if scatters else tuple(map(Taps.behind, late.taps, early.taps, early.stride)),
        reach=tuple(q + s * p for q, s, p in zip(early.reach, early.stride, late.reach, strict=True)),
        biased=late.biased or early.biased,
        scatter=late.scatter or early.scatter,
    )
    return Composed(spec, inner.depth + 1, outer, inner)


def _scattered(late: Spec, early: Spec) -> str:
    if late.scatter is not None and early.is_pointwise:
        return "a bias stands before a transposed convolution, so it is not constant at the border" * early.biased
    return "" if late.is_pointwise else "a transposed convolution is merged with pointwise operators only"


def _border(late: Spec, early: Spec, lengths: Lengths) -> str:
    """The padding of ``late`` must meet zeros: outside of its operand, ``early`` must read nothing but zeros."""
    for i, length in enumerate(lengths):
        left, right = late.taps[i].start < 0, late.reach[i] + late.taps[i].last > 0
        if not left and not right:
            continue
        if early.biased:
            return "a bias stands before zero padding, so it is not constant at the border"
        zero_left, zero_right = is_zero_outside(early.taps[i], early.reach[i], early.stride[i], length)
        if (left and not zero_left) or (right and not zero_right):
            return "zero padding stands between the two kernels, so the border is no convolution"
    return ""


def scaled(of: Expression, factor: Tensor | float, shift: Tensor | float) -> Expression:
    """``of · factor + shift``."""
    biased = of.spec.biased or isinstance(shift, Tensor) or shift != 0.0
    return Scaled(replace(of.spec, biased=biased), of.depth + 1, of, factor, shift)


def summed(a: Expression, b: Expression, factor: float, lengths: Lengths) -> Expression | str:
    """``a + factor · b``, or why it is no convolution of the root."""
    one, two = a.spec, b.spec
    if one.stride != two.stride:
        return f"the branches have unequal strides, {_shown(one.stride)} and {_shown(two.stride)}"
    if one.scatter != two.scatter or (one.scatter is not None and one.taps != two.taps):
        return "a transposed convolution is added to one of another geometry"
    agrees = all(
        q in reaches(length, p, s) for length, p, q, s in zip(lengths, one.reach, two.reach, one.stride, strict=True)
    )
    if not agrees:
        return "the branches have as many results only for some sizes of the input"
    spec = replace(
        one,
        bands=together((*one.bands, *two.bands)),
        taps=tuple(map(Taps.joined, one.taps, two.taps)),
        biased=one.biased or two.biased,
    )
    first = a.parts if isinstance(a, Sum) else ((a, 1.0),)
    return Sum(spec, max(a.depth, b.depth) + (not isinstance(a, Sum)), (*first, (b, factor)))


def _shown(numbers: Sequence[int]) -> str:
    return "×".join(map(str, numbers)) or "none"


def joined(parts: Sequence[Expression], lengths: Lengths) -> Expression | str:
    """Side by side along the channels, or why not."""
    bands: list[Band] = []
    before, taps = 0, parts[0].spec.taps
    for part in parts:
        fits = summed(replace(parts[0], spec=replace(parts[0].spec, taps=taps)), part, 1.0, lengths)
        if isinstance(fits, str):
            return fits
        taps = fits.spec.taps
        bands.extend(moved(part.spec.bands, before))
        before += part.spec.outputs
    spec = replace(
        parts[0].spec, outputs=before, bands=together(bands), taps=taps, biased=any(p.spec.biased for p in parts)
    )
    return Join(spec, max(part.depth for part in parts) + 1, tuple(parts))


def pick(of: Expression, first: int, count: int) -> Expression:
    """Some channels in a row."""
    spec = replace(of.spec, outputs=count, bands=picked(of.spec.bands, first, count))
    return Pick(spec, of.depth + 1, of, first)


def elements(spec: Spec, taps: Sequence[Taps]) -> int:
    """Weights of the kernel."""
    return spec.outputs * (spec.inputs // spec.groups) * math.prod(each.count for each in taps)
