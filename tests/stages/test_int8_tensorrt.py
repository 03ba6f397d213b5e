"""--target tensorrt --precision int8: what lies in the bundle, and what is refused before any work is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import vlexport
from tests.calibration.planted import dataset
from tests.harness import captured
from tests.passes.quantizing import Mixed, images
from vlexport.core.bundle import read_bundle
from vlexport.core.config import BuildConfig
from vlexport.core.errors import GateError, VlexportError
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Match, Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import Probe
from vlexport.passes.statistic import Statistic
from vlexport.stages.build import BuildResult, build
from vlexport.stages.component import Optimized
from vlexport.stages.order import order_of
from vlexport.stages.quantized import require_calibrated, with_fallback
from vlexport.stages.smoothed import smooth_component
from vlexport.targets.tensorrt.engine import choose_engine
from vlexport.targets.tensorrt.options import TensorRTOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("int8")
    vlexport.save(Mixed().eval(), made / "model.pt", inputs={"image": images(2, 0)})
    np.savez(made / "calib.npz", image=images(16, 1).numpy())
    return made


def config(folder: Path, **given: Any) -> BuildConfig:
    values = {"target": "tensorrt", "precision": "int8", "profile": False, "threads": 1, **given}
    calib = {"calib": str(folder / "calib.npz")} if "calib" not in given else {}
    return BuildConfig(model=str(folder / "model.pt"), output=str(folder / "out.bundle"), **{**values, **calib})


@pytest.fixture(scope="module")
def built(folder: Path) -> BuildResult:
    return build(config(folder, options={"tensorrt.engine": "off"}))


def test_bundle_carries_the_same_graph_in_half_when_it_is_quantized(built: BuildResult) -> None:
    artifact = built.output / "artifact"
    graphs = {name: onnx_ir.load(artifact / f"{name}.onnx").graph for name in ("main", "fallback")}
    kinds = {name: {node.op_type for node in graph} for name, graph in graphs.items()}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds["main"]
    assert not {"QuantizeLinear", "DequantizeLinear"} & kinds["fallback"]
    stored = {v.dtype for v in graphs["fallback"].initializers.values()}
    assert onnx_ir.DataType.FLOAT16 in stored
    assert onnx_ir.DataType.INT8 not in stored
    assert "artifact/fallback.onnx" in read_bundle(built.output).files
    lines = (artifact / "main.commands.txt").read_text(encoding="utf-8").splitlines()
    assert sum("--onnx=fallback.onnx" in line for line in lines) == 2, "one for each runtime"
    assert any("measure both" in line for line in lines)


def test_receipt_says_what_is_rounded_and_what_only_the_device_can_show(built: BuildResult) -> None:
    notes = built.report.notes
    assert any("in integers: 3 conv2d, 3 linear (scheme static-s8" in note for note in notes)
    assert any("shows on the device alone" in note for note in notes)
    assert built.report.emulator.startswith("ONNX Runtime")
    bundle = read_bundle(built.output)
    assert bundle.state == "built", "its golden vectors were run, not TensorRT"
    assert bundle.main.artifact.session_options["graph_optimization"] == "none"


def test_floats_are_typed_and_casts_folded_in_the_record_when_quantized(built: BuildResult) -> None:
    records = {each.name: each for each in read_bundle(built.output).main.passes}
    names = [name for name in records if name in ("quantize", "cast-floats", "fold-casts")]
    assert names == ["quantize", "cast-floats", "fold-casts"]
    assert records["cast-floats"].gate.bound == 10.0, "judged as quantize is: rounding moves values across ties"
    assert records["fold-casts"].gate.worst == 0.0
    assert "dequantize → cast without the cast" in {each.what for each in records["fold-casts"].changes}
    decisions = json.loads((built.output / "quantization.json").read_text(encoding="utf-8"))
    scales = np.array([each["scale"] for each in decisions["values"]], np.float32)
    assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    assert {each["type"] for each in decisions["values"]} == {"int8"}


def test_float8_is_not_smoothed_and_says_so_when_asked(folder: Path) -> None:
    asked = config(folder, precision="fp8", device_profile="rtx")
    order = order_of(asked)
    scheme = require_calibrated(asked, order.brief, order.target)
    program = captured(Mixed().eval(), images(2, 0))
    held = Optimized(program, (), None, ())
    samples, tried = dataset(images(16, 1).numpy(), program), [(images(2, 2),)]
    assert smooth_component(held, scheme, asked, samples=samples, tried=tried, dump=None) == (held, None)
    with pytest.raises(VlexportError, match="'smooth-activations' is not run"):
        order_of(asked.model_copy(update={"options": {"smooth-activations.shift": "false"}}))


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"calib": None}, "VLX0218", "there are none"),
        ({"precision": "fp8", "device_profile": "jetson-orin-jp6"}, "VLX0502", "compute-capability 8.9 is needed"),
        ({"precision": "fp8"}, "VLX0502", "nothing is known of the compute-capability"),
        (
            {"precision": "fp8", "options": {"tensorrt.compute_capabilities": "8.9,8.6"}},
            "VLX0502",
            "compute-capability 8.9 is needed",
        ),
        (
            {
                "precision": "fp8",
                "device_profile": "jetson-orin-jp6",
                "options": {"tensorrt.compute_capabilities": "8.9"},
            },
            "VLX0502",
            "compute-capability 8.9 is needed, jetson-orin-jp6 has 8.7",
        ),
        ({"options": {"quantize.weights_only": "int4"}}, "VLX0502", "the target has no such scheme"),
        ({"options": {"quantize.weights_only": "int5"}}, "VLX0703", "quantize.weights_only"),
        ({"precision": "fp16", "options": {"quantize.weights_only": "int8"}}, "VLX0703", "pass 'quantize' is not run"),
        ({"precision": "fp32", "options": {"cast-floats.keep": "up"}}, "VLX0703", "pass 'cast-floats' is not run"),
    ],
)
def test_order_is_refused_when_it_cannot_be_quantized_so(
    folder: Path, given: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(VlexportError) as error:
        order_of(config(folder, **given))
    assert (error.value.code, said in error.value.message) == (code, True), error.value.message


def test_float8_needs_no_device_when_options_name_what_the_engine_is_for(folder: Path) -> None:
    asked = config(folder, precision="fp8", options={"tensorrt.compute_capabilities": "8.9,12.0"})
    order = order_of(asked)
    assert require_calibrated(asked, order.brief, order.target).id == "static-e4m3"
    options = order.brief.options
    assert isinstance(options, TensorRTOptions)
    assert choose_engine(options, order.brief.device, precision="fp8").capabilities == ("8.9", "12.0")


def test_no_samples_are_asked_for_when_weights_alone_are_rounded(folder: Path) -> None:
    asked = config(folder, calib=None, options={"quantize.weights_only": "int8"})
    order = order_of(asked)
    assert require_calibrated(asked, order.brief, order.target).id == "weights-s8"
    assert order.target.fallback_precision(order.brief) == "fp16"
    without = order_of(config(folder, options={"tensorrt.fallback": "false"}))
    assert without.target.fallback_precision(without.brief) == ""


def test_bundle_goes_without_the_half_graph_when_half_loses_too_much() -> None:
    program = captured(Mixed().eval(), images(2, 0))
    made = Optimized(program, (), None, ("a note",))

    def refused() -> Optimized:
        raise GateError("VLX0401", "pass cast-floats costs more than it may")

    assert with_fallback(made, lambda: made, [], precision="fp16") == (made, program)
    found, fallback = with_fallback(made, refused, [], precision="fp16")
    assert fallback is None
    assert found.notes == ("a note", "no fp16 graph lies beside it: pass cast-floats costs more than it may")


def test_samples_are_judged_as_one_batch_when_the_batch_is_fixed() -> None:
    """A sample whose true answer lies near 0 has a ratio of noise; over all samples little is lost."""

    class Shift(Pass[Program]):
        name, stage, effect = "shift", "precision", "approximate"
        statistic = Statistic("sqnr_db", 20.0)

        def find(self, ir: Program) -> Iterator[Match]:
            found = [n for n in ir.calls("aten.mul.Tensor") if n.args[1] == 1.0]
            yield from (Match(node, (node,)) for node in found)

        def apply(self, ir: Program, match: Match) -> Change:
            made = ir.add_call(
                torch.ops.aten.add.Tensor, (match.node.args[0], 0.01), before=match.node, value_of=match.node
            )
            ir.replace(match.node, made)
            return Change(what="shifted")

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    program = captured(Same(), torch.ones(1, 4), dynamic=False)
    probes = [Probe("small", (torch.full((1, 4), 0.01),)), Probe("large", (torch.ones(1, 4),))]
    with pytest.raises(GateError, match=r"sqnr_db .* on the small"):
        run_pass(Shift(), program, gate=NumericGate(program, probes, sighted=True))
    _, record = run_pass(Shift(), program, gate=NumericGate(program, probes, sighted=True, together=True))
    assert record.gate.value == 36.0
    with pytest.raises(GateError, match="on the 2 probes"):
        run_pass(Shift(), program, gate=NumericGate(program, probes[:1] * 2, sighted=True, together=True))
