"""ONNX Runtime with weights alone in 8 bits: what is stored, and that the kernels are those of fp32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from tests.targets.quantized_nets import scheme_of
from tests.targets.test_onnx_quantized import session
from vlexport.ir.program import Program
from vlexport.passes.quantize import Quantize
from vlexport.targets import open_target
from vlexport.targets.onnx.lower import onnx_from_program


class Text(nn.Module):
    """Words, a convolution over them, and linears: of the sizes that an exporter does not fold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words, self.mix = nn.Embedding(500, 128), nn.Conv2d(128, 128, 1)
        self.norm, self.up, self.head = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.words(ids).permute(0, 2, 1).unsqueeze(-1)).squeeze(-1).permute(0, 2, 1)
        return self.head(torch.relu(self.up(self.norm(x))).mean(1))


def ids() -> Tensor:
    return torch.randint(0, 500, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    program = captured(Text(), ids())
    after = program.copy()
    made = open_target("onnxruntime")
    Quantize(scheme=scheme_of("onnxruntime", "weights-s8"), emit=made.emit_quant).run(after)
    return program, after


def test_kernels_are_those_of_float_when_the_session_opens(programs: tuple[Program, Program], tmp_path: Path) -> None:
    before, after = programs
    made = {name: onnx_from_program(each, opset=20) for name, each in (("float", before), ("small", after))}
    stored = {str(v.name): v.dtype for v in made["small"].graph.initializers.values() if v.shape and v.shape.rank() > 1}
    big = {name: dtype for name, dtype in stored.items() if not name.endswith("_scale")}
    assert {*big.values()} == {onnx_ir.DataType.INT8}, "every weight lies in the file in 8 bits"
    kernels = {}
    for name, model in made.items():
        opened = session(model, tmp_path / f"{name}.onnx")
        (found,) = opened.run(None, {"ids": ids().numpy()})
        wanted = (before if name == "float" else after).run(ids())[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        kernels[name] = Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node)
    assert kernels["small"] == kernels["float"]
    sizes = {name: len(onnx_ir.to_proto(model).SerializeToString()) for name, model in made.items()}
    assert sizes["small"] < 0.3 * sizes["float"]
