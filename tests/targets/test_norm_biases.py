"""Every LayerNormalization that ONNX Runtime gets has a bias, and computes what it did without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor, nn

from tests.harness import captured, randomize
from tests.targets.onnx_passes import model_of
from vlexport.core.numerics import relative_error
from vlexport.targets.base import Brief
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget
from vlexport.targets.onnxruntime.norm_biases import give_biases


class Norms(nn.Module):
    """Norms with all of their parameters, with a scale alone, and with none, over one dim and over two."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.scaled = nn.LayerNorm(6), nn.LayerNorm(6, bias=False)
        self.bare, self.wide = nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm((5, 6), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.full(x) + self.scaled(2 * x) + self.bare(x * x) + self.wide(x)


def lowered(tmp_path: Path) -> tuple[onnx_ir.Model, Tensor, Tensor, Path]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    program = captured(randomize(Norms()), x)
    artifact = OnnxRuntimeTarget().lower(program, tmp_path, Brief(OnnxRuntimeOptions(), precision="fp32"))
    return onnx_ir.load(tmp_path / artifact.path), x, program.run(x)[0], tmp_path / artifact.path


def test_norms_without_a_bias_share_zeros_and_compute_the_same(tmp_path: Path) -> None:
    model, x, wanted, file = lowered(tmp_path)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert [len(each.inputs) for each in norms] == [3] * 4
    added = [node.inputs[2] for node in norms if str(node.inputs[2].name).startswith("zeros_")]  # type: ignore[union-attr]
    assert sorted(str(each.name) for each in added if each is not None) == ["zeros_5_6", "zeros_6", "zeros_6"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(found, wanted.numpy()) <= 1e-6


def test_norm_whose_scale_has_no_size_and_one_with_a_bias_stay_as_they_are() -> None:
    model = model_of(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        main (float[2,n] x, float[n] s, float[n] b) => (float[2,n] y)
        {
          plain = LayerNormalization(x, s)
          y = LayerNormalization(plain, s, b)
        }
        """
    )
    give_biases(model)
    assert [len(each.inputs) for each in model.nodes("LayerNormalization")] == [2, 3]
    assert not model.weights()


def test_zeros_are_of_the_dtype_of_the_scale() -> None:
    model = model_of(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        main (float16[2,4] x, float16[4] s) => (float16[2,4] y)
        {
          y = LayerNormalization(x, s)
        }
        """
    )
    give_biases(model)
    (zeros,) = model.weights().values()
    assert (zeros.numpy().dtype, zeros.numpy().tolist()) == (np.float16, [0.0] * 4)
