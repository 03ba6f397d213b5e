"""Lowered passes: the runner and the gate hold them to the contract of every pass, and so the optimizers of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from pydantic import ValidationError

from tests.targets.onnx_passes import NET, QUANTIZED, Editing, MergeRelus, Replacing, model_of, net, probes
from vlexport.core.errors import CapabilityError, GateError, InternalError
from vlexport.passes.base import Match, NearMiss
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import DumpHook, check_order, run_pass, run_pipeline
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel, module_path
from vlexport.targets.onnx.optimize_onnx import OptimizeOnnx, OptimizeOnnxOptions
from vlexport.targets.onnx.simplify_onnx import SimplifyOnnx, SimplifyOnnxOptions


def gate_of(model: OnnxModel, *shape: int) -> NumericGate:
    return NumericGate(model, probes(*(shape or (3, 4))), level=ONNX)


def run(applied: Any, model: OnnxModel, *shape: int) -> Any:
    return run_pass(applied, model, gate=gate_of(model, *shape), level=ONNX)


def caught(applied: Any, model: OnnxModel, *shape: int) -> GateError:
    with pytest.raises(GateError) as error:
        run(applied, model, *shape)
    return error.value


# The contract


def test_record_is_that_of_any_pass_when_a_lowered_one_ran() -> None:
    model = net()
    after, record = run(MergeRelus(), model)
    assert [n.op_type for n in after.nodes()] == ["Relu", "MatMul", "Add"]
    assert [n.op_type for n in model.nodes()] == ["Relu", "Relu", "MatMul", "Add"]
    assert (record.name, record.stage, record.effect) == ("merge-relus", "legalize", "exact")
    assert [(c.what, c.count, c.saved_nodes) for c in record.changes] == [("relu merged", 1, 1)]
    assert (record.gate.proof, record.gate.probes) == ("identical", 2)


def test_nothing_is_run_when_a_sighted_gate_sees_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = NumericGate(net(), probes(3, 4), level=ONNX, sighted=True)
    monkeypatch.setattr(OnnxModel, "session", lambda self: pytest.fail("it was run"))
    _, record = run_pass(Editing(lambda ir: None, says=0), net(), gate=gate, level=ONNX)
    assert (record.gate.proof, record.gate.probes) == ("identical", 0)


def test_sighted_gate_catches_the_first_pass_when_it_is_broken() -> None:
    gate = NumericGate(net(), probes(3, 4), level=ONNX, sighted=True)
    with pytest.raises(GateError, match="pass edit-lowered changed what the model computes"):
        run_pass(Editing(scaled), net(), gate=gate, level=ONNX)


def test_near_miss_names_node_and_reason_when_a_pattern_almost_fits() -> None:
    source = NET.replace("y = Add(product, b)", "more = MatMul(first, w)\n sum = Add(product, more)\n y = Add(sum, b)")
    _, record = run(MergeRelus(), model_of(source, first="act", second="act.again"))
    (miss,) = record.near_misses
    assert (miss.pattern, miss.node) == ("relu → relu", "Relu in act.again (node_second)")
    assert miss.reason == "the first relu is also read by others"


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_prefix_is_applied_when_limited(limit: int) -> None:
    model = model_of(NET.replace("product = MatMul(second, w)", "third = Relu(second)\n product = MatMul(third, w)"))
    changes, _ = MergeRelus().run(model, limit=limit)
    assert len(changes) == min(limit, 2)
    assert len(model.nodes("Relu")) == 3 - min(limit, 2)


def test_order_is_checked_against_the_facts_of_the_level_when_run() -> None:
    needs = Editing(lambda ir: None, says=0)
    needs.requires = frozenset({"no-unread-nodes"})  # type: ignore[misc]
    check_order([MergeRelus(), needs], ONNX.facts)
    with pytest.raises(InternalError, match="requires no-unread-nodes, not established"):
        run_pipeline(net(), [needs], gate=None, level=ONNX)
    with pytest.raises(InternalError, match="names the fact 'no-unread-nodes', which has no predicate"):
        check_order([MergeRelus()])


def test_dump_holds_source_and_steps_when_the_level_is_onnx(tmp_path: Path) -> None:
    hook = DumpHook(tmp_path, level=ONNX)
    after, _ = run_pipeline(net(), [MergeRelus()], gate=None, hooks=[hook], level=ONNX)
    assert (tmp_path / "00-source.txt").read_text(encoding="utf-8") == net().text()
    assert (tmp_path / "01-merge-relus.txt").read_text(encoding="utf-8") == after.text()


# Broken passes


def scaled(model: OnnxModel) -> None:
    value = model.model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = onnx_ir.tensor(value.const_value.numpy() * np.float32(1.01), name="w")


def edited_in_place(model: OnnxModel) -> None:
    model.weights()["w"].numpy()[0, 0] += 0.01


def rewired(model: OnnxModel) -> None:
    product = model.nodes("MatMul")[0]
    new = onnx_ir.node("Neg", [product.inputs[0]], name="new_neg")
    new.outputs[0].name = "turned"
    model.model.graph.insert_before(product, new)
    product.replace_input_with(0, new.outputs[0])


def test_gate_names_pass_and_reader_when_a_weight_was_changed() -> None:
    error = caught(Editing(scaled), net())
    assert error.code == "VLX0401"
    assert error.message.startswith("pass edit-lowered changed what the model computes: ")
    assert error.where == "MatMul in head (node_product)"


def test_gate_names_the_new_node_when_it_took_the_place_of_another() -> None:
    error = caught(Replacing("second", lambda old: onnx_ir.node("Neg", [old.inputs[0]])), net())
    assert error.message.startswith("pass break-lowered changed what the model computes: ")
    assert error.where == "Neg in act.again (new_second)"


def test_gate_names_the_new_node_when_it_stands_before_one_that_is_as_it_was() -> None:
    assert caught(Editing(rewired), net()).where == "Neg (new_neg)"


def test_gate_names_pass_and_weight_when_it_is_edited_in_place() -> None:
    error = caught(Editing(edited_in_place, says=0), net())
    assert (error.code, error.message) == ("VLX0406", "pass edit-lowered edited parameter w in place")


def test_gate_names_pass_and_probe_when_the_graph_does_not_run() -> None:
    wrong = Replacing("second", lambda old: onnx_ir.node("Transpose", [old.inputs[0]], {"perm": [1, 2, 0]}))
    error = caught(wrong, net())
    assert error.code == "VLX0401"
    assert "after pass break-lowered the program does not run on the draw at the smallest size" in error.message


def rename_output(model: OnnxModel) -> None:
    model.model.graph.outputs[0].name = "z"


def fix_batch(model: OnnxModel) -> None:
    model.model.graph.inputs[0].shape = onnx_ir.Shape([1, 3, 4])


def older_opset(model: OnnxModel) -> None:
    model.model.opset_imports[""] = 18


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (rename_output, "changed the names, dtypes or dynamic dims of inputs or outputs"),
        (fix_batch, "changed the names, dtypes or dynamic dims of inputs or outputs"),
        (older_opset, "changed the opset"),
    ],
)
def test_pass_is_refused_when_it_changes_the_face(work: Any, message: str) -> None:
    with pytest.raises(InternalError) as error:
        run_pass(Editing(work), net(), gate=None, level=ONNX)
    assert (error.value.code, error.value.message) == ("VLX0403", f"pass edit-lowered {message}")


def without_a_quantizer(model: OnnxModel) -> None:
    product, quantize = model.nodes("MatMul")[0], model.nodes("QuantizeLinear")[0]
    product.replace_input_with(0, quantize.inputs[0])
    for node in reversed(model.nodes()[:2]):
        model.model.graph.remove(node, safe=True)


def test_pass_is_refused_when_it_loses_quantization() -> None:
    with pytest.raises(InternalError, match="pass edit-lowered changed the number of quantize and dequantize nodes"):
        run_pass(Editing(without_a_quantizer), model_of(QUANTIZED), gate=None, level=ONNX)


# Proof


def with_offset(offset: float, *, convolution: bool) -> OnnxModel:
    """A sum that a difference takes away again: float32 loses what leaving out both keeps."""
    head = "h = Conv(x, k)" if convolution else "h = Relu(x)"
    return model_of(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        main (float[batch,2,3] x) => (float[batch,2,3] y)
        <float[2,2,1] k = {{1,0.5,-0.5,1}}, float c = {{{offset}}}>
        {{
          {head}
          up = Add(h, c)
          y = Sub(up, c)
        }}
    """)


