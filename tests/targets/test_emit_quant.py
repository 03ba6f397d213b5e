"""Quantization as ONNX Runtime's kernels want it: which kernels it makes of it, and that they say what PyTorch says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.harness import captured
from tests.passes.quantizing import SCHEMES, Joined, Mixed, images, program_of, quantizer, ranges
from tests.targets.test_onnx_quantized import session
from vlexport.core.numerics import sqnr_db
from vlexport.ir.program import Program
from vlexport.targets.onnx.lower import onnx_from_program

MODELS = {"mixed": Mixed, "joined": Joined}


@pytest.fixture(scope="module", params=["static-u8s8", "static-u8s7"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=MODELS)
def programs(request: pytest.FixtureRequest, scheme: str) -> tuple[Program, Program]:
    program = program_of(MODELS[request.param]())
    after = program.copy()
    quantizer(program, scheme).run(after)
    return program, after


def optimized(program: Program, file: Path) -> tuple[onnx.GraphProto, np.ndarray]:
    """What ONNX Runtime makes of it at load time, and what that computes."""
    opened = session(onnx_from_program(program, opset=20), file)
    (found,) = opened.run(None, {"image": images(32, 7).numpy()})
    return onnx.load(file).graph, found


def test_every_quantized_call_is_an_integer_kernel_and_no_weight_is_dequantized(
    programs: tuple[Program, Program], tmp_path: Path
) -> None:
    before, after = programs
    graph, found = optimized(after, tmp_path / "made.onnx")
    made = Counter(node.op_type for node in graph.node)
    assert made["QGemm"] == len(before.calls("aten.linear.default"))
    assert made["QLinearConv"] == len(before.calls("aten.conv2d.default"))
    assert not made.keys() & {"MatMul", "Gemm", "Conv", "FusedConv", "MatMulIntegerToFloat", "MatMulNBits"}
    stored = {each.name for each in graph.initializer}
    assert not [n.name for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    wanted = after.run(images(32, 7))[0].numpy()
    assert sqnr_db(found, wanted) >= 30.0
    assert np.mean(found.reshape(32, -1).argmax(1) == wanted.reshape(32, -1).argmax(1)) >= 0.99


def test_join_and_pool_stay_in_integers_when_convolutions_stand_around_them(tmp_path: Path) -> None:
    program = program_of(Joined())
    quantizer(program).run(program)
    graph, _ = optimized(program, tmp_path / "made.onnx")
    made = Counter(node.op_type for node in graph.node)
    assert (made["QuantizeLinear"], made["DequantizeLinear"]) == (1, 1), "the input and the output alone"


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up = nn.Linear(16, 24)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.up(image))  # one linear: the mistake of a second one would undo that of the first


def test_linear_over_rows_gets_its_shape_back_when_batch_and_length_depend_on_the_input() -> None:
    values = torch.randn(16, 5, 16, generator=torch.Generator().manual_seed(1))
    program = captured(OneLinear(), values[:2], dynamic={"image": {0: "batch", 1: ("tokens", 2, 9)}})
    table = ranges(program, SCHEMES["static-u8s8"], values)
    quantizer(program, table=table).run(program)
    assert program.run(values[:3, :4])[0].shape == (3, 4, 24)
