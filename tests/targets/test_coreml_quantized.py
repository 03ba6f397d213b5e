"""Our quantization operators in Core ML: read back from the package, since nothing runs one here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.harness import captured
from tests.targets.quantized_nets import quantized
from tests.targets.test_onnx_quantized import AtRunTime, Bias, Blocks, Float8, Integers, drawn
from vlexport.core.errors import CapabilityError, GateError
from vlexport.core.grids import dequantize
from vlexport.targets import open_target
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions
from vlexport.targets.coreml.check import require_as_planned
from vlexport.targets.coreml.mil import MilSummary, read_package
from vlexport.targets.coreml.plan import plan_of


def brief(system: str, precision: str = "fp16") -> Brief:
    return Brief(CoreMLOptions.model_validate({"deployment_target": system}), precision=precision, name="net")


def lowered(module: nn.Module, shape: tuple[int, ...], chosen: Brief, folder: Path) -> MilSummary:
    target = open_target("coreml")
    program = captured(module, drawn(*shape), dynamic=False)
    assert target.problems(program, chosen) == []
    return read_package(folder / target.lower(program, folder, chosen).path)


def stored_beside(folder: Path) -> bytes:
    """The file of weights."""
    (file,) = folder.rglob("weight.bin")
    return file.read_bytes()


def constant(found: MilSummary, operation: Any, parameter: str) -> Any:
    return found.constants[operation.inputs[parameter][0]]


def test_activations_are_quantized_as_in_the_program_when_lowered(tmp_path: Path) -> None:
    found = lowered(Integers(), (1, 3, 8, 8), brief("iOS17", "fp32"), tmp_path)
    assert found.histogram() == {
        "constexpr_affine_dequantize": 2, "conv": 1, "dequantize": 3, "linear": 1, "quantize": 3, "reshape": 1,
    }  # fmt: skip
    first, second, third = (op for op in found.operations if op.type == "quantize")
    assert [float(constant(found, op, "scale")) for op in (first, second, third)] == [
        pytest.approx(s, rel=1e-6) for s in (0.02, 0.05, 0.05)
    ]
    # uint8 around 128 is int8 around 0: coremltools makes one of the other
    assert (first.dtypes, second.dtypes, third.dtypes) == (("INT8",), ("UINT8",), ("UINT8",))
    assert "zero_point" not in first.inputs
    assert int(constant(found, second, "zero_point")) == 100


def test_weights_and_bias_unpack_to_those_of_the_program_when_lowered(tmp_path: Path) -> None:
    net = Integers()
    found = lowered(net, (1, 3, 8, 8), brief("iOS17", "fp32"), tmp_path)
    conv = next(op for op in found.operations if op.type == "conv")
    (weight,) = conv.inputs["weight"]
    held = {key: found.constants[f"{weight}.{key}"] for key in ("scale", "zero_point", "axis")}
    assert (int(held["axis"]), held["zero_point"].dtype, held["zero_point"].any()) == (0, np.int8, False)
    np.testing.assert_allclose(held["scale"], net.ks.numpy(), rtol=1e-6)  # type: ignore[operator]
    assert found.weight_bytes == {"INT8": 8 * 27 + 5 * 8}
    beside = stored_beside(tmp_path)
    assert net.k.numpy().tobytes() in beside  # type: ignore[operator]
    assert net.w.numpy().tobytes() in beside  # type: ignore[operator]
    bias = dequantize(net.kb.numpy(), net.kbs.numpy(), net.kbz.numpy(), axis=0)  # type: ignore[operator]
    np.testing.assert_allclose(constant(found, conv, "bias"), bias, rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_blocks_are_kept_in_four_bits_when_the_system_has_them(precision: str, tmp_path: Path) -> None:
    wide = Blocks()
    found = lowered(wide, (1, 32), brief("iOS18", precision), tmp_path)
    assert found.histogram()["constexpr_blockwise_shift_scale"] == 1
    assert found.weight_bytes["INT4"] == 6 * 32, "counted a byte an element"
    pairs = wide.w.numpy().astype(np.uint8).reshape(-1, 2) & 15  # type: ignore[operator]
    beside = stored_beside(tmp_path)
    assert (pairs[:, 0] | (pairs[:, 1] << 4)).tobytes() in beside
    assert wide.s.numpy().astype(np.float16 if precision == "fp16" else np.float32).tobytes() in beside  # type: ignore[operator]


@pytest.mark.parametrize(
    ("module", "shape", "system", "reasons"),
    [
        (Blocks, (1, 32), "iOS17", {"int4 and blocks of stored values began with iOS18"}),
        (Float8, (1, 8), "iOS18", {"Core ML has no float8"}),
        (
            AtRunTime,
            (1, 6),
            "iOS18",
            {"Core ML finds no range at run time", "Core ML wants a stored scale and zero point"},
        ),
        (Bias, (1, 6), "iOS18", {"Core ML quantizes to int8 and uint8; a bias is stored"}),
        (Integers, (1, 3, 8, 8), "iOS16", {"quantized values that are not stored began with iOS17"}),
    ],
)
def test_call_is_refused_with_the_reason_before_and_at_conversion(
    module: type[nn.Module], shape: tuple[int, ...], system: str, reasons: set[str], tmp_path: Path
) -> None:
    target = open_target("coreml")
    program = captured(module(), drawn(*shape), dynamic=False)
    said = target.problems(program, brief(system))
    assert {each.message.partition(": ")[2] for each in said} == reasons
    with pytest.raises(CapabilityError) as error:
        target.lower(program, tmp_path, brief(system))
    assert error.value.code == "VLX0503"
    assert error.value.message.partition(": ")[2] in reasons
    assert "deployment_target" in error.value.hint


def test_float_models_convert_as_before_when_translations_are_known(tmp_path: Path) -> None:
    found = lowered(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), (1, 6), brief("iOS17", "fp32"), tmp_path)
    assert found.histogram() == {"linear": 1, "relu": 1}


KEPT = {
    "vit": 3 * 16 * 64 + 2 * 64 * (192 + 64 + 128 + 128) + 640,
    "cnn": 16 * 27 + 16 * 144 + 8 * 16 + 2 * 24 * 48 + 120,
}
"""Elements of weights."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MilSummary]:
    asked = [
        ("vit", "w8a8", "iOS17"), ("cnn", "w8a8", "iOS18"), ("vit", "weights-s8", "iOS17"),
        ("vit", "weights-s4", "iOS18"),
    ]  # fmt: skip
    found = {}
    for net, scheme, system in asked:
        folder, target = tmp_path_factory.mktemp("package"), open_target("coreml")
        made = target.lower(quantized(net, "coreml", scheme), folder, brief(system, "int8"))
        found[f"{net} {scheme}"] = read_package(folder / made.path)
    return found


