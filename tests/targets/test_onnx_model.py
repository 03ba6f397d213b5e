"""OnnxModel: what it prints, shares and runs, and the level that tells the runner of passes about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch

from tests.targets.onnx_passes import NET, QUANTIZED, SCOPES, model_of, net
from vlexport.core.errors import CapabilityError, InternalError
from vlexport.passes.level import Failure
from vlexport.passes.pipeline import verify
from vlexport.passes.probes import Probe
from vlexport.targets.onnx.level import CONSTANT_LIMIT_BYTES, ONNX
from vlexport.targets.onnx.model import OnnxModel, describe, module_path

TEXT = """\
onnx(x: f32[batch,3,4]) of ai.onnx 20
  %0 = Relu(x) -> ?
  %1 = Relu(%0) -> ?
  %2 = MatMul(%1, @w: f32[4,2]) -> ?
  %3 = Add(%2, @b: f32[2]) -> f32[batch,3,2]
  return y: %3
"""
BRANCHES = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[batch,2] x, bool c) => (float[batch,2] y)
{
  twice = Add(x, x)
  y = If(c) <
    then_branch = yes () => (float[batch,2] kept) { kept = Relu(twice) },
    else_branch = no () => (float[batch,2] turned) { turned = Neg(twice) }
  >
}
"""


def x(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 4)).astype(np.float32)


def expected(value: np.ndarray) -> np.ndarray:
    w = np.array([0.5, -1, 2, 0.25, -0.75, 1.5, 3, -2], np.float32).reshape(4, 2)
    return np.maximum(value, 0) @ w + np.array([0.5, -0.25], np.float32)


# Text and fingerprint


def test_text_shows_weights_at_their_operand_when_printed() -> None:
    assert net().text() == TEXT


def test_text_indents_inner_graphs_and_reads_outer_values_when_there_are_branches() -> None:
    found = model_of(BRANCHES).text()
    assert "then_branch={\n    %0 = Relu(%0)" in found
    assert "else_branch={\n    %0 = Neg(%0)" in found


def test_text_does_not_change_when_values_are_renamed() -> None:
    model = net()
    model.nodes("MatMul")[0].outputs[0].name = "another"
    assert model.text() == TEXT


def scale_weight(model: OnnxModel) -> None:
    value = model.model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = onnx_ir.tensor(value.const_value.numpy() * np.float32(1.01), name="w")


def other_operator(model: OnnxModel) -> None:
    model.nodes("Relu")[0].op_type = "Abs"


def other_attribute(model: OnnxModel) -> None:
    model.nodes("MatMul")[0].attributes["extra"] = onnx_ir.AttrInt64("extra", 3)


def other_opset(model: OnnxModel) -> None:
    model.model.opset_imports[""] = 19


@pytest.mark.parametrize("edit", [scale_weight, other_operator, other_attribute, other_opset])
def test_fingerprint_changes_when_anything_that_computes_does(edit: Any) -> None:
    model = net()
    before = model.fingerprint()
    assert net().fingerprint() == before
    twin = model.copy()
    edit(twin)
    assert twin.fingerprint() != before
    assert model.fingerprint() == before


def test_copies_share_tensors_and_nothing_else_when_made() -> None:
    model = net()
    twin = model.copy()
    assert all(twin.weights()[name] is tensor for name, tensor in model.weights().items())
    twin.nodes("Relu")[0].op_type = "Abs"
    assert model.nodes()[0].op_type == "Relu"
    assert [module_path(n) for n in twin.nodes()] == ["act", "act.again", "head", "head"]


def test_digest_is_computed_again_when_asked_for_fresh() -> None:
    model = net()
    tensor = model.weights()["w"]
    kept = model.digest(tensor)
    tensor.numpy()[0, 0] += 1
    assert model.digest(tensor) == kept
    assert model.digest(tensor, fresh=True) != kept


# Running


@pytest.mark.parametrize("batch", [1, 3])
def test_run_gives_what_the_graph_says_when_batch_is_any(batch: int) -> None:
    found = net().run({"x": x(batch)})
    # float32 sums of four products: a few units in the last place
    np.testing.assert_allclose(found["y"], expected(x(batch)), rtol=0, atol=1e-5)


def test_observe_gives_every_value_by_name_when_run() -> None:
    found = net().observe({"x": x()})
    assert set(found) == {"first", "second", "product", "y"}
    assert (found["first"] == np.maximum(x(), 0)).all()
    assert found["product"].shape == (2, 3, 2)


