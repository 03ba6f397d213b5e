"""fuse-qattention and fuse-dynamic-linear: which integer operators are written, and that ONNX Runtime keeps them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from tests.targets import attention_nets as nets
from tests.targets.test_onnx_quantized import session
from vlexport.core.errors import GateError
from vlexport.core.numerics import sqnr_db
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Match
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import Probe
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.fuse_dynamic_linear import FuseDynamicLinear
from vlexport.targets.onnxruntime.fuse_qattention import FuseQattention
from vlexport.targets.onnxruntime.minimum import CONTRIBUTED

SCHEMES = ("static-u8s8", "dynamic-u8s8")
FLOATING = {"MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "Softmax"}


@pytest.fixture(scope="module")
def program() -> Program:
    return nets.program_of(nets.Packed, nets.Apart)


@pytest.fixture(scope="module", params=SCHEMES)
def integers(request: pytest.FixtureRequest, program: Program) -> tuple[Program, OnnxModel]:
    """In integers, and lowered."""
    made = nets.quantized(program, str(request.param))
    return made, nets.lowered(made)


def own(model: OnnxModel) -> Counter[str]:
    return Counter(node.op_type for node in model.nodes() if node.domain)


def same(before: OnnxModel, after: OnnxModel, kind: str, scratch: Path) -> None:
    """What operators of a kind make is what was made in their place; what is computed of it is not looked at."""
    names = [str(node.outputs[0].name) for node in after.nodes(kind)]
    found = []
    for each in (before.copy(), after.copy()):
        made = {str(v.name): v for node in each.nodes() for v in node.outputs}
        each.model.graph.outputs[:] = [made[name] for name in names]
        found.append(nets.computed(each, scratch / "made.onnx", nets.tokens(3, 7)))
    for was, now in zip(*found, strict=True):
        np.testing.assert_allclose(now.reshape(was.shape), was, rtol=0, atol=2e-6 * np.abs(was).max())


def test_integer_projections_and_attention_become_one_operator(
    integers: tuple[Program, OnnxModel], tmp_path: Path
) -> None:
    before, model = integers[1], integers[1].copy()
    changes, misses = FuseQattention().run(model)
    assert (len(changes), misses, own(model)) == (2, [], {"QAttention": 2})
    assert model.quantizing == before.quantizing, "what the operator rounds on its own is counted"
    assert list(ONNX.problems(model)) == []
    assert FuseQattention().run(model) == ([], [])
    same(before, model, "QAttention", tmp_path)


def test_linear_with_its_rounding_becomes_one_operator_and_rounds_once_for_several(
    program: Program, tmp_path: Path
) -> None:
    before = nets.lowered(nets.quantized(program, "dynamic-u8s8"))
    model = before.copy()
    changes, misses = FuseDynamicLinear().run(model)
    assert (len(changes), misses) == (6, [])
    assert own(model) == {"DynamicQuantizeMatMul": 3, "MatMulIntegerToFloat": 3}
    assert Counter(node.op_type for node in model.nodes())["DynamicQuantizeLinear"] == 1, "one for query, key and value"
    assert model.quantizing == before.quantizing
    assert list(ONNX.problems(model)) == []
    same(before, model, "MatMulIntegerToFloat", tmp_path)
    same(before, model, "DynamicQuantizeMatMul", tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_operator_alone_makes_what_was_made_in_its_place(scheme: str, program: Program) -> None:
    before = nets.lowered(nets.quantized(program, scheme))
    after = before.copy()
    made = [len(fusion.run(after)[0]) for fusion in (FuseQattention(), FuseDynamicLinear())]
    found = list(ONNX.places(before, after, Probe("drawn", (nets.tokens(2, 9),))))
    assert len(found) == sum(made)
    assert min(sqnr_db(ours.reshape(was.shape), was) for _, ours, was in found) >= 80.0
    assert list(ONNX.places(before, before.copy(), Probe("drawn", (nets.tokens(2, 9),)))) == []


class Forgetful(FuseDynamicLinear):
    """A fusion that halves one bias: the outputs keep what a fusion between roundings promises."""

    def apply(self, ir: OnnxModel, match: Match[onnx_ir.Node]) -> Change:
        made, linear = match.data
        if linear.bias is not None and "query" in str(match.node.metadata_props):
            match = replace(match, data=(made, replace(linear, bias=linear.bias / 2)))
        return super().apply(ir, match)


def test_operator_that_loses_little_is_refused_with_its_place(program: Program) -> None:
    before = nets.lowered(nets.quantized(program, "dynamic-u8s8"))
    gate = NumericGate(before, [Probe("drawn", (nets.tokens(2, 9),))], level=ONNX, sighted=True)
    with pytest.raises(GateError, match="of one place, 40 is promised") as error:
        run_pass(Forgetful(), before, gate=gate, level=ONNX)
    assert "MatMulIntegerToFloat" in str(error.value.where)
    assert "query" in str(error.value.where)


def test_runtime_keeps_every_integer_operator_and_dequantizes_no_weight(
    integers: tuple[Program, OnnxModel], tmp_path: Path
) -> None:
    after, model = integers[0], integers[1].copy()
    for fusion in (FuseQattention(), FuseDynamicLinear()):
        fusion.run(model)
    assert own(model).keys() <= {*CONTRIBUTED}, "the recorded minimum has no other"
    found = session(model.model, tmp_path / "opened.onnx").run(None, {"image": nets.tokens(32, 7).numpy()})
    graph = onnx.load(tmp_path / "opened.onnx").graph
    kept = Counter(node.op_type for node in graph.node)
    linear = "DynamicQuantizeMatMul" if "DynamicQuantizeMatMul" in own(model) else "QGemm"
    assert (kept["QAttention"], kept[linear], kept.keys() & FLOATING) == (2, 2, set())
    stored = {each.name for each in graph.initializer}
    assert not [n.name for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    for ours, wanted in zip(found, after.run(nets.tokens(32, 7)), strict=True):
        assert sqnr_db(ours, wanted.numpy()) >= 30.0


def test_integer_attention_is_left_when_its_projection_is_in_float(program: Program) -> None:
    changes, misses = FuseQattention().run(nets.lowered(program))
    assert (changes, {each.reason for each in misses}) == ([], {"its weight is not in integers"})


@pytest.mark.parametrize(("scheme", "largest"), [("dynamic-u8s8", 127), ("dynamic-u8s7", 63)])
def test_weights_of_dynamic_linears_keep_to_the_grid_of_the_scheme_and_one_rounding_is_shared(
    scheme: str, largest: int, program: Program
) -> None:
    made = nets.quantized(program, scheme)
    weights = [made.tensor_of(node.args[0]) for node in made.calls("vlexport.dequantize.default")]
    assert max(int(each.abs().max()) for each in weights if each is not None) == largest
    linears = len(made.calls("aten.linear.default"))
    assert (linears, len(made.calls("vlexport.choose_qparams.default"))) == (6, 4), "query, key and value share one"