def without_offset() -> Replacing:
    def identity(old: onnx_ir.Node) -> onnx_ir.Node:
        up = old.inputs[0]
        assert up is not None
        return onnx_ir.node("Identity", [up.producer().inputs[0]])  # type: ignore[union-attr]

    return Replacing("y", identity)


@pytest.mark.parametrize(("convolution", "proof"), [(False, "float64"), (True, "unproved")])
def test_rounding_is_proven_where_onnx_runtime_has_the_kernels_and_unproved_elsewhere(
    convolution: bool, proof: str
) -> None:
    """ONNX Runtime has no float64 convolution on the CPU."""
    _, record = run(without_offset(), with_offset(3000.0, convolution=convolution), 2, 3)
    assert record.gate.proof == proof
    assert 1e-5 < record.gate.worst <= 1e-4


def test_large_error_is_refused_when_there_is_no_proof() -> None:
    error = caught(without_offset(), with_offset(100000.0, convolution=True), 2, 3)
    assert error.where == "Identity (new_y)"


def test_wrong_offset_is_refused_when_float64_shows_it() -> None:
    def slightly(old: onnx_ir.Node) -> onnx_ir.Node:
        return onnx_ir.node("Mul", [old.inputs[0].producer().inputs[0], old.inputs[1]])  # type: ignore[union-attr]

    error = caught(Replacing("y", slightly), with_offset(1.00005, convolution=False), 2, 3)
    assert "(bound 1e-09)" in error.message