def test_inputs_of_products_are_rounded_in_half_when_both_sides_are_int8(packages: dict[str, MilSummary]) -> None:
    vit, cnn = packages["vit w8a8"], packages["cnn w8a8"]
    counts = {name: found.histogram() for name, found in (("vit", vit), ("cnn", cnn))}
    assert (counts["vit"]["quantize"], counts["vit"]["dequantize"], counts["vit"]["linear"]) == (10, 10, 9)
    assert counts["vit"]["constexpr_affine_dequantize"] == 10
    assert (counts["cnn"]["quantize"], counts["cnn"]["dequantize"], counts["cnn"]["conv"]) == (5, 5, 3)
    assert counts["cnn"]["constexpr_blockwise_shift_scale"] == 6
    for found, net in ((vit, "vit"), (cnn, "cnn")):
        kept = found.weight_bytes["INT8"]
        assert kept >= KEPT[net], "every weight lies in the package in 8 bits"
        assert {t for op in found.operations if op.type in ("linear", "conv") for t in op.dtypes} == {"FLOAT16"}
        assert {t for op in found.operations if op.type == "quantize" for t in op.dtypes} == {"INT8"}


def test_weights_alone_are_kept_in_the_bits_that_were_asked_for(packages: dict[str, MilSummary]) -> None:
    eight, four = packages["vit weights-s8"], packages["vit weights-s4"]
    assert eight.histogram()["constexpr_affine_dequantize"] == 10
    assert four.histogram()["constexpr_blockwise_shift_scale"] == 9, "linears; the patches stay in half"
    assert not {"quantize", "dequantize"} & {*eight.histogram(), *four.histogram()}
    assert eight.weight_bytes["INT8"] >= KEPT["vit"]
    assert four.weight_bytes["INT4"] == KEPT["vit"] - 3 * 16 * 64


def test_package_is_refused_when_weights_were_made_float_on_the_way(packages: dict[str, MilSummary]) -> None:
    program, chosen = quantized("vit", "coreml", "weights-s8"), brief("iOS17", "int8")
    plan = plan_of(program, chosen, CoreMLOptions.model_validate({"deployment_target": "iOS17"}))
    require_as_planned(packages["vit weights-s8"], plan, "int8")
    packages["vit weights-s8"].weight_bytes.update(INT8=100)
    with pytest.raises(GateError) as error:
        require_as_planned(packages["vit weights-s8"], plan, "int8")
    assert (error.value.code, "weights in integers: 100" in error.value.message) == ("VLX0504", True)
