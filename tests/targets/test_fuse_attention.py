"""fuse-attention: what becomes one operator of ONNX Runtime, and what does not and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn
from torch.nn.functional import softmax

from tests.targets import attention_nets as nets
from vlexport.passes.base import NearMiss
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.fuse_attention import FuseAttention
from vlexport.targets.onnxruntime.minimum import CONTRIBUTED, RELEASES

FUSED = (nets.Packed, nets.Scaled, nets.Spelled, nets.Apart)
MISSED = {
    nets.Masked: "a mask or bias is added to the scores",
    nets.FirstQuery: "the query, or another part, is not of all positions in their order",
    nets.Reversed: "heads are no columns of what it is projected from",
    nets.ScaledValues: "the values are scaled",
    nets.Crossed: "query, key and value are projected from several values",
    nets.Watched: "what it is projected from is an output, too",
    nets.Windowed: "positions are shared out over batch and length behind the projection",
    nets.Pooled: "there are not as many queries as keys",
}


class Plain(nn.Module):
    """A softmax that nothing is multiplied with: not even nearly attention."""

    def forward(self, image: Tensor) -> Tensor:
        return softmax(image, -1)


def own(model: OnnxModel) -> list[str]:
    return [node.op_type for node in model.nodes() if node.domain]


def misses(found: list[NearMiss[object]]) -> list[str]:
    return [each.reason for each in found]


def test_attention_becomes_one_operator_and_computes_the_same(tmp_path: Path) -> None:
    model = nets.lowered(nets.program_of(*FUSED))
    before = model.copy()
    changes, found = FuseAttention().run(model)
    assert (len(changes), found, own(model)) == (len(FUSED), [], ["Attention"] * len(FUSED))
    assert not [node for node in model.nodes() if node.op_type in ("Softmax", "Transpose")]
    scales = [node.attributes["scale"].as_float() for node in model.nodes("Attention") if "scale" in node.attributes]
    assert scales == pytest.approx([0.21, 1.0 / 3.0]), "the usual scale is not written"
    assert list(ONNX.problems(model)) == []
    assert {"Attention"} <= {*CONTRIBUTED}, "the recorded minimum has it"
    assert (model.model.ir_version, {*RELEASES.values()}) == (10, {"1.18"}), "the version of the format asks for 1.18"
    assert FuseAttention().run(model) == ([], []), "a second time there is nothing to do"
    for batch in (1, 3):
        was, now = (nets.computed(each, tmp_path / "m.onnx", nets.tokens(batch, 7)) for each in (before, model))
        for kind, a, b in zip(FUSED, was, now, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max(), err_msg=kind.__name__)


def test_attention_is_left_with_the_reason_when_it_is_no_packed_one() -> None:
    model = nets.lowered(nets.program_of(*MISSED, Plain))
    text = model.text()
    changes, found = FuseAttention().run(model)
    assert (changes, misses(found), model.text()) == ([], list(MISSED.values()), text)
