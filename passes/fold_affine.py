"""fold-affine: a scale and a shift per channel go into the weights of the linear before or behind them.

Before → after::

    %1 = layer_norm(x, [C], gamma, beta)        %1 = layer_norm(x, [C])
    %2 = linear(%1, W, b)                  →    %2 = linear(%1, W · gamma, b + W beta)
    %3 = linear(%1, V, c)                       %3 = linear(%1, V · gamma, c + V beta)

    %1 = linear(x, W, b)                        %1 = linear(x, s · W, s · b)
    %2 = mul(%1, s)                        →

    scaled_dot_product_attention(               scaled_dot_product_attention(
        linear(x, W, b), k, v, scale=s)    →        linear(x, s√d · W, s√d · b), k, v)

Equation: ``W (gamma · n + beta) + b = (W · gamma) n + (b + W beta)``, and ``s · (W x + b) = (s · W) x + s · b``,
computed in float64 and cast once.

A norm is left without scale and shift where *every* reader is a linear (linear, addmm, matmul with a stored weight) or
a convolution over its channels; views that leave the channels alone, a permute, choices of tokens and means over tokens
may lie between. Between a projection (also a convolution) and what scales it may lie any views, as long as one channel
has one factor: a layer-scale, a temperature per head on the queries that one linear makes together with keys and
values.

The rule for attention: a scale is folded where it then need not be written. Core ML's attention knows no scale but
1/√depth, which costs nothing; another one costs a product. ONNX writes two products for any scale but 1, and ONNX
Runtime makes them part of the matrix product, so there nothing is lost or gained. So 1/√depth and 1 stay.

Does not apply when: a norm has a reader of another kind, or is an output; a linear has no bias and would need one for
the shift, which is one addition more; a convolution pads with zeros, and there is a shift; the weight is computed,
stored in half precision, or read by another call (a second one would be stored); the channels are read elsewhere
without the scale; one channel has several factors; a folded weight would leave the range of half precision, which the
old one fits.

Numerical effect: exact up to rounding of the weights.
Source: Ashkboos et al. 2024, arXiv 2401.15024, section 3.2 (a norm's scale into the weights behind it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.artifact import Frozen
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.match import as_number, same_shape
from vlexport.passes.projections.behind_norm import Readers, readers_of
from vlexport.passes.projections.channel_trace import Trace, trace
from vlexport.passes.projections.projection import (
    Projection,
    along,
    behind_affine,
    emit,
    pads,
    why_kept,
    why_too_wide,
)

aten = torch.ops.aten
_LAYER_NORM, _RMS_NORM = "aten.layer_norm.default", "aten.rms_norm.default"
_ATTENTION = "aten.scaled_dot_product_attention.default"
_MUL, _DIV = ("aten.mul.Tensor", "aten.mul.Scalar"), ("aten.div.Tensor", "aten.div.Scalar")
_SCALE = 6
"""Place of attention's scale."""
_NORM, _FACTOR, _ATTENTION_SCALE = "norm → linears", "linear → scale", "linear → scale of attention"


class FoldAffineOptions(Frozen):
    """What is folded.

    Attributes:
        norms: Scale and shift of norms, into the linears behind them.
        scales: Factors per channel and scales of attention, into the projection before them.
    """

    norms: bool = True
    scales: bool = True


@dataclass(frozen=True)
class _Norm:
    """Scale and shift of a norm, and who gets them; float64."""

    gamma: Tensor
    beta: Tensor | None
    readers: Readers


@dataclass(frozen=True)
class _Scaled:
    """A projection, and what each of its channels is multiplied by; float64."""

    trace: Trace
    factors: Tensor


