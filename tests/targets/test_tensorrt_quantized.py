"""Quantization on the way to TensorRT: what its table says of it, how nets are spelled, and what the compiler keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured, near_misses
from tests.passes.quantizing import images
from tests.targets.quantized_nets import program_of, quantized, scheme_of
from tests.targets.test_onnx_quantized import Blocks, Float8, Integers, buffers, drawn, session
from vlexport.core.device_profiles import device_profiles
from vlexport.core.errors import UsageError
from vlexport.core.numerics import sqnr_db
from vlexport.ir.quant_ops import DEQUANTIZE, E4M3, QUANTIZE
from vlexport.ir.rounded import rounded_twin
from vlexport.passes.quantization.placement import place
from vlexport.targets.onnx.lower import onnx_from_program
from vlexport.targets.tensorrt.engine import choose_engine
from vlexport.targets.tensorrt.engine_layers import products
from vlexport.targets.tensorrt.op_support import unsupported
from vlexport.targets.tensorrt.options import TensorRTOptions
from vlexport.targets.tensorrt.quantize_softmax import QuantizeSoftmax

_ASK = """
import json, sys
from pathlib import Path
from vlexport.targets.tensorrt.compiler import Request, _compiled
found = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    for capability in ("8.6", "8.9"):
        engine, report = _compiled(file, Request(compute_capabilities=(capability,), inspect=True))
        found[f"{file.stem} {capability}"] = report.products if engine else None
print("FOUND" + json.dumps(found))
"""


class Symmetric(nn.Module):
    """As the scheme static-s8 has it: int8 around 0 on both sides, a float bias."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        buffers(
            self, xs=np.float32(0.02), xz=np.int8(0), w=rng.integers(-127, 128, (16, 8)).astype(np.int8),
            ws=rng.uniform(0.001, 0.004, 16).astype(np.float32), wz=np.zeros(16, np.int8),
            b=rng.normal(size=16).astype(np.float32),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = DEQUANTIZE(QUANTIZE(x, self.xs, self.xz), self.xs, self.xz)
        return nn.functional.linear(x, DEQUANTIZE(self.w, self.ws, self.wz, 0), self.b)


NETS = {
    "vit-s8": ("vit", "static-s8"), "cnn-s8": ("cnn", "static-s8"), "vit-fp8": ("vit", "static-e4m3"),
    "vit-w8": ("vit", "weights-s8"), "resnet-s8": ("resnet", "static-s8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, onnx_ir.Model]:
    nets = {
        "symmetric": (Symmetric(), (1, 8), 20), "asymmetric": (Integers(), (1, 3, 8, 8), 20),
        "float8": (Float8(), (1, 8), 20), "int4": (Blocks(), (1, 32), 21),
    }  # fmt: skip
    made = {
        name: onnx_from_program(captured(net, drawn(*shape), dynamic=False), opset=opset)
        for name, (net, shape, opset) in nets.items()
    }
    built = {name: quantized(net, "tensorrt", scheme) for name, (net, scheme) in NETS.items()}
    return {**made, **{name: onnx_from_program(program, opset=20) for name, program in built.items()}}


def test_table_refuses_zero_points_when_asked(models: dict[str, onnx_ir.Model]) -> None:
    said = {
        name: {each.reason for each in unsupported(model, device_profiles()["rtx"])} for name, model in models.items()
    }
    assert not any(said[name] for name in models if name != "asymmetric")
    assert any("zero point is not 0" in reason for reason in said["asymmetric"])


def test_compiler_takes_what_the_schemes_say_and_float8_from_8_9_on(
    models: dict[str, onnx_ir.Model], tmp_path: Path
) -> None:
    for name, model in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(onnx_ir.to_proto(model).SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(tmp_path)], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])
    refused = {name for name, products in found.items() if products is None}
    assert refused == {"asymmetric 8.6", "asymmetric 8.9", "float8 8.6", "vit-fp8 8.6"}
    kept = {name: found[f"{name} 8.9"] for name in NETS}
    assert kept["vit-s8"]["Int8 x Int8"] == 6, "five linears and the patches: all multiply int8 by int8"
    assert kept["cnn-s8"] == {"Int8 x Int8": 6}
    assert kept["resnet-s8"] == {"Int8 x Int8": 7}
    assert kept["vit-fp8"]["FP8 x FP8"] == 7, "five linears, and both products of attention"
    assert kept["vit-w8"]["Half x Int8"] >= 2, "some weights are unpacked in the layer that multiplies them"


