"""What the rule of fold-affine for scales of attention rests on: operators after lowering, with a scale and without."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.fold_affine import FoldAffine
from vlexport.passes.pipeline import run_pass
from vlexport.targets.coreml.legalize_spelling import LegalizeSpelling
from vlexport.targets.onnx.lower import onnx_from_program


class Attention(nn.Module):
    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.qkv, self.scale = nn.Linear(8, 24), scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


def attention(scale: float | None) -> Program:
    torch.manual_seed(0)
    return captured(Attention(scale), torch.randn(1, 5, 8), dynamic=False)


def spelled(program: Program) -> Counter[str]:
    """Operators as coremltools gets them."""
    after, _ = run_pass(LegalizeSpelling(), program, gate=None)
    return Counter(map(dialect.plain_name, after.calls()))


def lowered(program: Program) -> Counter[str]:
    """Operators of the ONNX graph."""
    return Counter(node.op_type for node in onnx_from_program(program, opset=20).graph)


def test_core_ml_multiplies_no_queries_when_the_scale_is_folded() -> None:
    before = attention(0.7)
    after, _ = run_pass(FoldAffine(), before, gate=None)
    assert (spelled(before)["mul"], spelled(after)["mul"]) == (1, 0)
    assert spelled(attention(None))["mul"] == 0, "the usual scale is Core ML's own"


def test_onnx_has_as_many_products_when_the_scale_is_folded() -> None:
    before = attention(0.7)
    after, _ = run_pass(FoldAffine(), before, gate=None)
    assert lowered(after) == lowered(before)
    assert lowered(before)["Mul"] == 2


@pytest.mark.parametrize(("scale", "products"), [(None, 2), (1.0, 0)])
def test_scale_stays_when_folding_would_save_nothing(scale: float | None, products: int) -> None:
    before = attention(scale)
    after, record = run_pass(FoldAffine(), before, gate=None)
    assert not record.changes
    assert lowered(after)["Mul"] == products