class FoldAffine(Pass[Program]):
    """A scale and a shift per channel go into the weights of the linear before or behind them."""

    name: ClassVar[str] = "fold-affine"
    stage: ClassVar[Stage] = "reparameterize"
    effect: ClassVar[Effect] = "exact"
    Options: ClassVar[type[Frozen]] = FoldAffineOptions

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        options = self.options
        assert isinstance(options, FoldAffineOptions)
        for node in ir.calls(_LAYER_NORM, _RMS_NORM) if options.norms else ():
            norm = _norm(ir, node)
            if isinstance(norm, NearMiss):
                yield norm
            elif norm is not None:
                yield Match(node, (node, *(each.node for each in norm.readers.projections)), "norm")
        for node in ir.calls(*_MUL, *_DIV, _ATTENTION) if options.scales else ():
            scaled = _scaled(ir, node)
            if isinstance(scaled, str):
                pattern = _ATTENTION_SCALE if dialect.op_name(node) == _ATTENTION else _FACTOR
                yield NearMiss(pattern, node, scaled)
            elif scaled is not None:
                yield Match(node, (node, scaled.trace.projection.node), "scale")

    def apply(self, ir: Program, match: Match) -> Change:
        calls, parameters = len(ir.calls()), parameters_stored(ir)
        if match.data == "norm":
            what, where = _fold_norm(ir, match.node)
        else:
            what, where = _fold_scale(ir, match.node)
        return Change(
            what=what, where=tuple(dict.fromkeys(where)), saved_nodes=calls - len(ir.calls()),
            saved_parameters=parameters - parameters_stored(ir),
        )  # fmt: skip


# -- a norm's scale and shift into what reads it ---------------------------------------------------------------------


def _norm(ir: Program, node: Node) -> _Norm | NearMiss | None:
    _, sizes, weight, *rest = dialect.operands(node)
    shift = rest[0] if dialect.op_name(node) == _LAYER_NORM else None
    if len(sizes) != 1 or (weight is None and shift is None):
        return None
    gamma, beta = ir.tensor_of(weight), ir.tensor_of(shift)
    if (weight is not None and gamma is None) or (shift is not None and beta is None):
        return NearMiss(_NORM, node, "the norm's scale or shift is computed, not stored")
    gamma = gamma.double() if gamma is not None else torch.ones(int(sizes[0]), dtype=torch.float64)
    beta = beta.double() if beta is not None and bool(beta.any()) else None
    if bool((gamma == 1).all()) and beta is None:
        return _Norm(gamma, beta, Readers((), ()))  # it scales nothing, whoever reads it
    readers = readers_of(ir, node)
    if isinstance(readers, tuple):
        return NearMiss(_NORM, *readers)
    for each in readers.projections:
        reason = _why_not_behind(ir, each, gamma, beta)
        if reason:
            return NearMiss(_NORM, each.node, reason)
    return _Norm(gamma, beta, readers)


def _why_not_behind(ir: Program, projection: Projection, gamma: Tensor, beta: Tensor | None) -> str:
    bias = ir.tensor_of(projection.operand(projection.bias))
    if beta is not None and bias is None and not projection.is_convolution:
        return f"the {dialect.plain_name(projection.node)} has no bias to take the norm's shift"
    if beta is not None and pads(ir, projection):
        return "the convolution pads with zeros, where the norm's shift is not zero"
    weight, shifted = behind_affine(ir, projection, gamma, beta)
    reason = why_too_wide(projection.tensor(ir), weight)
    if not reason and shifted is not None:
        reason = why_too_wide(bias if bias is not None else torch.zeros(1), shifted)
    return reason


def _fold_norm(ir: Program, node: Node) -> tuple[str, list[str]]:
    found = _norm(ir, node)
    assert isinstance(found, _Norm)
    projections = found.readers.projections
    where = [provenance.module_path(n) for n in (node, *(each.node for each in projections))]
    if not projections:
        new = _without(ir, node, value_of=node)
        ir.replace(node, new)
        return f"{dialect.plain_name(node)} without its scale of 1 and shift of 0", where
    for each in projections:
        weight, bias = behind_affine(ir, each, found.gamma, found.beta)
        ir.replace(each.node, emit(ir, each, weight, bias, value_of=each.node))
    # What lies between computes something else now; a value of the captured graph is computed by the linear only.
    readers = [user for user in _users(node, found.readers.passed) if user not in found.readers.passed]
    for view in found.readers.passed:
        provenance.inherit(view, value_of=readers[-1], merges=(view,))
    ir.replace(node, _without(ir, node, value_of=readers[-1]))
    count = len(projections)
    behind = dialect.plain_name(readers[0]) if count == 1 else f"{count} projections"
    return f"{dialect.plain_name(node)}'s scale and shift folded into {behind}", where


def _users(norm: Node, passed: tuple[Node, ...]) -> list[Node]:
    return list(dict.fromkeys(user for node in (norm, *passed) for user in node.users))


