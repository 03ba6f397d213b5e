"""fuse-biased-attention: attention with a mask or bias as one operator, computing the same at every batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch

from tests.targets import attention_nets as nets
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.fuse_attention import FuseAttention
from vlexport.targets.onnxruntime.fuse_biased_attention import FuseBiasedAttention
from vlexport.targets.onnxruntime.minimum import CONTRIBUTED
from vlexport.targets.onnxruntime.score_bias import is_causal

FUSED = (nets.Masked, nets.Causal, nets.Placed, nets.Padded)
MISSED = {
    nets.Packed: "nothing is added to the scores",
    nets.HeadMasked: "each head has a mask of its own, and a row of it may be masked as a whole",
    nets.FirstQuery: "the query, or another part, is not of all positions in their order",
    nets.Crossed: "query, key and value are projected from several values",
}


@pytest.fixture(scope="module")
def lowered() -> OnnxModel:
    return nets.lowered(nets.program_of(*FUSED))


@pytest.fixture(scope="module")
def fused(lowered: OnnxModel) -> OnnxModel:
    model = lowered.copy()
    changes, found = FuseBiasedAttention().run(model)
    assert (len(changes), found) == (len(FUSED), [])
    return model


def own(model: OnnxModel) -> list[onnx_ir.Node]:
    return [node for node in model.nodes() if node.domain]


def test_every_masked_attention_becomes_one_operator(fused: OnnxModel) -> None:
    assert [node.op_type for node in own(fused)] == ["Attention"] * len(FUSED)
    assert {"Attention"} <= {*CONTRIBUTED}
    assert not fused.nodes("Softmax", "IsNaN")
    assert list(ONNX.problems(fused)) == []
    assert FuseBiasedAttention().run(fused.copy()) == ([], [])


def test_causal_mask_is_an_attribute_and_others_are_expanded_over_batch_and_heads(fused: OnnxModel) -> None:
    directed = ["unidirectional" in node.attributes for node in own(fused)]
    biases = [node.inputs[5] for node in own(fused) if len(node.inputs) > 5]
    assert (directed, len(biases)) == ([False, True, False, False], 3)
    assert [each.producer().op_type for each in biases if each is not None] == ["Expand"] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_are_the_same_and_samples_without_a_token_give_what_they_gave(
    lowered: OnnxModel, fused: OnnxModel, batch: int, tmp_path: Path
) -> None:
    values = nets.tokens(batch, 7)
    values[-1, :, 0] = -values[-1, :, 0].abs()
    was, now = (nets.computed(each, tmp_path / "m.onnx", values) for each in (lowered, fused))
    for kind, a, b in zip(FUSED, was, now, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max(), err_msg=kind.__name__)


def test_attention_is_left_with_the_reason_when_it_has_no_such_mask() -> None:
    model = nets.lowered(nets.program_of(*MISSED))
    text = model.text()
    changes, found = FuseBiasedAttention().run(model)
    assert (changes, [each.reason for each in found], model.text()) == ([], list(MISSED.values()), text)


def test_the_two_fusions_share_what_there_is() -> None:
    model = nets.lowered(nets.program_of(nets.Packed, nets.Placed))
    counts = [len(each.run(model)[0]) for each in (FuseAttention(), FuseBiasedAttention())]
    assert (counts, len(own(model))) == ([1, 1], 2)


def test_expanded_mask_is_shared_by_layers_that_share_the_mask() -> None:
    model = nets.lowered(nets.program_of(nets.Layers))
    assert len(FuseBiasedAttention().run(model)[0]) == 2
    (bias,) = {node.inputs[5] for node in own(model)}
    assert bias is not None
    assert [user.op_type for user, _ in bias.uses()] == ["Attention", "Attention"]
    assert len(model.nodes("IsInf")) == 1


@pytest.mark.parametrize(
    ("change", "wanted"), [(None, True), ((2, 1, -1.0), False), ((1, 2, -5.0), False), ((0, 3, -1e30), True)]
)
def test_only_a_mask_of_all_later_positions_is_causal(change: tuple[int, int, float] | None, wanted: bool) -> None:
    mask = torch.full((1, 1, 4, 4), -torch.inf).triu(1).numpy()
    if change is not None:
        mask[0, 0, change[0], change[1]] = change[2]
    assert is_causal(mask) is wanted
    assert not is_causal(mask.repeat(2, 1))
    for shape in ((1, 4, 1, 4), (4, 1, 1, 4)):
        assert not is_causal(mask.reshape(shape)), "a triangle over heads, or samples, and keys"
