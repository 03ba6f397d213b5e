"""Our quantization operators in Core ML: read back from the package, since nothing runs one here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from tests.passes.quantizing import images
from tests.targets.quantized_nets import program_of, quantized, scheme_of
from tests.targets.test_onnx_quantized import AtRunTime, Bias, Blocks, Float8, Integers, drawn
from vlexport.core.devices import this_machine
from vlexport.core.errors import CapabilityError, GateError
from vlexport.core.grids import dequantize
from vlexport.core.numerics import sqnr_db
from vlexport.core.palettes import palettize
from vlexport.core.scheme import choose_scheme
from vlexport.ir.quant_ops import LOOK_UP
from vlexport.passes.quantize import Quantize
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


class Palettes(nn.Module):
    """A linear whose weight is looked up, a table for so many output channels."""

    def __init__(self, kind: str = "palette4", group: int = 4) -> None:
        super().__init__()
        weight = np.random.default_rng(2).standard_normal((8, 32)).astype(np.float32)
        places, tables = palettize(weight, kind, group=group, scales="float16")
        self.register_buffer("w", torch.from_numpy(places))
        self.register_buffer("t", torch.from_numpy(tables))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, LOOK_UP(self.w, self.t))


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
    ("kind", "group", "system", "types"),
    [
        ("palette4", 4, "iOS18", {"UINT4": 256}), ("palette6", 0, "iOS18", {"UINT6": 256}),
        ("palette4", 0, "iOS17", {"UINT8": 128}), ("palette6", 0, "iOS16", {"UINT8": 192}),
    ],
)  # fmt: skip
def test_places_and_tables_are_those_of_the_program_when_weights_are_looked_up(
    kind: str, group: int, system: str, types: dict[str, int], tmp_path: Path
) -> None:
    net = Palettes(kind, group)
    found = lowered(net, (1, 32), brief(system, "fp32"), tmp_path)
    assert found.histogram() == {"constexpr_lut_to_dense": 1, "linear": 1}
    assert {name: count for name, count in found.weight_bytes.items() if name != "FLOAT32"} == types
    bits = int(kind[-1])
    flat = np.unpackbits(net.w.numpy().reshape(-1, 1), axis=1, bitorder="little")[:, :bits]  # type: ignore[operator]
    beside = stored_beside(tmp_path) + b"".join(each.tobytes() for each in found.constants.values())
    assert np.packbits(flat, bitorder="little").tobytes() in beside, "the least bit first"
    assert net.t.numpy().tobytes() in beside  # type: ignore[operator]


@pytest.mark.parametrize(
    ("module", "shape", "system", "reasons"),
    [
        (Palettes, (1, 32), "iOS17", {"several palettes a tensor began with iOS18"}),
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
    "vit": 3 * 16 * 64 + 64 * (192 + 64 + 128 + 128) + 640,
    "cnn": 16 * 27 + 16 * 144 + 8 * 16 + 2 * 24 * 48 + 120,
}
"""Elements of weights."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MilSummary]:
    asked = [
        ("vit", "w8a8", "iOS17"), ("cnn", "w8a8", "iOS18"), ("vit", "weights-s8", "iOS17"),
        ("vit", "weights-s4", "iOS18"), ("vit", "weights-p4-groups", "iOS18"), ("cnn", "weights-p6", "iOS17"),
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
    assert (counts["vit"]["quantize"], counts["vit"]["dequantize"], counts["vit"]["linear"]) == (6, 6, 5)
    assert counts["vit"]["constexpr_affine_dequantize"] == 6
    assert (counts["cnn"]["quantize"], counts["cnn"]["dequantize"], counts["cnn"]["conv"]) == (5, 5, 3)
    assert counts["cnn"]["constexpr_blockwise_shift_scale"] == 6
    for found, net in ((vit, "vit"), (cnn, "cnn")):
        kept = found.weight_bytes["INT8"]
        assert kept >= KEPT[net], "every weight lies in the package in 8 bits"
        assert {t for op in found.operations if op.type in ("linear", "conv") for t in op.dtypes} == {"FLOAT16"}
        assert {t for op in found.operations if op.type == "quantize" for t in op.dtypes} == {"INT8"}


def test_weights_alone_are_kept_in_the_bits_that_were_asked_for(packages: dict[str, MilSummary]) -> None:
    eight, four = packages["vit weights-s8"], packages["vit weights-s4"]
    assert eight.histogram()["constexpr_affine_dequantize"] == 6
    assert four.histogram()["constexpr_blockwise_shift_scale"] == 5, "linears; the patches stay in half"
    assert not {"quantize", "dequantize"} & {*eight.histogram(), *four.histogram()}
    assert eight.weight_bytes["INT8"] >= KEPT["vit"]
    assert four.weight_bytes["INT4"] == KEPT["vit"] - 3 * 16 * 64


def test_weights_are_looked_up_when_palettes_were_asked_for(packages: dict[str, MilSummary]) -> None:
    groups, one = packages["vit weights-p4-groups"], packages["cnn weights-p6"]
    assert groups.histogram()["constexpr_lut_to_dense"] == one.histogram()["constexpr_lut_to_dense"] == 6
    assert groups.weight_bytes["UINT4"] == KEPT["vit"], "counted a byte an element"
    assert KEPT["cnn"] * 6 // 8 <= one.weight_bytes["UINT8"] <= KEPT["cnn"] * 6 // 8 + 6
    for found in (groups, one):
        assert not {"quantize", "dequantize"} & {*found.histogram()}
        assert {t for op in found.operations if op.type in ("linear", "conv") for t in op.dtypes} == {"FLOAT16"}
    decided = {
        node.args[1].meta["val"].shape[0]
        for node in quantized("vit", "coreml", "weights-p4-groups").calls("vlexport.look_up.default")
    }
    assert decided == {1, 4, 8, 12}, "a head of ten channels, which 16 does not divide, has one table"


@pytest.mark.parametrize(
    ("name", "least"), [("weights-p4-groups", 18.0), ("weights-p4", 15.0), ("weights-p6", 26.0), ("weights-p8", 35.0)]
)
def test_program_keeps_so_much_when_weights_are_looked_up(name: str, least: float) -> None:
    image = images(8, 4)
    after = program_of("vit").copy()
    Quantize(scheme=scheme_of("coreml", name), emit=open_target("coreml").emit_quant).run(after)
    found = [torch.cat([each.run(row[None])[0] for row in image]).numpy() for each in (after, program_of("vit"))]
    assert sqnr_db(*found) >= least


@pytest.mark.parametrize(
    ("weight", "system", "scheme"),
    [
        ("palette4", "18", "weights-p4-groups"), ("palette4", "17", "weights-p4"),
        ("palette6", "16", "weights-p6"), ("palette8", "18", "weights-p8"),
    ],
)  # fmt: skip
def test_scheme_has_groups_when_the_system_takes_them(weight: str, system: str, scheme: str) -> None:
    target = open_target("coreml")
    device = target.quantized_for(brief(f"iOS{system}"))
    found = choose_scheme(target.schemes(), "int8", device, this_machine(), kind="weights", weight=weight)
    assert found.id == scheme


def test_package_is_refused_when_weights_were_made_float_on_the_way(packages: dict[str, MilSummary]) -> None:
    program, chosen = quantized("vit", "coreml", "weights-s8"), brief("iOS17", "int8")
    plan = plan_of(program, chosen, CoreMLOptions.model_validate({"deployment_target": "iOS17"}))
    require_as_planned(packages["vit weights-s8"], plan, "int8")
    packages["vit weights-s8"].weight_bytes.update(INT8=100)
    with pytest.raises(GateError) as error:
        require_as_planned(packages["vit weights-s8"], plan, "int8")
    assert (error.value.code, "weights in integers: 100" in error.value.message) == ("VLX0504", True)
