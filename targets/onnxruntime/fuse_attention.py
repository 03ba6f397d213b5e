"""fuse-attention: projections, products, softmax and the moving of heads become one operator of ONNX Runtime.

Before → after::

    %0 = MatMul(x, @w: f32[8,24])                  %0 = com.microsoft.Attention(x, @w', @b') num_heads=2 scale=…
    %1 = Add(%0, @b: f32[24])                      return %0
    … reshape, transpose, slice, squeeze …
    %q, %k, %v                               →
    %9 = Softmax(scale · %q · %kᵀ)
    … %9 · %v, transpose, reshape …

Equation: ``Attention(x, [Wq Wk Wv], [bq bk bv]) = softmax(scale · q kᵀ) v`` for every head, heads joined. Columns of
the weights are put in the order of heads, whatever order the model keeps them in; three projections of one value
become one.

Does not apply when: a mask or bias is added to the scores, the query is not of all positions (as where the last block
computes one token alone), the heads of key and value are fewer, one of the parts is not a stored linear of the same
value, or the projections have other readers.
Numerical effect: rounding; products are added up in another order.
Source: ONNX Runtime, contributed operators, com.microsoft.Attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir

from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.attention_site import NoSite, Part, Site, become, looks_like_one, site
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import stored

_PATTERN = "projections → attention"
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class _Projection:
    """A stored linear.

    Attributes:
        value: What it reads: (batch, length, depth).
        weight: (depth, columns).
        bias: (columns,).
    """

    value: onnx_ir.Value
    weight: Floats
    bias: Floats


class FuseAttention(Pass[OnnxModel]):
    """Projections, products, softmax and the moving of heads become one operator of ONNX Runtime."""

    name: ClassVar[str] = "fuse-attention"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every softmax that a product reads."""
        for softmax in filter(looks_like_one, ir.nodes("Softmax")):
            try:
                found = site(ir, softmax)
                projections = [_projection(part) for part in found.parts]
                if len({each.value for each in projections}) > 1:
                    raise NoSite("query, key and value are projected from several values")
            except NoSite as miss:
                yield NearMiss(_PATTERN, softmax, str(miss))
                continue
            yield Match(softmax, (softmax,), (found, projections))

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of all."""
        found: Site = match.data[0]
        projections: list[_Projection] = match.data[1]
        before = len(ir.nodes())
        weights = [p.weight[:, part.columns] for p, part in zip(projections, found.parts, strict=True)]
        biases = [p.bias[part.columns] for p, part in zip(projections, found.parts, strict=True)]
        where = module_path(match.node)
        name = f"{where or 'main'}.qkv"
        operands = [
            projections[0].value,
            stored(ir, f"{name}_weight", np.concatenate(weights, 1)),
            stored(ir, f"{name}_bias", np.concatenate(biases)),
        ]
        become(ir, found, "Attention", operands)
        return Change(what="attention as one operator", where=(where,), saved_nodes=before - len(ir.nodes()))


def _projection(part: Part) -> _Projection:
    """The linear that makes a root.

    Raises:
        NoSite: Where it is none, or not one over (batch, length, depth) with a stored weight.
    """
    node, bias = part.root.producer(), None
    if node is not None and node.op_type == "Add":
        bias = next((_floats(each) for each in node.inputs if _floats(each) is not None), None)
        node = next((v.producer() for v in node.inputs if v is not None and v.const_value is None), None)
    if node is None or node.op_type != "MatMul" or (bias is not None and bias.ndim != 1):
        raise NoSite("query, key or value is no linear of anything")
    value, weight = node.inputs[0], _floats(node.inputs[1])
    if value is None or weight is None or weight.ndim != 2:
        raise NoSite("a weight is computed, not stored")
    if value.shape is None or len(value.shape) != 3:
        raise NoSite("what is projected is not over batch, length and depth")
    return _Projection(value, weight, np.zeros(weight.shape[1], weight.dtype) if bias is None else bias)


def _floats(value: onnx_ir.Value | None) -> Floats | None:
    if value is None or value.const_value is None or value.dtype is not onnx_ir.DataType.FLOAT:
        return None
    return np.asarray(value.const_value.numpy())
