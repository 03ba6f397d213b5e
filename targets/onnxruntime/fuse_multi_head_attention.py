"""fuse-multi-head-attention: as fuse-attention, where queries, keys and values need not be projected from one value.

Before → after::

    %q, %k, %v = linears of x, y and y             %q, %k, %v = the same
    … reshape, transpose …                   →     %1 = com.microsoft.MultiHeadAttention(%q, %k, %v) num_heads=2 scale=…
    %9 = Softmax(scale · %q · %kᵀ + bias)          return %1
    … %9 · %v, transpose, reshape …

Equation: ``MultiHeadAttention(q, k, v, bias) = softmax(scale · q kᵀ + bias) v`` for every head, heads joined; queries
may be fewer or more than keys, and values of another width. A linear whose columns are of several parts, or in another
order than heads, is computed once a part, with its columns in the order of heads.

Does not apply when: heads are no columns of what they are moved from, queries, keys and values are not of batch, length
and width, the mask has dims of its own, a row may be masked as a whole, or others read a linear of several parts.
Numerical effect: rounding; products are added up in another order.
Source: ONNX Runtime, contributed operators, com.microsoft.MultiHeadAttention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir

from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.targets.onnx.attention_site import NoSite, Part, Site, any_site, sites
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import CONTRIB, insert, stored, take_place
from vlexport.targets.onnxruntime.projections import Projection, projection
from vlexport.targets.onnxruntime.score_bias import expanded, may_mask_whole_rows

_PATTERN = "queries, keys and values → attention"


class FuseMultiHeadAttention(Pass[OnnxModel]):
    """As fuse-attention, where queries, keys and values need not be projected from one value."""

    name: ClassVar[str] = "fuse-multi-head-attention"
    stage: ClassVar[Stage] = "legalize"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        """Every softmax that a product reads."""
        return sites(ir, _PATTERN, _read)

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        """One node in the place of products, softmax and the moving of heads."""
        found: Site = match.data[0]
        linears: list[Projection | None] = match.data[1]
        before, where = len(ir.nodes()), module_path(match.node)
        last = found.made.producer()
        assert last is not None
        operands: list[onnx_ir.Value | None] = [
            part.root if linear is None else _projected(ir, found, part, linear, last, name)
            for part, linear, name in zip(found.parts, linears, ("query", "key", "value"), strict=True)
        ]
        if found.bias is not None:
            query, key = operands[:2]
            assert query is not None
            assert key is not None
            operands += [None, None, expanded(ir, found, query, key, last)]
        attributes = {name: value for name, value in found.attributes().items() if name != "qkv_hidden_sizes"}
        node = insert(
            ir, last, "MultiHeadAttention", operands, domain=CONTRIB, attributes=attributes, origin=match.node
        )
        take_place(ir, found.made, node, origin=match.node, rows=found.rows)
        change = "attention of several values as one operator"
        return Change(what=change, where=(where,), saved_nodes=before - len(ir.nodes()))


def _read(softmax: onnx_ir.Node) -> tuple[Site, list[Projection | None]]:
    found = any_site(softmax)
    if found.guarded and (found.bias is None or may_mask_whole_rows(found.bias)):
        raise NoSite("a row may be masked as a whole")
    return found, [_own(found, part) for part in range(len(found.parts))]


def _is_whole(part: Part) -> bool:
    """Whether heads are all columns of the root, in their order."""
    assert part.root.shape is not None
    width = part.root.shape[-1]
    return isinstance(width, int) and np.array_equal(part.columns, np.arange(width))


def _own(found: Site, part: int) -> Projection | None:
    """The linear of which a part takes some columns; None where it takes all of what it is moved from.

    Raises:
        NoSite: Where there is no linear, or it has to stay for others.
    """
    if _is_whole(found.parts[part]):
        found.require_positions(part, found.parts[part].root)
        return None
    made = projection(found, part)
    if found.hidden or found.taps:
        raise NoSite("others read the linear that it takes some columns of")
    return made


def _projected(
    model: OnnxModel, found: Site, part: Part, linear: Projection, before: onnx_ir.Node, what: str
) -> onnx_ir.Value:
    """A part projected alone: (batch, length, heads · width)."""
    name = f"{found.softmax.name}_{what}"
    weight = stored(model, f"{name}_weight", linear.weight[:, part.columns])
    bias = stored(model, f"{name}_bias", linear.bias[part.columns])
    product = insert(model, before, "MatMul", [linear.value, weight], origin=found.softmax, name=f"{name}_product")
    made = insert(model, before, "Add", [product.outputs[0], bias], origin=found.softmax, name=f"{name}_linear")
    assert part.root.shape is not None
    for each in (product.outputs[0], made.outputs[0]):
        each.type = part.root.type
        each.shape = onnx_ir.Shape([*part.root.shape[:-1], len(part.columns)])
    return made.outputs[0]
