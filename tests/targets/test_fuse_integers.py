"""fuse-qattention and fuse-dynamic-linear: which integer operators are written, and that ONNX Runtime keeps them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.targets import attention_nets as nets
from tests.targets.test_onnx_quantized import session
from vlexport.core.numerics import sqnr_db
from vlexport.ir.program import Program
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
