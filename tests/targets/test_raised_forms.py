"""What norms and activations are raised to is lowered by every target, and computes the same there."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, randomize
from vlexport.core.numerics import relative_error
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.coreml.legalize_spelling import LegalizeSpelling
from vlexport.targets.coreml.mil import read_package
from vlexport.targets.onnx.lower import onnx_from_program

TYPED_OPSET = 20


class Forms(nn.Module):
    """Each operator that raise-norms and raise-activations leave, with and without its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bare = nn.LayerNorm(6), nn.LayerNorm((5, 6), elementwise_affine=False)
        self.group, self.scaled, self.whole = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nn.GroupNorm(1, 4, affine=False)
        self.rms, self.plain = nn.RMSNorm(6, eps=1e-6), nn.RMSNorm(6, eps=1e-6, elementwise_affine=False)
        self.first = nn.LayerNorm(4, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "layer": self.layer(x),
            "bare": self.bare(x),
            "group": self.group(x),
            "scaled": self.scaled(x),
            "whole": self.whole(x[..., 0]),
            "rms": self.rms(x),
            "plain": self.plain(x),
            "first": self.first(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            "l2": x / torch.linalg.vector_norm(x, 2, [1], True).clamp_min(1e-12),
            "l2_without": x / torch.linalg.vector_norm(x, 2, [2, 3], True),
            "gelu": F.gelu(x),
            "gelu_tanh": F.gelu(x, approximate="tanh"),
            "quick": x * torch.sigmoid(x * 1.702),
            "silu": F.silu(x),
            "hardsigmoid": F.hardsigmoid(x),
            "hardswish": F.hardswish(x),
            "relu6": F.relu6(x),
        }


def picture(batch: int) -> Tensor:
    return torch.randn(batch, 4, 5, 6, generator=torch.Generator().manual_seed(batch)) * 3


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return captured(randomize(Forms()), picture(2))


def test_values_are_equal_when_onnx_runtime_runs_typed_onnx(program: Program, tmp_path: Path) -> None:
    onnx_ir.save(onnx_from_program(program, opset=TYPED_OPSET), tmp_path / "main.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "main.onnx", providers=["CPUExecutionProvider"])
    x = picture(3)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    errors = [relative_error(a, b.numpy()) for a, b in zip(found, program.run(x), strict=True)]
    assert max(errors) <= 1e-6, errors


def test_every_form_converts_when_the_target_is_core_ml(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fixed = captured(randomize(Forms()), picture(1), dynamic=False)
    LegalizeSpelling().run(fixed)
    artifact = CoreMLTarget().lower(fixed, tmp_path, Brief(CoreMLOptions(), precision="fp32"))
    operators = read_package(tmp_path / artifact.path).histogram()
    assert operators["layer_norm"] == 3
    assert operators["reduce_l2_norm"] == 2
    assert {"gelu", "silu", "sigmoid_hard", "relu6"} <= operators.keys()