def _without(ir: Program, node: Node, *, value_of: Node) -> Node:
    x, sizes, _, *rest = dialect.operands(node)
    rest = [None, *rest[1:]] if dialect.op_name(node) == _LAYER_NORM else rest
    args, kwargs = dialect.arguments(node.target, (x, sizes, None, *rest))  # type: ignore[arg-type]
    return ir.add_call(node.target, args, kwargs, before=node, value_of=value_of, merges=(node,))  # type: ignore[arg-type]


# -- a factor into the projection that it scales ---------------------------------------------------------------------


def _scaled(ir: Program, node: Node) -> _Scaled | str | None:
    """The projection that ``node`` scales, or why it stays; None where it scales none."""
    found = _factor(ir, node)
    if found is None:
        return None
    value, factor = found
    traced = trace(ir, value, node)
    if isinstance(traced, str):
        return traced or None
    reason = why_kept(ir, traced.projection)
    if reason:
        return reason
    factors = traced.factors(factor)
    if factors is None:
        return "the factor is not one number for each output channel"
    weight, bias = _before(ir, traced.projection, factors)
    old = ir.tensor_of(traced.projection.operand(traced.projection.bias))
    reason = why_too_wide(traced.projection.tensor(ir), weight)
    if not reason and bias is not None and old is not None:
        reason = why_too_wide(old, bias)
    return reason or _Scaled(traced, factors)


def _factor(ir: Program, node: Node) -> tuple[Node, Tensor] | None:
    """What a call scales, and by how much in a shape that broadcasts to it; None where it does something else."""
    operands = dialect.operands(node)
    if dialect.op_name(node) == _ATTENTION:
        query, scale = operands[0], operands[_SCALE]
        usual = float(query.meta["val"].shape[-1]) ** -0.5
        if scale is None or scale in (1.0, usual):
            return None
        return query, torch.tensor(float(scale) / usual, dtype=torch.float64)
    pairs = [(operands[0], operands[1])]
    if dialect.op_name(node) in _MUL:
        pairs.append((operands[1], operands[0]))
    for value, other in pairs:
        factor = _as_factor(ir, other)
        if not isinstance(value, Node) or ir.tensor_of(value) is not None or factor is None:
            continue
        if dialect.op_name(node) in _DIV:
            factor = 1.0 / factor
        if _broadcasts(value, factor, node) and bool(torch.isfinite(factor).all()):
            return value, factor
    return None


def _as_factor(ir: Program, operand: Any) -> Tensor | None:
    tensor = ir.tensor_of(operand)
    if tensor is not None:
        return tensor.double() if tensor.is_floating_point() else None
    number = as_number(ir, operand)
    return torch.tensor(number, dtype=torch.float64) if number is not None else None


def _broadcasts(value: Node, factor: Tensor, result: Node) -> bool:
    """Whether a factor has a size of 1 where the value has an open one, and leaves shape and dtype as they are."""
    mine, made = value.meta["val"], result.meta["val"]
    if not same_shape(mine.shape, made.shape) or mine.dtype != made.dtype:
        return False
    sizes = zip(reversed(factor.shape), reversed(mine.shape), strict=False)
    return all(own == 1 or not isinstance(size, torch.SymInt) for own, size in sizes)


def _before(ir: Program, projection: Projection, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    weight = projection.tensor(ir).double()
    bias = ir.tensor_of(projection.operand(projection.bias))
    scaled = weight * along(factors, projection.out_axis, weight.ndim)
    return scaled, bias.double() * factors if bias is not None else None


def _fold_scale(ir: Program, node: Node) -> tuple[str, list[str]]:
    found = _scaled(ir, node)
    assert isinstance(found, _Scaled)
    traced = found.trace
    old, path = traced.projection.node, traced.path
    is_attention = dialect.op_name(node) == _ATTENTION
    weight, bias = _before(ir, traced.projection, found.factors)
    where = [provenance.module_path(old), provenance.module_path(node)]
    new = emit(ir, traced.projection, weight, bias, value_of=node)
    ir.replace(old, new)
    for each in path:
        provenance.inherit(each, value_of=node, merges=(each,))
    if is_attention:
        operands = list(dialect.operands(node))
        operands[_SCALE] = None
        args, kwargs = dialect.arguments(node.target, operands)  # type: ignore[arg-type]
        ir.replace(node, ir.add_call(node.target, args, kwargs, before=node, value_of=node))  # type: ignore[arg-type]
        return f"scale of attention folded into {dialect.plain_name(new)}", where
    value: Any = path[-1] if path else new
    ir.replace(node, value)
    return f"scale folded into {dialect.plain_name(new)}", where
