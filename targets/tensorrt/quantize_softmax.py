"""quantize-softmax: attention whose operands are float8 is written as two products, with its weights rounded, too.

Before → after::

    %3 = scaled_dot_product_attention(%0, %1, %2)     %3 = permute(%1, [0,1,3,2])
    return %3                                         %4 = matmul(%0, %3)
                                                  →   %5 = mul(%4, 0.125)
                                                      %6 = softmax(%5, -1)
                                                      %7 = quantize(%6, @scale, @zero: f8e4m3)
                                                      %8 = dequantize(%7, @scale, @zero)
                                                      %9 = matmul(%8, %2)
                                                      return %9

``%0``, ``%1`` and ``%2`` are dequantized float8. Both products then read float8 on both sides, as TensorRT's fused
attention in FP8 wants it.

Equation: the weights of attention lie in 0 to 1, so the scale 1/448 (or the next number of float16) lets them use all
of E4M3, whatever the image.

Does not apply when: an operand is no float8, the attention is causal, groups heads, or has a boolean mask.
Numerical effect: weights of attention keep 4 significant bits. Judged by the signal to noise ratio of every output.
Source: NVIDIA Model Optimizer, FP8 recipe for vision transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.core.scheme import QuantScheme
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import DEQUANTIZE, E4M3, QUANTIZE
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.quantization.decide import scaling
from vlexport.passes.statistic import Statistic

aten = torch.ops.aten
_ATTENTION = "aten.scaled_dot_product_attention.default"


class QuantizeSoftmax(Pass[Program]):
    """Attention whose operands are float8 is written as two products, with its weights rounded, too.

    Args:
        scheme: Holds the scale; without one nothing is found.
        min_sqnr_db: Least signal to noise ratio of an output.
    """

    name: ClassVar[str] = "quantize-softmax"
    stage: ClassVar[Stage] = "precision"
    effect: ClassVar[Effect] = "approximate"

    def __init__(self, scheme: QuantScheme | None = None, *, min_sqnr_db: float = 10.0) -> None:
        super().__init__()
        self.scheme, self.min_sqnr_db = scheme, min_sqnr_db

    @property
    def statistic(self) -> Statistic:
        """Signal to noise ratio."""
        hint = "keep the attention in half (--set quantize.keep=MODULE), or accept more noise (quantize.min_sqnr_db)"
        return Statistic("sqnr_db", self.min_sqnr_db, hint=hint)

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """Attention that reads float8."""
        rule = self.scheme.layer("softmax") if self.scheme is not None else None
        if rule is None or rule.activation is None:
            return
        for node in ir.calls(_ATTENTION):
            float8 = [_is_float8(each) for each in node.args[:3]]
            if not any(float8):
                continue
            reason = "" if all(float8) else "not all of its operands are float8"
            reason = reason or _why_not(node)
            yield NearMiss("attention in float8", node, reason) if reason else Match(node, (node,), rule.activation)

    def apply(self, ir: Program, match: Match) -> Change:
        """Write one attention as products."""
        node, rule = match.node, match.data
        assert self.scheme is not None
        calls, stored = len(ir.calls()), parameters_stored(ir)
        where = (provenance.module_path(node),)
        query, key, value, mask, _, _, factor, *_ = dialect.operands(node)
        call = partial(_call, ir, node)
        rank = key.meta["val"].ndim
        turned = call(aten.permute.default, key, [*range(rank - 2), rank - 1, rank - 2])
        if factor is None:
            factor = float(int(query.meta["val"].shape[-1]) ** -0.5)
        scores = call(aten.mul.Tensor, call(aten.matmul.default, query, turned), factor)
        if mask is not None:
            scores = call(aten.add.Tensor, scores, mask)
        weights = call(aten.softmax.int, scores, -1)
        name = f"{where[0] or 'main'}.softmax"
        number, _ = scaling(0.0, 1.0, rule, self.scheme.scales)
        scale = ir.add_tensor(f"{name}_scale", torch.tensor(number, dtype=weights.meta["val"].dtype), before=node)
        point = ir.add_tensor(f"{name}_zero", torch.zeros(()).to(E4M3), before=node)
        rounded = call(DEQUANTIZE, call(QUANTIZE, weights, scale, point), scale, point)
        ir.replace(node, call(aten.matmul.default, rounded, value))
        return Change(
            what="attention in e4m3 products", where=where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=stored - parameters_stored(ir),
        )  # fmt: skip


def _call(ir: Program, node: Node, target: Any, *args: Any) -> Node:
    return ir.add_call(target, args, before=node, value_of=node)


def _is_float8(node: Any) -> bool:
    if not isinstance(node, Node) or node.target is not DEQUANTIZE:
        return False
    steps: Any = node.args[0]
    return bool(steps.meta["val"].dtype is E4M3)


def _why_not(node: Node) -> str:
    query, key, _, mask, _, causal, _, grouped = dialect.operands(node)
    if causal:
        return "it is causal, and no mask says so"
    if grouped or query.meta["val"].shape[-3:-2] != key.meta["val"].shape[-3:-2]:
        return "several heads share a key"
    if mask is not None and mask.meta["val"].dtype is torch.bool:
        return "its mask is boolean"
    return ""
