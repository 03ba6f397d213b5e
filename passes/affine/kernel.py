"""The weights of an expression, computed in float64.

A :class:`Kernel` holds, for every output channel, a window of inputs: ``first[o]`` and the weights from there on. So a
depthwise kernel stays small, and finer or coarser groups are windows of another width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from vlexport.passes.affine.expression import Composed, Expression, Join, Leaf, Pick, Reranked, Scaled, Spec, Sum
from vlexport.passes.affine.taps import Taps


@dataclass(frozen=True)
class Kernel:
    """Weights in float64.

    Attributes:
        weight: ``[outputs, window, taps…]``.
        first: The first input channel of every output's window, int64 ``[outputs]``.
        bias: ``[outputs]``; zeros where nothing is added.
    """

    weight: Tensor
    first: Tensor
    bias: Tensor


def kernel_of(expression: Expression) -> Kernel:
    """Compute the weights of ``expression``, in the groups and taps of its spec."""
    return _Evaluation().of(expression)


def windows(outputs: int, inputs: int, groups: int) -> Tensor:
    """Where the windows of a convolution of ``groups`` begin."""
    return torch.arange(outputs) // (outputs // groups) * (inputs // groups)


def in_groups(kernel: Kernel, inputs: int, groups: int) -> Kernel:
    """The same kernel in windows of ``groups``; weights that lie outside of them must be zeros."""
    width = inputs // groups
    first = windows(len(kernel.weight), inputs, groups)
    if kernel.weight.shape[1] == width and torch.equal(first, kernel.first):
        return kernel
    place = (first - kernel.first)[:, None] + torch.arange(width)
    inside = (place >= 0) & (place < kernel.weight.shape[1])
    taps = kernel.weight.ndim - 2
    index = place.clamp(0, kernel.weight.shape[1] - 1).reshape(*place.shape, *[1] * taps)
    found = kernel.weight.gather(1, index.expand(*place.shape, *kernel.weight.shape[2:]))
    return Kernel(found * inside.reshape(*place.shape, *[1] * taps), first, kernel.bias)


def in_taps(kernel: Kernel, taps: tuple[Taps, ...], wider: tuple[Taps, ...]) -> Kernel:
    """The same kernel with zeros at the taps of ``wider`` that it has not."""
    if taps == wider:
        return kernel
    weight = kernel.weight.new_zeros(*kernel.weight.shape[:2], *(each.count for each in wider))
    weight[(slice(None), slice(None), *map(Taps.place, taps, wider))] = kernel.weight
    return Kernel(weight, kernel.first, kernel.bias)


class _Evaluation:
    """Every expression of one tree once."""

    def __init__(self) -> None:
        self._known: dict[int, Kernel] = {}

    def of(self, expression: Expression) -> Kernel:
        known = self._known.get(id(expression))
        if known is None:
            known = self._known[id(expression)] = self._computed(expression)
        return known

    def _computed(self, expression: Expression) -> Kernel:
        if isinstance(expression, Leaf):
            return _leaf(expression)
        if isinstance(expression, Composed):
            return self._composed(expression)
        if isinstance(expression, Scaled):
            return self._scaled(expression)
        if isinstance(expression, Reranked):
            inner = self.of(expression.of)
            ones = [1] * len(expression.spec.taps)
            return Kernel(inner.weight.reshape(*inner.weight.shape[:2], *ones), inner.first, inner.bias)
        if isinstance(expression, Pick):
            inner = self.of(expression.of)
            rows = slice(expression.first, expression.first + expression.spec.outputs)
            return _fitted(
                Kernel(inner.weight[rows], inner.first[rows], inner.bias[rows]), expression.of.spec, expression.spec
            )
        if isinstance(expression, Join):
            return self._joined(expression)
        assert isinstance(expression, Sum)
        total: Kernel | None = None
        for part, factor in expression.parts:
            one = _fitted(self.of(part), part.spec, expression.spec)
            if total is None:
                total = Kernel(one.weight * factor, one.first, one.bias * factor)
            else:
                total.weight.add_(one.weight, alpha=factor)
                total.bias.add_(one.bias, alpha=factor)
        assert total is not None
        return total

    def _joined(self, expression: Join) -> Kernel:
        wide = [in_taps(self.of(part), part.spec.taps, expression.spec.taps) for part in expression.parts]
        width = max(part.weight.shape[1] for part in wide)
        grown = [
            torch.constant_pad_nd(k.weight, (*[0] * (2 * (k.weight.ndim - 2)), 0, width - k.weight.shape[1]))
            for k in wide
        ]
        whole = Kernel(torch.cat(grown), torch.cat([k.first for k in wide]), torch.cat([k.bias for k in wide]))
        return in_groups(whole, expression.spec.inputs, expression.spec.groups)

    def _scaled(self, expression: Scaled) -> Kernel:
        inner = self.of(expression.of)
        factor = torch.as_tensor(expression.factor, dtype=torch.float64).expand(len(inner.weight))
        weight = inner.weight * factor.reshape(-1, *[1] * (inner.weight.ndim - 1))
        return Kernel(weight, inner.first, inner.bias * factor + expression.shift)

    def _composed(self, expression: Composed) -> Kernel:
        """Block by block: ``[block, outputs, mid] @ [block, mid, inputs]`` for every pair of taps."""
        outer, inner, spec = expression.outer, expression.inner, expression.spec
        late, early, blocks = self.of(outer), self.of(inner), _blocks(outer.spec, inner.spec)
        bias = (
            late.bias + _summed_taps(in_groups(late, outer.spec.inputs, 1)) @ early.bias
            if inner.spec.biased
            else late.bias
        )
        late, early = in_groups(late, outer.spec.inputs, blocks), in_groups(early, inner.spec.inputs, blocks)
        by = late.weight.reshape(blocks, -1, *late.weight.shape[1:])
        of = early.weight.reshape(blocks, -1, *early.weight.shape[1:])
        shape = (blocks, by.shape[1], of.shape[2])
        flat = of.reshape(blocks, of.shape[1], -1)
        made = late.weight.new_zeros(*shape, *(taps.count for taps in spec.taps))
        for at in itertools.product(*(range(taps.count) for taps in outer.spec.taps)):
            product = torch.matmul(by[(slice(None),) * 3 + at], flat).reshape(*shape, *of.shape[3:])
            made[(slice(None),) * 3 + _places(expression, at)] += product
        whole = made.reshape(-1, *made.shape[2:])
        return in_groups(Kernel(whole, windows(spec.outputs, spec.inputs, blocks), bias), spec.inputs, spec.groups)


def _blocks(outer: Spec, inner: Spec) -> int:
    """Blocks that both kernels have."""
    return next(g for g in range(outer.groups, 0, -1) if outer.groups % g == 0 and inner.groups % g == 0)


def _places(expression: Composed, at: tuple[int, ...]) -> tuple[slice, ...]:
    """Where one tap of the outer kernel puts the inner kernel among the taps of the result."""
    outer, inner, spec = expression.outer.spec, expression.inner.spec, expression.spec
    if spec.scatter is not None:
        return tuple(slice(i, i + taps.count) for i, taps in zip(at, inner.taps, strict=True))
    moved = (
        Taps(early.start + stride * (late.start + late.step * i), early.step, early.count)
        for i, late, early, stride in zip(at, outer.taps, inner.taps, inner.stride, strict=True)
    )
    return tuple(map(Taps.place, moved, spec.taps))


def _summed_taps(kernel: Kernel) -> Tensor:
    """What a constant input gives: ``[outputs, inputs]``."""
    return kernel.weight.flatten(2).sum(2) if kernel.weight.ndim > 2 else kernel.weight


def _fitted(kernel: Kernel, own: Spec, spec: Spec) -> Kernel:
    return in_groups(in_taps(kernel, own.taps, spec.taps), spec.inputs, spec.groups)


def _leaf(leaf: Leaf) -> Kernel:
    spec = leaf.spec
    counts = [taps.count for taps in spec.taps]
    groups, outs, ins = spec.groups, spec.outputs // spec.groups, spec.inputs // spec.groups
    if leaf.weight is None:
        weight = torch.full((spec.outputs, ins, *counts), leaf.fill, dtype=torch.float64)
    elif leaf.inputs_first:
        weight = leaf.weight.double().reshape(groups, ins, outs, *counts).transpose(1, 2)
        weight = weight.reshape(spec.outputs, ins, *counts)
    else:
        weight = leaf.weight.double().reshape(spec.outputs, ins, *counts)
    bias = leaf.bias.double() if leaf.bias is not None else torch.zeros(spec.outputs, dtype=torch.float64)
    return Kernel(weight, windows(spec.outputs, spec.inputs, groups), bias)