# optimize-onnx

FOLDABLE = NET.replace("y = Add(product, b)", "more = Neg(b)\n less = Neg(more)\n y = Add(product, less)")


def test_constants_are_folded_and_paths_kept_when_optimized() -> None:
    after, record = run(OptimizeOnnx(), model_of(FOLDABLE, y="head"))
    assert [n.op_type for n in after.nodes()] == ["Relu", "MatMul", "Add"]
    assert record.changes[0].saved_nodes == 3
    assert "Neg 2 → 0" in record.changes[0].what
    assert record.gate.proof == "identical"
    assert module_path(after.nodes("Add")[0]) == "head"
    changes, _ = OptimizeOnnx().run(after)
    assert changes == [], "applied twice, it changes more"


def test_optimizer_does_nothing_when_limited_to_no_change() -> None:
    model = model_of(FOLDABLE)
    before = model.fingerprint()
    assert OptimizeOnnx().run(model, limit=0)[0] == []
    assert model.fingerprint() == before


def test_constant_is_a_near_miss_when_it_is_larger_than_the_limit() -> None:
    after, record = run(OptimizeOnnx(OptimizeOnnxOptions(input_limit=1)), model_of(FOLDABLE))
    assert len(after.nodes("Neg")) == 2
    (miss,) = record.near_misses
    assert (miss.node, miss.reason) == ("Neg (node_more)", "an operand has 2 elements, the limit is 1")


def test_quantized_weight_is_a_near_miss_when_optimized() -> None:
    model = model_of(QUANTIZED)
    after, record = run(OptimizeOnnx(), model, 4)
    assert after.quantizing == 3
    assert [m.reason for m in record.near_misses] == ["folding it would undo the quantization"]
    found = [f for f in OptimizeOnnx().find(model) if isinstance(f, NearMiss)]
    assert not [f for f in OptimizeOnnx().find(model) if isinstance(f, Match)]
    assert [f.node.name for f in found] == ["node_weight"]


