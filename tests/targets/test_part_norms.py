"""part-norms: ONNX Runtime makes no slow operator of a sum and its norm, and computes the same without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from tests.targets.onnx_passes import model_of
from vlexport.core.numerics import relative_error
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.part_norms import PartNorms

NET = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[{x}] x, float[{y}] y) => ({outputs})
<float[4] w = {{1,2,-1,0.5}}, float[4] b = {{0,1,2,3}}>
{{
  total = Add(x, y)
  normed = LayerNormalization<axis=-1>({read}, w, b)
  z = Relu(normed)
  {more}
}}
"""


def net(x: str = "batch,3,4", y: str = "", *, outputs: str = "", read: str = "total", more: str = "") -> OnnxModel:
    made = outputs or f"float[{x}] z"
    return model_of(NET.format(x=x, y=y or x, outputs=made, read=read, more=more))


def optimized(model: OnnxModel, tmp_path: Path) -> list[str]:
    """Operators that ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(_bytes(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def _bytes(model: OnnxModel) -> bytes:
    return onnx_ir.to_proto(model.model).SerializeToString()


@pytest.mark.parametrize("shape", ["batch,3,4", "2,3,4", "batch,length,4"])
def test_runtime_leaves_sum_and_norm_apart_and_computes_the_same(shape: str, tmp_path: Path) -> None:
    before = net(shape)
    after = before.copy()
    changes, misses = PartNorms().run(after)
    assert ([each.saved_nodes for each in changes], misses) == ([0], [])
    assert [node.op_type for node in after.nodes()] == ["Sum", "LayerNormalization", "Relu"]
    assert after.nodes()[0].outputs[0].name == "total"
    assert list(ONNX.problems(after)) == []
    assert PartNorms().run(after.copy()) == ([], [])
    assert "SkipLayerNormalization" in optimized(before, tmp_path), "or there is no need of the pass any more"
    assert "SkipLayerNormalization" not in optimized(after, tmp_path)
    draw = np.random.default_rng(0)
    inputs = {name: draw.standard_normal((2, 3, 4)).astype(np.float32) for name in ("x", "y")}
    found, wanted = (onnxruntime.InferenceSession(_bytes(each)).run(None, inputs)[0] for each in (after, before))
    assert relative_error(found, wanted) <= 1e-6


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (net("batch,3,4", "rows,3,4"), "it does not add two of three dims and one shape"),
        (net("3,4"), "it does not add two of three dims and one shape"),
        (net("batch,3,4", "1,3,4"), "it does not add two of three dims and one shape"),
    ],
)
def test_near_misses_say_why(model: OnnxModel, reason: str, tmp_path: Path) -> None:
    changes, misses = PartNorms().run(model)
    assert changes == []
    assert [each.reason for each in misses] == [reason]
    assert "SkipLayerNormalization" not in optimized(model, tmp_path), "the runtime leaves it alone, too"


def test_dims_without_a_name_may_differ() -> None:
    model = net()
    model.model.graph.inputs[0].shape = onnx_ir.Shape([None, 3, 4])
    changes, misses = PartNorms().run(model)
    assert (changes, [each.reason for each in misses]) == ([], ["sizes are not known"])


@pytest.mark.parametrize(
    "model",
    [
        net(outputs="float[batch,3,4] z, float[batch,3,4] more", more="more = Neg(total)"),
        net(outputs="float[batch,3,4] z, float[batch,3,4] total"),
        net(read="x", outputs="float[batch,3,4] z, float[batch,3,4] total"),
    ],
)
def test_a_sum_that_others_read_is_no_site(model: OnnxModel) -> None:
    assert PartNorms().run(model) == ([], [])