def test_process_goes_on_when_the_graph_is_refused() -> None:
    model = net()
    model.nodes("Relu")[0].op_type = "NoSuchOperator"
    with pytest.raises(CapabilityError) as caught:
        model.run({"x": x()})
    assert caught.value.code == "VLX0505"
    assert "NoSuchOperator" in caught.value.message


def test_double_computes_in_float64_when_the_kernels_exist() -> None:
    twin = net().double()
    assert twin is not None
    value = x().astype(np.float64)
    found = twin.run({"x": value})["y"]
    assert found.dtype == np.float64
    # float64 sums of four products
    np.testing.assert_allclose(found, expected(value).astype(np.float64), rtol=0, atol=1e-12)
    assert net().weights()["w"].dtype is onnx_ir.DataType.FLOAT


def test_double_changes_casts_and_constants_when_they_name_float32() -> None:
    source = NET.replace("second = Relu(first)", "half = Constant<value = float {0.5}>()\n second = Mul(first, half)")
    source = source.replace("first = Relu(x)", "first = Cast<to = 1>(x)")
    twin = model_of(source).double()
    assert twin is not None
    assert twin.run({"x": x().astype(np.float64)})["y"].dtype == np.float64


# Names


def test_description_holds_operator_module_and_name_when_known() -> None:
    node = net().nodes("MatMul")[0]
    assert describe(node) == "MatMul in head (node_product)"


@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        ("['', 'blocks', 'blocks.0', 'linear']", "blocks.0"),
        ("['', 'linear']", ""),
        ("['_empty_nn_module_stack_from_metadata_hook', 'sym_size_int']", ""),
        ("[", ""),
        ("", ""),
    ],
)
def test_module_path_is_read_when_the_exporter_wrote_it(scopes: str, path: str) -> None:
    node = net().nodes()[0]
    node.metadata_props[SCOPES] = scopes
    assert module_path(node) == path


# The level


def read_too_early(model: OnnxModel) -> None:
    graph = model.model.graph
    first = model.nodes("Relu")[0]
    graph.remove(first)
    graph.append(first)


def without_content(model: OnnxModel) -> None:
    model.model.graph.initializers["w"].const_value = None


def large_constant(model: OnnxModel) -> None:
    content = onnx_ir.tensor(np.zeros(CONSTANT_LIMIT_BYTES // 4 + 1, np.float32))
    node = onnx_ir.node("Constant", [], {"value": content}, name="large")
    node.outputs[0].name = "large"
    model.model.graph.insert_before(model.nodes()[0], node)


def twice_the_name(model: OnnxModel) -> None:
    model.nodes("MatMul")[0].outputs[0].name = "first"


def one_output_more(model: OnnxModel) -> None:
    model.model.graph.outputs.append(model.nodes("MatMul")[0].outputs[0])


@pytest.mark.parametrize(
    ("work", "message", "where"),
    [
        (read_too_early, "it reads first before it is made", "Relu in act.again (node_second)"),
        (without_content, "an initializer has no content", "w"),
        (large_constant, "a constant of 1.0 MB lies inside a node", "Constant (large)"),
        (twice_the_name, "two values are called first", "MatMul in head (node_product)"),
        (one_output_more, "the number of outputs has changed", ""),
    ],
)
def test_verify_names_the_node_when_the_model_is_invalid(work: Any, message: str, where: str) -> None:
    model = net()
    verify(model, made_by="nothing", level=ONNX)
    work(model)
    with pytest.raises(InternalError) as caught:
        verify(model, made_by="some-pass", level=ONNX)
    assert caught.value.code == "VLX0403"
    assert f"pass some-pass left an invalid program: {message}" in caught.value.message
    assert caught.value.where == where


def test_inner_graphs_may_read_outer_values_when_verified() -> None:
    verify(model_of(BRANCHES), made_by="nothing", level=ONNX)


def test_unread_node_is_seen_when_the_fact_is_evaluated() -> None:
    model = net()
    assert ONNX.facts["no-unread-nodes"](model)
    unread = onnx_ir.node("Neg", [model.model.graph.inputs[0]])
    unread.outputs[0].name = "unread"
    model.model.graph.append(unread)
    assert not ONNX.facts["no-unread-nodes"](model)


def test_quantizing_nodes_are_counted_when_there_are_some() -> None:
    assert (net().quantizing, model_of(QUANTIZED).quantizing) == (0, 3)


def test_level_yields_a_failure_when_an_input_does_not_fit() -> None:
    good = Probe("good", (torch.ones(1, 3, 4),))
    first, second = ONNX.run(net(), [good, Probe("bad", (torch.ones(1, 3, 5),))])
    assert isinstance(first, tuple)
    assert isinstance(second, Failure)
    assert "shape is 1×3×5" in second.reason
