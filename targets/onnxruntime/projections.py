"""projections: query, key and value as stored linears of one value, packed as com.microsoft.Attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir

from vlexport.targets.onnx.attention_site import NoSite, Site
from vlexport.targets.onnx.attention_taps import QUERY
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.rewriting import insert, stored
from vlexport.targets.onnxruntime.attention_operator import Project, cut

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Projection:
    """A stored linear.

    Attributes:
        value: What it reads: (batch, length, depth).
        weight: (depth, columns).
        bias: (columns,).
    """

    value: onnx_ir.Value
    weight: Floats
    bias: Floats


def projections(found: Site) -> list[Projection]:
    """The linears of query, key and value.

    Raises:
        NoSite: Where one is no stored linear over (batch, length, depth), or they read several values.
    """
    made = [projection(found, part) for part in range(len(found.parts))]
    if len({each.value for each in made}) > 1:
        raise NoSite("query, key and value are projected from several values")
    return made


def packed(model: OnnxModel, found: Site, linears: list[Projection]) -> list[onnx_ir.Value | None]:
    """What they read, and new weights and biases with the columns in the order of heads."""
    weights = [p.weight[:, part.columns] for p, part in zip(linears, found.parts, strict=True)]
    biases = [p.bias[part.columns] for p, part in zip(linears, found.parts, strict=True)]
    name = f"{module_path(found.softmax) or 'main'}.qkv"
    return [
        linears[0].value,
        stored(model, f"{name}_weight", np.concatenate(weights, 1)),
        stored(model, f"{name}_bias", np.concatenate(biases)),
    ]


def query_of(model: OnnxModel, found: Site, operands: Sequence[onnx_ir.Value | None]) -> Project:
    """The query of one position, of the first columns of what :func:`packed` stored."""
    _, weight, bias = operands[:3]
    assert weight is not None
    assert bias is not None

    def project(before: onnx_ir.Node, position: onnx_ir.Value) -> onnx_ir.Value:
        width, name = len(found.parts[QUERY].columns), f"{before.name}_query"
        columns = cut(model, before, weight, (0, width, 1), name=f"{name}_weight")
        row = cut(model, before, bias, (0, width, 0), name=f"{name}_bias")
        product = insert(model, before, "MatMul", [position, columns], origin=before, name=f"{name}_product")
        product.outputs[0].type = position.type
        return insert(model, before, "Add", [product.outputs[0], row], origin=before, name=f"{name}_linear").outputs[0]

    return project


def projection(found: Site, part: int) -> Projection:
    """The linear that QUERY, KEY or VALUE is columns of.

    Raises:
        NoSite: Where it is no stored linear over (batch, length, depth).
    """
    node, bias = found.parts[part].root.producer(), None
    if node is not None and node.op_type == "Add":
        bias = next((_floats(each) for each in node.inputs if _floats(each) is not None), None)
        node = next((v.producer() for v in node.inputs if v is not None and v.const_value is None), None)
    if node is None or node.op_type != "MatMul" or (bias is not None and bias.ndim != 1):
        raise NoSite("query, key or value is no linear of anything")
    value, weight = node.inputs[0], _floats(node.inputs[1])
    if value is None or weight is None or weight.ndim != 2:
        raise NoSite("a weight is computed, not stored")
    found.require_positions(part, value)
    return Projection(value, weight, np.zeros(weight.shape[1], weight.dtype) if bias is None else bias)


def _floats(value: onnx_ir.Value | None) -> Floats | None:
    if value is None or value.const_value is None or value.dtype is not onnx_ir.DataType.FLOAT:
        return None
    return np.asarray(value.const_value.numpy())
