"""Our quantization operators in ONNX: the same numbers as in PyTorch, and what ONNX Runtime makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.errors import CapabilityError
from vlexport.core.grids import INT4, quantize
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from vlexport.targets.onnx.lower import onnx_from_program


def buffers(module: nn.Module, **values: object) -> None:
    for name, value in values.items():
        module.register_buffer(name, value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)))


class Integers(nn.Module):
    """A convolution and a linear with quantized operands and results, as ONNX Runtime's integer kernels want them."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        scale, scales = np.float32(0.02), rng.uniform(0.001, 0.004, 8).astype(np.float32)
        buffers(
            self, xs=scale, xz=np.uint8(128), ys=np.float32(0.05), yz=np.uint8(100),
            k=rng.integers(-64, 64, (8, 3, 3, 3)).astype(np.int8), ks=scales, kz=np.zeros(8, np.int8),
            kb=rng.integers(-999, 999, 8).astype(np.int32), kbs=scales * scale, kbz=np.zeros(8, np.int32),
            w=rng.integers(-64, 64, (5, 8)).astype(np.int8), ws=scales[:5], wz=np.zeros(5, np.int8),
            wb=rng.integers(-999, 999, 5).astype(np.int32), wbs=scales[:5] * np.float32(0.05),
            wbz=np.zeros(5, np.int32),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        x = DEQUANTIZE(QUANTIZE(image, self.xs, self.xz), self.xs, self.xz)
        kernel, bias = DEQUANTIZE(self.k, self.ks, self.kz, 0), DEQUANTIZE(self.kb, self.kbs, self.kbz, 0)
        x = nn.functional.conv2d(x, kernel, bias, stride=4)
        x = DEQUANTIZE(QUANTIZE(x, self.ys, self.yz), self.ys, self.yz)
        x = x.reshape(-1, 8)
        weight, bias = DEQUANTIZE(self.w, self.ws, self.wz, 0), DEQUANTIZE(self.wb, self.wbs, self.wbz, 0)
        x = nn.functional.linear(x, weight, bias)
        return DEQUANTIZE(QUANTIZE(x, self.ys, self.yz), self.ys, self.yz)


class Blocks(nn.Module):
    """A linear whose weight is int4 in blocks of 16."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        weight = rng.normal(size=(6, 32)).astype(np.float32)
        scale = (np.abs(weight).reshape(6, 2, 16).max(-1) / 7.0).astype(np.float32)
        stored = quantize(weight, scale, np.zeros_like(scale, np.int8), INT4, axis=1, block=16)
        buffers(self, w=stored, s=scale, z=np.zeros((6, 2), np.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, DEQUANTIZE(self.w, self.s, self.z, 1, 16, 4))


class Float8(nn.Module):
    """A linear in float8, its weight a scale a channel."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        zero = torch.zeros(()).to(torch.float8_e4m3fn)
        buffers(
            self, xs=np.float32(0.01), xz=zero, w=torch.randn(4, 8, generator=draw).to(torch.float8_e4m3fn),
            ws=torch.rand(4, generator=draw) + 0.5, wz=torch.zeros(4).to(torch.float8_e4m3fn),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = DEQUANTIZE(QUANTIZE(x, self.xs, self.xz), self.xs, self.xz)
        return nn.functional.linear(x, DEQUANTIZE(self.w, self.ws, self.wz, 0))


class AtRunTime(nn.Module):
    """An activation whose range is found when the model runs."""

    def forward(self, x: Tensor) -> Tensor:
        scale, point = CHOOSE_QPARAMS(x)
        return DEQUANTIZE(QUANTIZE(x, scale, point), scale, point)


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        buffers(self, s=np.float32(0.1), z=np.int32(0))

    def forward(self, x: Tensor) -> Tensor:
        return DEQUANTIZE(QUANTIZE(x, self.s, self.z), self.s, self.z)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def session(
    model: onnx_ir.Model, file: Path | None = None, level: str = "ORT_ENABLE_ALL"
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if file is not None:
        options.optimized_model_filepath = str(file)
    content = onnx_ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(content))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def operators(model: onnx_ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.fixture(scope="module")
def integers() -> Program:
    return captured(Integers(), drawn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def integers_model(integers: Program) -> onnx_ir.Model:
    return onnx_from_program(integers, opset=20)


def test_integers_are_those_of_pytorch_when_run_as_written(integers: Program, integers_model: onnx_ir.Model) -> None:
    image = drawn(3, 3, 8, 8)
    (found,) = session(integers_model, level="ORT_DISABLE_ALL").run(None, {"image": image.numpy()})
    np.testing.assert_allclose(found, integers.run(image)[0].numpy(), atol=1e-6)


def test_every_product_is_done_in_integers_when_onnxruntime_optimizes(
    integers: Program, integers_model: onnx_ir.Model, tmp_path: Path
) -> None:
    image = drawn(3, 3, 8, 8)
    (found,) = session(integers_model, tmp_path / "made.onnx").run(None, {"image": image.numpy()})
    step = 0.05 * 1.001  # an integer kernel may round the other way at a tie
    assert np.abs(found - integers.run(image)[0].numpy()).max() <= step
    made = [node.op_type for node in onnx.load(tmp_path / "made.onnx").graph.node]
    assert (made.count("QLinearConv"), made.count("QGemm")) == (1, 1)
    assert made.count("DequantizeLinear") == 1, "the result alone: no weight is dequantized at run time"


def test_zero_points_are_written_out_when_they_are_zero(integers_model: onnx_ir.Model) -> None:
    linears = [n for n in integers_model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(linears) == 10
    assert all(len(n.inputs) == 3 and n.inputs[2] is not None for n in linears)


@pytest.mark.parametrize("opset", [18, 19, 21])
def test_numbers_are_those_of_pytorch_whatever_the_opset(integers: Program, opset: int) -> None:
    model = onnx_from_program(integers, opset=opset)
    image = drawn(1, 3, 8, 8)
    (found,) = session(model, level="ORT_DISABLE_ALL").run(None, {"image": image.numpy()})
    assert model.opset_imports[""] == opset
    np.testing.assert_allclose(found, integers.run(image)[0].numpy(), atol=1e-6)


def test_blocks_are_int4_initializers_when_the_opset_has_them() -> None:
    program = captured(Blocks(), drawn(2, 32))
    model = onnx_from_program(program, opset=21)
    assert operators(model) in (["DequantizeLinear", "Gemm"], ["DequantizeLinear", "Transpose", "MatMul"])
    dtypes = {value.dtype for value in model.graph.initializers.values()}
    assert dtypes == {onnx_ir.DataType.INT4, onnx_ir.DataType.FLOAT}
    x = drawn(3, 32)
    (found,) = session(model, level="ORT_DISABLE_ALL").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, program.run(x)[0].numpy(), atol=1e-5)


def test_float8_is_that_of_pytorch_when_run_as_written() -> None:
    program = captured(Float8(), drawn(2, 8))
    model = onnx_from_program(program, opset=20)
    x = drawn(5, 8) * 3.0
    x[0, 0] = 100.0  # beyond 448 steps
    (found,) = session(model, level="ORT_DISABLE_ALL").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, program.run(x)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.0, -100.0])
def test_range_found_at_run_time_is_that_of_pytorch(factor: float, at_run_time: tuple[Program, onnx_ir.Model]) -> None:
    program, model = at_run_time
    assert "DynamicQuantizeLinear" in operators(model)
    x = drawn(4, 6).abs() * factor
    (found,) = session(model, level="ORT_DISABLE_ALL").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, program.run(x)[0].numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def at_run_time() -> tuple[Program, onnx_ir.Model]:
    program = captured(AtRunTime(), drawn(2, 6))
    return program, onnx_from_program(program, opset=20)


@pytest.mark.parametrize(
    ("module", "shape", "opset", "reason"),
    [
        (Blocks, (2, 32), 20, "blocks and int4 began with opset 21"),
        (Float8, (2, 8), 18, "float8 began with opset 19"),
        (Bias, (2, 8), 20, "QuantizeLinear makes no int32"),
    ],
)
def test_call_is_refused_by_name_when_the_opset_has_no_spelling(
    module: type[nn.Module], shape: tuple[int, ...], opset: int, reason: str
) -> None:
    with pytest.raises(CapabilityError) as error:
        onnx_from_program(captured(module(), drawn(*shape)), opset=opset)
    assert error.value.code == "VLX0503"
    assert reason in error.value.message
    assert "test_onnx_quantized.py" in error.value.where
