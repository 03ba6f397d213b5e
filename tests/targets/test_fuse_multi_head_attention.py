"""fuse-multi-head-attention: cross attention, other widths and lengths, as one operator that computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from tests.targets import attention_nets as nets
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.fuse_attention import FuseAttention
from vlexport.targets.onnxruntime.fuse_multi_head_attention import FuseMultiHeadAttention
from vlexport.targets.onnxruntime.minimum import CONTRIBUTED

FUSED = (
    nets.Crossed, nets.Pooled, nets.PlacedPooled, nets.MaskedPooled, nets.ClassQuery, nets.Watched, nets.Packed,
    nets.Causal,
)  # fmt: skip
MISSED = {
    nets.FirstQuery: "the query, or another part, is not of all positions in their order",
    nets.Reversed: "heads are no columns of what it is projected from",
    nets.ScaledValues: "the values are scaled",
    nets.Padded: "a row may be masked as a whole",
    nets.SharedPair: "others read the linear that it takes some columns of",
    nets.Windowed: "positions are shared out over batch and length behind the projection",
}


@pytest.fixture(scope="module")
def lowered() -> OnnxModel:
    return nets.lowered(nets.program_of(*FUSED))


@pytest.fixture(scope="module")
def fused(lowered: OnnxModel) -> OnnxModel:
    model = lowered.copy()
    changes, found = FuseMultiHeadAttention().run(model)
    assert (len(changes), found) == (len(FUSED), [])
    return model


def own(model: OnnxModel) -> list[onnx_ir.Node]:
    return [node for node in model.nodes() if node.domain]


def test_every_attention_becomes_one_operator_whatever_its_queries_and_keys_are_of(fused: OnnxModel) -> None:
    assert [node.op_type for node in own(fused)] == ["MultiHeadAttention"] * len(FUSED)
    assert {"MultiHeadAttention"} <= {*CONTRIBUTED}, "the recorded minimum has it"
    assert not fused.nodes("Softmax")
    assert list(ONNX.problems(fused)) == []
    assert FuseMultiHeadAttention().run(fused.copy()) == ([], [])


def test_only_a_scale_of_its_own_and_a_bias_are_written(fused: OnnxModel) -> None:
    scales = [node.attributes["scale"].as_float() for node in own(fused) if "scale" in node.attributes]
    assert scales == pytest.approx([0.3])
    biased = [len(node.inputs) == 6 for node in own(fused)]
    assert biased == [kind in (nets.PlacedPooled, nets.MaskedPooled, nets.Causal) for kind in FUSED]


def test_linears_of_several_parts_are_computed_once_a_part(lowered: OnnxModel, fused: OnnxModel) -> None:
    def columns(model: OnnxModel) -> list[int]:
        weights = [node.inputs[1] for node in model.nodes("MatMul")]
        found = [each.shape[-1] for each in weights if each is not None and each.const_value is not None and each.shape]
        return sorted(size for size in found if isinstance(size, int))

    apart = [24] * (3 + 3 + 2)  # packed twice, and a pair
    wide, narrow = ([each for each in columns(model) if each > 24] for model in (lowered, fused))
    assert wide == [48] * 4 + [72] * 2
    assert narrow == [48] * 3, "values that are wide in the model stay so"
    assert columns(fused).count(24) == columns(lowered).count(24) + len(apart)


@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_are_the_same_at_every_batch(lowered: OnnxModel, fused: OnnxModel, batch: int, tmp_path: Path) -> None:
    was, now = (nets.computed(each, tmp_path / "m.onnx", nets.tokens(batch, 7)) for each in (lowered, fused))
    for a, b in zip(was, now, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, rtol=0, atol=3e-6 * np.abs(a).max())


def test_attention_is_left_with_the_reason_when_its_parts_are_no_three_values() -> None:
    model = nets.lowered(nets.program_of(*MISSED))
    text = model.text()
    changes, found = FuseMultiHeadAttention().run(model)
    assert (changes, [each.reason for each in found], model.text()) == ([], list(MISSED.values()), text)


def test_packed_attention_is_left_to_the_operator_that_projects_itself() -> None:
    model = nets.lowered(nets.program_of(nets.Packed, nets.Pooled))
    counts = [len(each.run(model)[0]) for each in (FuseAttention(), FuseMultiHeadAttention())]
    assert (counts, [each.op_type for each in own(model)]) == ([1, 1], ["Attention", "MultiHeadAttention"])
