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
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.match import Failed, Found, bind, match, op, stored

_TRAINING, _EPSILON, _GROUPS = 5, 7, 6
"""Places of operands: of batch norm, of batch norm, of a transposed convolution."""
_WEIGHT = "the convolution's weight or bias is computed, not stored"
_SCALE = "the batch norm's scale or shift is computed, not stored"
_STATISTICS = "the batch norm's statistics are computed, not stored"


def _uses_stored_statistics(program: Program, norm: Node) -> str:
    return "the batch norm uses batch statistics (train mode)" if dialect.operands(norm)[_TRAINING] else ""


def _has_its_channels(program: Program, producer: Node) -> str:
    rank = producer.meta["val"].ndim
    if dialect.op_name(producer) == "aten.linear.default" and rank != 2:
        return "the linear's output has a token axis where batch norm expects channels"
    if len(producer.users) != 1:
        return f"the convolution's output is used by {len(producer.users) - 1} other(s)"
    if rank != dialect.operands(producer)[1].meta["val"].ndim:
        return "the convolution's input has no batch axis, so batch norm takes another axis for its channels"
    return ""


_CONV_BATCH_NORM = op(
    "aten.batch_norm.default",
    op(
        (*dialect.CONVOLUTIONS, *dialect.TRANSPOSED_CONVOLUTIONS, "aten.linear.default"),
        bind("input"), stored("weight", _WEIGHT), stored("bias", _WEIGHT, optional=True),
        name="producer", noun="a convolution or linear", check=_has_its_channels,
    ),
    stored("gamma", _SCALE, optional=True), stored("beta", _SCALE, optional=True),
    stored("mean", _STATISTICS), stored("variance", _STATISTICS),
    check=_uses_stored_statistics,
)  # fmt: skip


class FoldBatchNorm(Pass[Program]):
    """An inference batch norm disappears into the convolution or linear before it."""

    name: ClassVar[str] = "fold-batch-norm"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"
    establishes: ClassVar[frozenset[str]] = frozenset({"no-foldable-batch-norm"})

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls("aten.batch_norm.default"):
            found = match(ir, _CONV_BATCH_NORM, node)
            if isinstance(found, Failed):
                yield NearMiss("conv → batch_norm", node, found.reason)
            else:
                yield Match(node, found.nodes, found)

    def apply(self, ir: Program, match: Match) -> Change:
        node, found = match.node, match.data
        producer: Node = found["producer"]
        weight, bias = _folded(ir, node, found)
        had = _elements(ir)
        stem = str(found["weight"].target).removesuffix(".weight")
        new_weight = ir.add_tensor(f"{stem}_folded.weight", weight, before=producer)
        new_bias = ir.add_tensor(f"{stem}_folded.bias", bias, before=producer)
        x, _, _, *rest = dialect.operands(producer)  # not found["input"]: another match may have replaced it since
        operands = (x, new_weight, new_bias, *rest)
        new = ir.add_call(producer.target, operands, before=node, value_of=node, merges=(producer,))  # type: ignore[arg-type]
        where = (provenance.module_path(producer), provenance.module_path(node))
        saved_nodes = ir.replace(node, new) - 1
        saved = had - _elements(ir)  # less than nothing where another convolution shares the weight
        what = f"batch norm folded into {dialect.plain_name(new)}"
        return Change(what=what, where=where, saved_nodes=saved_nodes, saved_parameters=saved)


def _elements(ir: Program) -> int:
    return sum(t.numel() for t in ir.tensors.values())


def _folded(ir: Program, norm: Node, found: Found) -> tuple[Tensor, Tensor]:
    """The new weight and bias, computed in float64 and in the old weight's dtype."""

    def stored_in_float64(name: str) -> Tensor | None:
        tensor = ir.tensor_of(found[name])
        return tensor.double() if tensor is not None else None

    weight, mean, variance = (ir.tensors[found[name].target].double() for name in ("weight", "mean", "variance"))
    bias, gamma, beta = map(stored_in_float64, ("bias", "gamma", "beta"))
    scale = torch.rsqrt(variance + float(dialect.operands(norm)[_EPSILON]))
    if gamma is not None:
        scale = scale * gamma
    producer: Node = found["producer"]
    if dialect.op_name(producer) in dialect.TRANSPOSED_CONVOLUTIONS:
        groups = int(dialect.operands(producer)[_GROUPS])
        inputs, outputs = weight.shape[:2]
        grouped = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:])
        factor = scale.reshape(groups, 1, outputs, *[1] * (weight.ndim - 2))
        new_weight = (grouped * factor).reshape(weight.shape)
    else:
        new_weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    new_bias = ((bias if bias is not None else 0) - mean) * scale
    if beta is not None:
        new_bias = new_bias + beta
    dtype = ir.tensors[found["weight"].target].dtype
    return new_weight.to(dtype), new_bias.to(dtype)
