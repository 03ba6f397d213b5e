"""fuse-qattention: as fuse-attention, where the projections compute with integers.

Before → after::

    %q = QuantizeLinear(x, scale, zero)            %q = QuantizeLinear(x, scale, zero)
    %0 = Gemm(dequantized %q, dequantized @w, @b)  %0 = com.microsoft.QAttention(%q, @w', @b', scale, @scales', …)
    … reshape, transpose, slice, squeeze …   →     return %0
    %9 = Softmax(scale · %q · %kᵀ)
    … %9 · %v, transpose, reshape …

Equation: that of fuse-attention; the projections are added up in 32-bit integers, the rest in float.

Does not apply when: what fuse-attention tells, or a projection is not of one value in uint8 with a stored int8 weight.
Numerical effect: rounding. The same integers from the same values; where an integer further on is computed from them,
rounding may tip it over, and it is then one step off. Judged by the signal to noise ratio.
Source: ONNX Runtime, contributed operators, com.microsoft.QAttention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir

from vlexport.passes.base import Change, Match, NearMiss
from vlexport.targets.onnx.attention_site import NoSite, Site, plain_site, sites
from vlexport.targets.onnx.attention_taps import QUERY
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import CONTRIB, insert, stored
from vlexport.targets.onnxruntime.attention_operator import Project, become, cut, require_servable
from vlexport.targets.onnxruntime.integer_linear import IntegerFusion, IntegerLinear, NoLinear, integer_linear

_PATTERN = "integer projections → attention"


class FuseQattention(IntegerFusion):
    """As fuse-attention, where the projections compute with integers."""

    name: ClassVar[str] = "fuse-qattention"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every softmax that a product reads."""
        return sites(ir, _PATTERN, _read, misses=(NoSite, NoLinear))

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of all."""
        found: Site = match.data[0]
        linears: list[IntegerLinear] = match.data[1]
        before, first = len(ir.nodes()), linears[0]
        pairs = list(zip(linears, found.parts, strict=True))
        where = module_path(match.node)
        name = f"{where or 'main'}.qkv"
        biases = [_bias(linear)[part.columns] for linear, part in pairs]
        operands = [
            first.integers,
            stored(ir, f"{name}_int", np.concatenate([each.weight[:, part.columns] for each, part in pairs], 1)),
            stored(ir, f"{name}_bias", np.concatenate(biases)),
            first.scale,
            stored(ir, f"{name}_scale", np.concatenate([each.weight_scale[part.columns] for each, part in pairs])),
            None,
            first.zero,
            stored(ir, f"{name}_zero", np.concatenate([each.weight_zero[part.columns] for each, part in pairs])),
        ]
        become(ir, found, "QAttention", operands, project=_query_of(ir, found, operands))
        change = "attention with integer projections as one operator"
        return Change(what=change, where=(where,), saved_nodes=before - len(ir.nodes()))


def _read(softmax: onnx_ir.Node) -> tuple[Site, list[IntegerLinear]]:
    found = plain_site(softmax)
    if "qkv_hidden_sizes" in found.attributes():
        raise NoSite("values are of another width than queries")
    linears = [integer_linear(part.root) for part in found.parts]
    if len({each.integers for each in linears}) > 1:
        raise NoSite("query, key and value are projected from several values")
    require_servable(found, linears[0].integers)
    found.require_positions(QUERY, linears[0].integers)
    return found, linears


def _query_of(model: OnnxModel, found: Site, operands: Sequence[onnx_ir.Value | None]) -> Project:
    """The query of one position, of the first columns of what is stored, added up in integers, too."""
    _, weight, bias, scale, scales, _, zero, zeros = operands

    def project(before: onnx_ir.Node, position: onnx_ir.Value) -> onnx_ir.Value:
        width, name = len(found.parts[QUERY].columns), f"{before.name}_query"
        parts = {"weight": (weight, 1), "bias": (bias, 0), "scale": (scales, 0), "zero": (zeros, 0)}
        own = {
            key: cut(model, before, value, (0, width, axis), name=f"{name}_{key}")
            for key, (value, axis) in parts.items()
            if value is not None
        }
        read = [position, own["weight"], scale, own["scale"], zero, own["zero"], own["bias"]]
        return insert(
            model, before, "MatMulIntegerToFloat", read, domain=CONTRIB, origin=before, name=f"{name}_linear"
        ).outputs[0]

    return project


def _bias(linear: IntegerLinear) -> np.ndarray:
    return np.zeros(linear.weight.shape[1], np.float32) if linear.bias is None else linear.bias
