"""fold-batch-norm: an inference batch norm disappears into the convolution or linear before it.

Before → after::

    %1 = conv2d(x, W, b)                            %1 = conv2d(x, W', b')
    %2 = batch_norm(%1, gamma, beta, mean, var)

Equation: with ``s = gamma / sqrt(var + eps)``, ``W' = s · W`` (per output channel) and ``b' = s · (b − mean) + beta``,
computed in float64 and cast once.

Does not apply when: the convolution's output has another reader; the weight is not a stored tensor; the batch norm runs
in train mode; the producer is no convolution or linear (a reshape between them moves the channel axis); a
linear's output has a token axis; a convolution's input has no batch axis.

Numerical effect: exact up to rounding of the weights. Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

_CONVOLUTIONS = (
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv1d.padding", "aten.conv2d.padding",
    "aten.conv3d.padding",
)  # fmt: skip
_TRANSPOSED = ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
_GROUPS_ARGUMENT = 6
_PATTERN = "conv → batch_norm"


@dataclass(frozen=True)
class _Found:
    producer: Node
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float


class FoldBatchNorm(Pass[Program]):
    """An inference batch norm disappears into the convolution or linear before it."""

    name: ClassVar[str] = "fold-batch-norm"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"
    establishes: ClassVar[frozenset[str]] = frozenset({"no-foldable-batch-norm"})

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls("aten.batch_norm.default"):
            found = _examine(ir, node)
            if isinstance(found, str):
                yield NearMiss(_PATTERN, node, found)
            else:
                yield Match(node, (found.producer, node), found)

    def apply(self, ir: Program, match: Match) -> Change:
        node, found = match.node, match.data
        producer: Node = found.producer
        weight, bias = _folded(found, dialect.op_name(producer) in _TRANSPOSED, _groups(producer))
        name = str(producer.args[1].target)  # type: ignore[union-attr]
        had = _elements(ir)
        stem = name.removesuffix(".weight")
        new_weight = ir.add_tensor(f"{stem}.folded.weight", weight, before=producer)
        new_bias = ir.add_tensor(f"{stem}.folded.bias", bias, before=producer)
        args = (producer.args[0], new_weight, new_bias, *producer.args[3:])
        kwargs = {k: v for k, v in producer.kwargs.items() if k not in ("weight", "bias")}
        new = ir.add_call(producer.target, args, kwargs, before=node, value_of=node, merges=(producer,))  # type: ignore[arg-type]
        where = (provenance.module_path(producer), provenance.module_path(node))
        saved_nodes = ir.replace(node, new) - 1
        saved = had - _elements(ir)  # less than nothing where another convolution shares the weight
        what = f"batch norm folded into {dialect.op_name(new).removeprefix('aten.').split('.')[0]}"
        return Change(what=what, where=where, saved_nodes=saved_nodes, saved_parameters=saved)


def _elements(ir: Program) -> int:
    return sum(t.numel() for t in ir.tensors.values())


def _groups(producer: Node) -> int:
    if dialect.op_name(producer) not in _TRANSPOSED:
        return 1
    given: Any = producer.args[_GROUPS_ARGUMENT] if len(producer.args) > _GROUPS_ARGUMENT else None
    return int(producer.kwargs.get("groups", 1) if given is None else given)  # type: ignore[arg-type]


def _examine(ir: Program, node: Node) -> _Found | str:
    """What is needed to fold ``node``, or the reason why it cannot be."""
    producer: Any = node.args[0]
    gamma, beta, mean, variance = (ir.tensor_of(a) for a in node.args[1:5])
    if node.args[5]:
        return "the batch norm uses batch statistics (train mode)"
    if mean is None or variance is None:
        return "the batch norm's statistics are computed, not stored"
    if any(a is not None and t is None for a, t in zip(node.args[1:3], (gamma, beta), strict=True)):
        return "the batch norm's scale or shift is computed, not stored"
    name = dialect.op_name(producer)
    if name not in (*_CONVOLUTIONS, *_TRANSPOSED, "aten.linear.default"):
        return f"its operand is made by {name.removeprefix('aten.')}, not by a convolution or linear"
    if name == "aten.linear.default" and producer.meta["val"].ndim != 2:
        return "the linear's output has a token axis where batch norm expects channels"
    if len(producer.users) != 1:
        return f"the convolution's output is used by {len(producer.users) - 1} other(s)"
    if len(producer.args) < 2 or {"weight", "bias"} & set(producer.kwargs):
        return "the convolution names its weight by keyword"
    weight = ir.tensor_of(producer.args[1])
    bias_node = producer.args[2] if len(producer.args) > 2 else None
    bias = ir.tensor_of(bias_node)
    if weight is None or (bias_node is not None and bias is None):
        return "the convolution's weight or bias is computed, not stored"
    if producer.meta["val"].ndim != weight.ndim:
        return "the convolution's input has no batch axis, so batch norm takes another axis for its channels"
    return _Found(producer, weight, bias, gamma, beta, mean, variance, float(node.args[7]))  # type: ignore[arg-type]


def _folded(found: _Found, transposed: bool, groups: int) -> tuple[Tensor, Tensor]:
    """The new weight and bias, in the old weight's dtype."""
    dtype = found.weight.dtype
    weight, mean, variance = found.weight.double(), found.mean.double(), found.variance.double()
    scale = torch.rsqrt(variance + found.eps)
    if found.gamma is not None:
        scale = scale * found.gamma.double()
    if transposed:
        inputs, outputs = weight.shape[:2]
        grouped = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:])
        factor = scale.reshape(groups, 1, outputs, *[1] * (weight.ndim - 2))
        new_weight = (grouped * factor).reshape(weight.shape)
    else:
        new_weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    bias = found.bias.double() if found.bias is not None else torch.zeros_like(mean)
    new_bias = (bias - mean) * scale
    if found.beta is not None:
        new_bias = new_bias + found.beta.double()
    return new_weight.to(dtype), new_bias.to(dtype)