@pytest.mark.parametrize("options", [{"input_limit": -1}, {"limit": 3}])
def test_option_is_refused_when_it_is_wrong(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        OptimizeOnnxOptions.model_validate(options)


# simplify-onnx, with other optimizers in the place of onnxsim


@pytest.fixture
def onnxsim_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a module of this text where onnxsim is imported from."""

    def put(body: str) -> None:
        (tmp_path / "onnxsim.py").write_text(f"import os, time, onnx\ndef simplify(model, **options):\n{body}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def refused(model: OnnxModel, **options: Any) -> CapabilityError:
    with pytest.raises(CapabilityError) as error:
        run_pass(SimplifyOnnx(SimplifyOnnxOptions(**options)), model, gate=None, level=ONNX)
    assert (error.value.code, error.value.exit_code, error.value.where) == ("VLX0408", 4, "simplify-onnx")
    assert "pass simplify-onnx: " in error.value.message
    return error.value


@pytest.mark.parametrize(
    ("body", "timeout_s", "said"),
    [
        ("    os.abort()", 60.0, "ended unexpectedly (signal 6)"),
        ("    raise RuntimeError('shape inference failed')", 60.0, "shape inference failed"),
        ("    time.sleep(60)", 2.0, "gave no answer within 2 s"),
    ],
)
def test_pass_is_named_when_its_optimizer_crashes(body: str, timeout_s: float, said: str, onnxsim_is: Any) -> None:
    onnxsim_is(body)
    assert said in refused(net(), timeout_s=timeout_s).message


def test_pass_is_named_with_what_to_install_when_its_optimizer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(net())
    assert "onnxsim is not installed" in error.message
    assert "pip install" in error.hint


def test_damage_is_refused_when_the_optimizer_drops_quantization(onnxsim_is: Any) -> None:
    onnxsim_is(
        "    if len(model.graph.node) == 4:\n        model.graph.node[3].input[0] = 'x'\n"
        "        del model.graph.node[0:2]\n    return model, True"
    )
    assert "3 quantize and dequantize nodes became 1" in refused(model_of(QUANTIZED)).message


def test_damage_is_refused_when_the_optimizer_stores_much_more(onnxsim_is: Any) -> None:
    onnxsim_is(
        "    import numpy as np\n    made = onnx.numpy_helper.from_array(np.zeros(600000, np.float32), 'large')\n"
        "    if len(model.graph.initializer) == 2:\n        model.graph.initializer.append(made)\n"
        "    return model, True"
    )
    assert "0.0 MB of weights became 2.4 MB" in refused(net()).message


def test_optimizer_is_stopped_when_it_never_ends(onnxsim_is: Any) -> None:
    onnxsim_is("    model.graph.node[0].op_type = 'Abs' if model.graph.node[0].op_type == 'Relu' else 'Relu'\n"
               "    return model, True")  # fmt: skip
    assert "onnxsim still changes the model after 5 rounds" in refused(net()).message


def test_gate_names_the_pass_when_its_optimizer_is_wrong(onnxsim_is: Any) -> None:
    onnxsim_is("    model.graph.node[0].op_type = 'Abs'\n    return model, True")
    error = caught(SimplifyOnnx(), net())
    assert "pass simplify-onnx changed what the model computes" in error.message
    assert error.where == "Abs in act (node_first)"


def test_round_trip_is_no_change_when_the_optimizer_does_nothing(onnxsim_is: Any) -> None:
    onnxsim_is("    model.producer_name = 'somebody'\n    for n in model.graph.node: del n.metadata_props[:]\n"
               "    return model, True")  # fmt: skip
    model = net()
    after, record = run(SimplifyOnnx(), model)
    assert record.changes == ()
    assert [module_path(n) for n in after.nodes()] == ["act", "act.again", "head", "head"]
    assert after.model.producer_name == model.model.producer_name
    assert all(after.weights()[name] is tensor for name, tensor in model.weights().items())


def test_onnxsim_gives_the_same_bytes_when_run_twice() -> None:
    pytest.importorskip("onnxsim", reason="there is no onnxsim for Python 3.10")
    chain = NET.replace("product = MatMul(second, w)", "same = Identity(second)\n product = MatMul(same, w)")
    model = model_of(chain, first="act", product="head", y="head")
    once, record = run(SimplifyOnnx(), model)
    again, _ = run(SimplifyOnnx(), model)
    assert not once.nodes("Identity")
    assert record.changes[0].saved_nodes > 0
    assert record.gate.proof in ("identical", "float32")
    first, second = (onnx_ir.to_proto(m.model).SerializeToString(deterministic=True) for m in (once, again))
    assert first == second
    assert module_path(once.nodes("MatMul", "Gemm")[0]) == "head"
