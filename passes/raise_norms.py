"""raise-norms: a norm written by hand becomes the operator, or the one spelling, that it is.

Before → after::

    %1 = mean(x, [-1], True)
    %2 = sub(x, %1)
    %3 = pow(%2, 2)
    %4 = mean(%3, [-1], True)       →    %1 = layer_norm(x, [C], gamma, beta, eps)
    %5 = add(%4, eps)
    %6 = rsqrt(%5)
    %7 = mul(%2, %6)
    %8 = mul(%7, gamma)
    %9 = add(%8, beta)

    over axis 1 (channels first)    →    permute, layer_norm, permute
    reshape to groups, norm, reshape →   group_norm
    x / √(mean(x²) + eps) · gamma   →    rms_norm(x, [C], gamma, eps)
    F.normalize, x / x.norm()       →    x / clamp_min(linalg_vector_norm(x, 2, dims, True), eps)
    layer_norm without scale and shift, mul, add   →   layer_norm with them (also rms_norm, group_norm)

Equation: with ``m`` the mean over the normalised axes, ``(x − m(x)) / √(m((x − m(x))²) + eps) · gamma + beta``; an RMS
norm subtracts no mean. Scale and shift that stand in several tensors are multiplied and added in float64.

Does not apply when: the variance is unbiased (as of ``std`` and ``var`` by default); eps is added to the root, not to
the variance, or is missing; the axes are neither the last ones nor the channels; every channel is normalised for itself
(instance norm); a value on the way has another reader; every step rounds to a half type. A norm that a half model
computes in float32, between two casts, is raised between these casts. An L2 normalization is raised with its smallest
norm, or without one; an eps that is added somewhere is another function.

Numerical effect: exact up to rounding. A variance that was written as the mean of squares less the square of the mean
cancels in float32, and the operator's does not: there the result may change by more, for the better.

Source: Ba et al. 2016, arXiv 1607.06450 (layer norm); Zhang & Sennrich 2019, arXiv 1910.07467 (RMS norm); Wu & He 2018,
arXiv 1803.08494 (group norm).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.idioms import is_spelled, spell_l2_normalize
from vlexport.passes.match import Failed
from vlexport.passes.norms.by_hand import hand_norm
from vlexport.passes.norms.plan import NormPlan, plan, plan_behind

aten = torch.ops.aten
_OPERATORS = ("aten.layer_norm.default", "aten.rms_norm.default", "aten.group_norm.default")
_NAMES = {"l2_normalize": "L2 normalization"}


class RaiseNorms(Pass[Program]):
    """A norm written by hand becomes the operator, or the one spelling, that it is."""

    name: ClassVar[str] = "raise-norms"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            found = _planned(ir, node)
            if isinstance(found, Failed):
                yield NearMiss("norm by hand", found.node, found.reason)
            elif found is not None:
                yield Match(found.root, found.nodes, found)

    def apply(self, ir: Program, match: Match) -> Change:
        made: NormPlan = match.data
        where = tuple(dict.fromkeys(provenance.module_path(n) for n in match.nodes))
        calls, parameters = len(ir.calls()), parameters_stored(ir)
        ir.replace(match.node, _emit(ir, made))
        name = _NAMES.get(made.kind, made.kind)
        verb = "completed" if dialect.op_name(match.nodes[0]) in _OPERATORS else "raised"
        return Change(
            what=f"{name} {verb}", where=where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=parameters - parameters_stored(ir),
        )  # fmt: skip


def _planned(ir: Program, node: Node) -> NormPlan | Failed | None:
    if dialect.op_name(node) in _OPERATORS:
        return plan_behind(ir, node)
    norm = hand_norm(ir, node)
    if norm is None or isinstance(norm, Failed):
        return norm
    if norm.kind == "l2_normalize" and is_spelled(ir, norm.result):
        return None
    return plan(ir, norm)


def _emit(ir: Program, made: NormPlan) -> Node:
    """The calls that a plan asks for; returns the last one."""
    root, x = made.root, made.x.value

    def call(target: Any, *args: Any) -> Node:
        return ir.add_call(target, args, before=root, value_of=root, merges=made.nodes)

    if made.kind == "l2_normalize":
        return spell_l2_normalize(ir, x, made.sizes, made.eps, before=root, merges=made.nodes)
    weight, bias = _scale(ir, made), _shift(ir, made)
    if made.kind == "group_norm":
        return call(aten.group_norm.default, x, made.sizes[0], weight, bias, made.eps)
    rank = x.meta["val"].ndim
    if made.layout == "channels first":
        x = call(aten.permute.default, x, [0, *range(2, rank), 1])
    if made.kind == "rms_norm":
        norm = call(aten.rms_norm.default, x, list(made.sizes), weight, made.eps)
    else:
        norm = call(aten.layer_norm.default, x, list(made.sizes), weight, bias, made.eps)
    if made.layout == "channels first":
        norm = call(aten.permute.default, norm, [0, rank - 1, *range(1, rank - 1)])
    return norm


def _scale(ir: Program, made: NormPlan) -> Node | None:
    if not made.weights:
        return None
    if len(made.weights) == 1 and _fits(ir, made.weights[0], made):
        return made.weights[0]
    value = torch.ones(made.parameter_shape, dtype=torch.float64)
    for each in made.weights:
        value = value * ir.tensors[str(each.target)].double().reshape(made.parameter_shape)
    return _stored(ir, made, made.weights[0], value)


def _shift(ir: Program, made: NormPlan) -> Node | None:
    if not made.shifts:
        return None
    first, sign = made.shifts[0]
    if len(made.shifts) == 1 and sign > 0 and _fits(ir, first, made):
        return first
    value = torch.zeros(made.parameter_shape, dtype=torch.float64)
    for each, sign in made.shifts:
        value = value + sign * ir.tensors[str(each.target)].double().reshape(made.parameter_shape)
    return _stored(ir, made, first, value)


def _fits(ir: Program, node: Node, made: NormPlan) -> bool:
    tensor, x = ir.tensors[str(node.target)], made.x.value.meta["val"]
    return tuple(tensor.shape) == made.parameter_shape and tensor.dtype is x.dtype


def _stored(ir: Program, made: NormPlan, origin: Node, value: Tensor) -> Node:
    dtype = made.x.value.meta["val"].dtype
    return ir.add_tensor(f"{origin.target}_raised", value.to(dtype), before=made.root)
