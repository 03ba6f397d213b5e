"""A small ONNX model, and lowered passes over it, good and broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir
import torch

from vlexport.core.artifact import DimRange, Signature, TensorSpec
from vlexport.passes.base import Change, Match, NearMiss, Pass
from vlexport.passes.probes import Probe
from vlexport.targets.onnx.model import OnnxModel, inherit
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget

UNFUSED = {
    f"onnxruntime.{each.option}": "false"
    for each in OnnxRuntimeTarget.lowered
    if OnnxRuntimeOptions.model_fields[each.option].default is None
}
"""Without the lowered passes that the target decides on: by the processor that the tests run on, or always."""

SCOPES = "pkg.torch.onnx.name_scopes"
NET = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[batch,3,4] x) => (float[batch,3,2] y)
<float[4,2] w = {0.5,-1,2,0.25,-0.75,1.5,3,-2}, float[2] b = {0.5,-0.25}>
{
  first = Relu(x)
  second = Relu(first)
  product = MatMul(second, w)
  y = Add(product, b)
}
"""
QUANTIZED = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[batch,4] x) => (float[batch,2] y)
<int8[4,2] w = {1,2,3,4,5,6,7,8}, float s = {0.5}, int8 z = {0}>
{
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  weight = DequantizeLinear(w, s, z)
  y = MatMul(d, weight)
}
"""


def model_of(source: str, **modules: str) -> OnnxModel:
    """A model from its text; ``modules`` names the module path of the node that makes a value."""
    model = onnx_ir.from_proto(onnx.parser.parse_model(source))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
        if node.outputs[0].name in modules:
            node.metadata_props[SCOPES] = repr(["", modules[str(node.outputs[0].name)], "call"])
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(np.array(value.const_value.numpy()), name=value.name)

    def spec(value: onnx_ir.Value) -> TensorSpec:
        assert value.shape is not None
        assert value.dtype is not None
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)

    inputs, outputs = tuple(map(spec, model.graph.inputs)), tuple(map(spec, model.graph.outputs))
    return OnnxModel(model, Signature(inputs=inputs, outputs=outputs, dims={"batch": DimRange()}))


def net() -> OnnxModel:
    """Two relus, a product and a sum, each from a module of its own."""
    return model_of(NET, first="act", second="act.again", product="head", y="head")


def probes(*shape: int, seed: int = 0) -> list[Probe]:
    """Seeded draws at batch 1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"draw at the smallest size": 1, "draw at the largest size": 3}
    return [Probe(name, (torch.randn(n, *shape, generator=generator),)) for name, n in sizes.items()]


class MergeRelus(Pass[OnnxModel]):
    """Of two relus on one another, the first goes."""

    name = "merge-relus"
    stage = "legalize"
    establishes = frozenset({"no-unread-nodes"})

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        for node in ir.nodes("Relu"):
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            if before is None or before.op_type != "Relu":
                continue
            if len(before.outputs[0].uses()) > 1:
                yield NearMiss("relu → relu", node, "the first relu is also read by others")
            else:
                yield Match(node, (before, node), before)

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        match.node.replace_input_with(0, match.data.inputs[0])
        ir.model.graph.remove(match.data, safe=True)
        return Change(what="relu merged", where=("act",), saved_nodes=1)


class Replacing(Pass[OnnxModel]):
    """Puts what ``make`` returns in the place of the node that makes ``value``, once, under the value's name."""

    name = "break-lowered"
    stage = "legalize"

    def __init__(self, value: str, make: Callable[[onnx_ir.Node], onnx_ir.Node]) -> None:
        super().__init__()
        self.value, self.make = value, make

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        for node in ir.nodes():
            if node.outputs[0].name == self.value and not (node.name or "").startswith("new"):
                yield Match(node, (node,))

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        old = match.node
        new = self.make(old)
        new.name = f"new_{self.value}"
        inherit(new, old)
        new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = (
            self.value,
            old.outputs[0].type,
            old.outputs[0].shape,
        )
        ir.model.graph.insert_before(old, new)
        old.outputs[0].name = "old"
        old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
        ir.model.graph.remove(old, safe=True)
        return Change(what="replaced", where=("act",))


class Editing(Pass[OnnxModel]):
    """Does something to the whole model."""

    name = "edit-lowered"
    stage = "legalize"

    def __init__(self, work: Callable[[OnnxModel], Any], *, says: int = 1) -> None:
        super().__init__()
        self.work, self.says = work, says

    def find(self, ir: OnnxModel) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
        return iter(())

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        raise NotImplementedError

    def run(self, ir: OnnxModel, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss[Any]]]:
        self.work(ir)
        return [Change(what="edited")] * self.says, []
