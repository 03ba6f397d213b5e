"""Attention of which others read a part: it becomes one operator that serves them, or is left with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from tests.targets import attention_nets as nets
from tests.targets import tapped_nets as tapped
from vlexport.core.numerics import sqnr_db
from vlexport.passes.probes import Probe
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.fuse_attention import FuseAttention
from vlexport.targets.onnxruntime.fuse_biased_attention import FuseBiasedAttention
from vlexport.targets.onnxruntime.fuse_qattention import FuseQattention
from vlexport.targets.onnxruntime.minimum import CONTRIBUTED

PLAIN = (tapped.ClassRow, tapped.MeanKeys, tapped.LastRowOfAll, tapped.FewKeys, tapped.ApartRow)
BIASED = (tapped.WeighedRow, tapped.PaddedRow)
READ = "what it is projected from is read by others, too"
MISSED = {
    tapped.TwoQueries: READ,
    tapped.GivenKeys: "what it is projected from is an output, too",
    tapped.ScaledKeys: READ,
    tapped.Narrow: "keys that others read are of another width than values",
}


@pytest.fixture(scope="module")
def lowered() -> OnnxModel:
    return nets.lowered(nets.program_of(*PLAIN, *BIASED))


@pytest.fixture(scope="module")
def fused(lowered: OnnxModel) -> OnnxModel:
    model = lowered.copy()
    assert len(FuseAttention().run(model)[0]) == len(PLAIN)
    changes, misses = FuseBiasedAttention().run(model)
    assert (len(changes), misses) == (len(BIASED), [])
    return model


def own(model: OnnxModel) -> list[onnx_ir.Node]:
    return [node for node in model.nodes() if node.domain]


def test_attention_that_others_read_a_part_of_becomes_one_operator(fused: OnnxModel) -> None:
    assert [node.op_type for node in own(fused)] == ["Attention"] * 7
    assert {"Attention", "MatMulIntegerToFloat"} <= {*CONTRIBUTED}, "the recorded minimum has them"
    assert all(len(node.outputs) == 2 for node in own(fused)), "each gives out key and value"
    counts = Counter(node.op_type for node in fused.nodes())
    assert counts["Softmax"] == 4, "rows of the class token alone are left"
    assert list(ONNX.problems(fused)) == []
    assert ONNX.facts["no-unread-nodes"](fused)
    assert FuseAttention().run(fused.copy())[0] == FuseBiasedAttention().run(fused.copy())[0] == []


@pytest.mark.parametrize("batch", [1, 3])
def test_others_read_the_same_numbers(lowered: OnnxModel, fused: OnnxModel, batch: int, tmp_path: Path) -> None:
    values = nets.tokens(batch, 7)
    values[-1, :, 0] = -values[-1, :, 0].abs()
    was, now = (nets.computed(each, tmp_path / "m.onnx", values) for each in (lowered, fused))
    assert len(was) == 14
    for number, (a, b) in enumerate(zip(was, now, strict=True)):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max(), err_msg=str(number))


def test_attention_is_left_with_the_reason_when_others_read_what_no_operator_gives() -> None:
    model = nets.lowered(nets.program_of(*MISSED))
    text = model.text()
    changes, found = FuseAttention().run(model)
    assert (changes, [each.reason for each in found], model.text()) == ([], list(MISSED.values()), text)


@pytest.mark.parametrize("scheme", ["static-u8s8", "dynamic-u8s8"])
def test_integer_projections_serve_others_too(scheme: str, tmp_path: Path) -> None:
    before = nets.lowered(nets.quantized(nets.program_of(tapped.ClassRow, tapped.MeanKeys), scheme))
    model = before.copy()
    changes, misses = FuseQattention().run(model)
    assert (len(changes), misses) == (2, [])
    assert Counter(node.op_type for node in own(model)) == {"QAttention": 2, "MatMulIntegerToFloat": 1}
    assert model.quantizing == before.quantizing, "what the operators round on their own is counted"
    assert list(ONNX.problems(model)) == []
    places = list(ONNX.places(before, model, Probe("drawn", (nets.tokens(2, 9),))))
    assert min(sqnr_db(ours.reshape(was.shape), was) for _, ours, was in places) >= 80.0
    was, now = (nets.computed(each, tmp_path / "m.onnx", nets.tokens(3, 7)) for each in (before, model))
    for a, b in list(zip(was, now, strict=True))[1::2]:  # what is beside is computed of no rounded value
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())