def operators(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_every_product_reads_rounded_operands_and_nothing_else_does(models: dict[str, onnx_ir.Model]) -> None:
    """A quantize for each value, a dequantize for it and for each weight: none behind a product."""
    counts = {name: operators(models[name]) for name in NETS}
    pairs = {name: (each["QuantizeLinear"], each["DequantizeLinear"]) for name, each in counts.items()}
    assert pairs == {"vit-s8": (6, 12), "cnn-s8": (5, 11), "vit-fp8": (9, 14), "vit-w8": (0, 5), "resnet-s8": (6, 13)}
    for name in NETS:
        for node in models[name].graph:
            if node.op_type == "QuantizeLinear":
                assert {user.op_type for user, _ in node.outputs[0].uses()} == {"DequantizeLinear"}
            if node.op_type == "DequantizeLinear":
                readers = {user.op_type for user, _ in node.outputs[0].uses()}
                products = {"Gemm", "MatMul", "Conv", "Transpose"}
                assert readers <= products or (name == "resnet-s8" and readers == {"Conv", "Add"}), (name, node.name)


def test_residual_sum_reads_what_convolutions_read_when_a_rectifier_bounds_it(models: dict[str, onnx_ir.Model]) -> None:
    """Else the rectified value would be written twice, in int8 and in half."""
    sums = [node for node in models["resnet-s8"].graph if node.op_type == "Add"]
    feeding = [{each.producer().op_type for each in node.inputs} for node in sums]
    assert feeding == [{"DequantizeLinear", "Conv"}, {"Conv"}]
    assert not any(
        each.producer() is not None and each.producer().op_type == "DequantizeLinear"
        for name in ("vit-s8", "cnn-s8") for node in models[name].graph if node.op_type == "Add" for each in node.inputs
    )  # fmt: skip


def unbounded(x: Tensor, short: nn.Module, conv: nn.Module) -> Tensor:
    x = short(x)
    return x + conv(x)


def broadcast(x: Tensor, short: nn.Module, conv: nn.Module) -> tuple[Tensor, Tensor]:
    x = short(x).relu()
    pooled = nn.functional.max_pool2d(x, 16)
    return conv(x) + pooled, conv(pooled)


def scaled(x: Tensor, short: nn.Module, conv: nn.Module) -> Tensor:
    x = short(x).relu()
    return torch.add(x, conv(x), alpha=2)


def read_elsewhere(x: Tensor, short: nn.Module, conv: nn.Module) -> Tensor:
    x = short(x).relu()
    made = conv(x)
    return (x + made) * made


def not_rounded(x: Tensor, short: nn.Module, conv: nn.Module) -> Tensor:
    return short(x).relu() + conv(x)


def bounded(x: Tensor, short: nn.Module, conv: nn.Module) -> Tensor:
    x = short(x).relu()
    return x + conv(x)


@pytest.mark.parametrize(
    ("form", "count"),
    [(unbounded, 0), (broadcast, 0), (scaled, 0), (read_elsewhere, 0), (not_rounded, 0), (bounded, 1)],
)
def test_sum_reads_floats_unless_it_is_one_of_a_bounded_value_and_a_convolution(
    form: Callable[..., Any], count: int
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8 if form is not not_rounded else 3, 8, 1)

        def forward(self, image: Tensor) -> Any:
            return form(image, self.short, self.conv)

    program = captured(Net().eval(), images(2, 0))
    assert len(place(program, scheme_of("tensorrt", "static-s8")).sums) == count
    assert not place(program, scheme_of("onnxruntime", "static-u8s8")).sums


def test_no_unsigned_integer_zero_point_or_int32_bias_reaches_tensorrt(models: dict[str, onnx_ir.Model]) -> None:
    for name in NETS:
        for node in models[name].graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                point = onnx_ir.convenience.get_const_tensor(node.inputs[2])
                assert point is not None
                assert point.dtype in (onnx_ir.DataType.INT8, onnx_ir.DataType.FLOAT8E4M3FN)
                assert not point.numpy().astype(np.float32).any()
        kinds = {v.dtype for v in models[name].graph.initializers.values()}
        assert not kinds & {onnx_ir.DataType.UINT8, onnx_ir.DataType.INT32}


def test_floats_around_the_rounding_are_half(models: dict[str, onnx_ir.Model]) -> None:
    for name in NETS:
        for node in models[name].graph:
            if node.op_type == "DequantizeLinear":
                assert node.outputs[0].dtype is onnx_ir.DataType.FLOAT16, (name, node.name)
            if node.op_type in ("Gemm", "MatMul", "Conv"):
                assert node.outputs[0].dtype is onnx_ir.DataType.FLOAT16, (name, node.name)


@pytest.mark.parametrize(
    ("name", "least"), [("vit-s8", 25.0), ("cnn-s8", 30.0), ("vit-fp8", 15.0), ("vit-w8", 30.0), ("resnet-s8", 35.0)]
)
def test_graph_run_as_written_is_the_program(models: dict[str, onnx_ir.Model], name: str, least: float) -> None:
    """ONNX Runtime without its optimizations, as a bundle opens it; the program itself keeps close to the float one."""
    net, scheme = NETS[name]
    twin, image = rounded_twin(quantized(net, "tensorrt", scheme)), images(1, 5)
    (found,) = session(models[name], level="ORT_DISABLE_ALL").run(None, {"image": image.numpy()})
    wanted = twin.run(image)[0].numpy()
    assert sqnr_db(found, wanted) >= 30.0
    assert sqnr_db(wanted, program_of(net).run(image)[0].numpy()) >= least


def test_weights_of_attention_have_the_scale_one_over_448_when_they_are_float8() -> None:
    program = quantized("vit", "tensorrt", "static-e4m3")
    (softmax,) = program.calls("aten.softmax.int")
    (rounded,) = softmax.users
    assert rounded.target is QUANTIZE
    scale = program.tensor_of(rounded.args[1])
    assert scale is not None
    assert 1 / 448 <= float(scale) < 1.001 / 448


class Masked(nn.Module):
    """Attention over float8 with one thing that keeps it whole."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        buffers(self, s=np.float32(0.02), z=torch.zeros(()).to(E4M3), allowed=torch.ones(4, 4, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        q = DEQUANTIZE(QUANTIZE(x, self.s, self.z), self.s, self.z)
        attention = nn.functional.scaled_dot_product_attention
        if self.kind == "causal":
            return attention(q, q, q, is_causal=True)
        if self.kind == "mask":
            return attention(q, q, q, attn_mask=self.allowed)
        return attention(q, q, x * 2.0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("causal", "it is causal, and no mask says so"),
        ("mask", "its mask is boolean"),
        ("float", "not all of its operands are float8"),
    ],
)
def test_attention_stays_whole_when_it_cannot_be_written_as_products(kind: str, reason: str) -> None:
    program = captured(Masked(kind), drawn(1, 2, 4, 8))
    found = near_misses(QuantizeSoftmax(scheme_of("tensorrt", "static-e4m3")), program)
    assert [why for _, why in found] == [reason]


def test_capabilities_without_float8_are_left_out_when_it_is_asked_for() -> None:
    rtx, options = device_profiles()["rtx"], TensorRTOptions()
    assert "8.6" in choose_engine(options, rtx, precision="int8").capabilities
    assert choose_engine(options, rtx, precision="fp8").capabilities == ("8.9", "12.0")
    with pytest.raises(UsageError, match=r"no engine can be compiled for compute capability 8\.6"):
        choose_engine(TensorRTOptions(compute_capabilities="8.6"), rtx, precision="fp8")


def test_types_are_read_off_the_log_when_layers_multiply() -> None:
    layer = "Name: a, LayerType: {}, Inputs: [ {{ Name: x, Dimensions: [1,64], Strides: [64,1], Datatype: Half }}], "
    weights = (
        "Constants: [ { Name: s, Dimensions: [64], Datatype: Half }, { Name: w, Dimensions: [8,64], Datatype: Int8 }], "
    )
    end = "Outputs: [ { Name: y, Dimensions: [1,8], Datatype: Half }], TacticName: t"
    said = [
        "Engine Layer Information:\nLayers:\n" + layer.format("runtime_fusion") + weights + end,
        layer.format("kgen") + weights + end,
        layer.format("kgen").replace("Name: a", "Name: _gemm_mha_v2_myl0_5") + end,
        layer.format("gemm") + "Constants: [], " + end,
        "something else",
    ]
    assert products(said) == {"Half x Int8": 1, "attention in Half": 1}
