"""The tensorrt target: typed ONNX by device profile, engines, options, and the commands that a bundle carries."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from tests.target_conformance import refused
from tests.targets.tensorrt_nets import Block, Cnn, Dilated, Half, image
from vlexport.core.artifact import Artifact
from vlexport.core.device_profiles import DeviceProfile, Fact, device_profiles
from vlexport.frontends.capture import capture
from vlexport.ir.program import Program
from vlexport.targets.base import Brief
from vlexport.targets.tensorrt import TensorRTOptions, TensorRTTarget
from vlexport.targets.tensorrt.commands import device_commands
from vlexport.targets.tensorrt.compiler import Request, configured
from vlexport.targets.tensorrt.engine import RTX_CAPABILITIES
from vlexport.targets.tensorrt.engine_ledger import known_engine
from vlexport.targets.tensorrt.lower import choose_opset

TARGET = TensorRTTarget()
PROFILES = device_profiles()
JETSON, RTX, THIS = PROFILES["jetson-orin-jp6"], PROFILES["rtx"], PROFILES["this"]
MAGIC = b"vtrt"
HERE = Path(__file__).name


def program(module: nn.Module, *inputs: Tensor, dynamic: Any = False) -> Program:
    torch.manual_seed(0)
    return capture(module.eval(), inputs or image(), dynamic=dynamic).program


@pytest.fixture(scope="module")
def fixed() -> Program:
    return program(Cnn())


@pytest.fixture(scope="module")
def ranged() -> Program:
    return program(Cnn(), image(2), dynamic={"image": {0: ("batch", 1, 8)}})


@pytest.fixture(scope="module")
def block() -> Program:
    return program(Block(), torch.rand(1, 5, 16))


@pytest.fixture(scope="module")
def dilated() -> Program:
    return program(Dilated())


def lower(found: Program, folder: Path, device: DeviceProfile = THIS, name: str = "main", **options: Any) -> Artifact:
    return TARGET.lower(found, folder, Brief(TensorRTOptions(**options), device=device, threads=1, name=name))


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def agrees(found: Program, folder: Path, artifact: Artifact, given: Tensor, tolerance: float) -> None:
    with TARGET.open_here(folder, artifact, threads=1) as session:
        made = session.run({artifact.inputs[0].name: given.numpy()})
    wanted = found.run(given)[0].numpy()
    bound = tolerance * float(np.abs(wanted).max())
    np.testing.assert_allclose(made[artifact.outputs[0].name], wanted, rtol=0, atol=bound)


# -- the machine -------------------------------------------------------------------------------------------------------


def test_probe_tells_emulation_and_compiler_when_asked() -> None:
    found = TARGET.probe()
    assert (found.available, found.timing, found.reason) == (True, "emulated", "")
    assert any("tensorrt_rtx 1." in each for each in found.providers)
    assert any("times mean nothing" in each for each in found.providers)


def test_probe_tells_what_to_install_when_nothing_can_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert (TARGET.probe().available, TARGET.probe().timing) == (False, "none")
    assert "vlexport[onnxruntime]" in refused("VLX0501", TARGET.require).hint


def test_missing_compiler_matters_only_when_an_engine_must_be_made(
    fixed: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Brief(TensorRTOptions(engine="on"))
    assert TARGET.missing_tools(asked) == ""
    monkeypatch.setattr("vlexport.targets.tensorrt.engine.compiler_version", lambda: "")
    assert "vlexport[tensorrt]" in refused("VLX0501", lambda: TARGET.require_tools(asked)).hint
    assert TARGET.missing_tools(Brief(TensorRTOptions())) == ""
    artifact = lower(fixed, tmp_path)
    assert files(tmp_path) == ["main.commands.txt", "main.onnx"]
    assert "vlexport[tensorrt]" in artifact.facts["engine_reason"]


# -- the ONNX file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [JETSON, THIS], ids=lambda device: device.id)
def test_graph_is_portable_when_no_opset_is_asked_for(device: DeviceProfile, block: Program, tmp_path: Path) -> None:
    artifact = lower(block, tmp_path, device, engine="off")
    assert artifact.facts == {"engine": "none", "engine_reason": "switched off by tensorrt.engine=off"}
    assert files(tmp_path) == ["main.commands.txt", "main.onnx"]
    model = onnx_ir.load(tmp_path / artifact.path)
    assert model.opset_imports == {"": 20}
    assert len(model.functions) == 0
    assert {node.domain for node in model.graph} == {""}
    assert "Attention" not in {node.op_type for node in model.graph}


def test_opset_is_refused_when_the_device_does_not_read_it(fixed: Program, tmp_path: Path) -> None:
    error = refused("VLX0703", lambda: lower(fixed, tmp_path / "a", JETSON, opset=21))
    assert "TensorRT 10.3 reads opsets up to 20" in error.message
    assert not (tmp_path / "a").exists()
    artifact = lower(fixed, tmp_path / "b", RTX, opset=21, engine="off")
    assert onnx_ir.load(tmp_path / "b" / artifact.path).opset_imports == {"": 21}
    older = JETSON.model_copy(update={"facts": {**JETSON.facts, "opset-max": Fact(value="19", source="a test")}})
    assert [choose_opset(TensorRTOptions(), device) for device in (older, JETSON, RTX, THIS)] == [19, 20, 20, 20]


def test_types_are_those_of_the_program_when_it_is_half_precision(tmp_path: Path) -> None:
    found = program(Half())
    artifact = lower(found, tmp_path, engine="on", compute_capabilities="8.9")
    graph = onnx_ir.load(tmp_path / artifact.path).graph
    kinds = {node.op_type: node.outputs[0].dtype for node in graph if node.op_type in ("Conv", "Relu", "Gemm")}
    assert kinds == dict.fromkeys(("Conv", "Relu", "Gemm"), onnx_ir.DataType.FLOAT16)
    weights = [v.dtype for v in graph.initializers.values() if v.dtype is not None and v.dtype.is_floating_point()]
    assert weights == [onnx_ir.DataType.FLOAT16] * 4
    assert [spec.dtype for spec in (*artifact.inputs, *artifact.outputs)] == ["float32", "float32"]
    assert (tmp_path / "main.engine").read_bytes().startswith(MAGIC)
    # halves have 11 bits: .0005 an operation, a few operations deep
    agrees(found, tmp_path, artifact, image(), 5e-3)


def test_weights_lie_beside_the_graph_when_they_are_large(
    fixed: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlexport.targets.onnx.lower.EXTERNAL_ABOVE_BYTES", 100)
    artifact = lower(fixed, tmp_path, engine="on", compute_capabilities="8.9")
    assert files(tmp_path) == ["main.commands.txt", "main.engine", "main.onnx", "weights.bin"]
    agrees(fixed, tmp_path, artifact, image(), 1e-4)  # the bound that a build promises for fp32


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "two words", "$(reboot)", "-flag"])
def test_name_is_refused_when_it_would_leave_the_folder_or_run(name: str, fixed: Program, tmp_path: Path) -> None:
    refused("VLX0703", lambda: lower(fixed, tmp_path / "a", JETSON, name=name))
    assert files(tmp_path) == []


# -- engines -----------------------------------------------------------------------------------------------------------


def test_engine_is_compiled_for_the_profile_when_the_batch_has_a_range(ranged: Program, tmp_path: Path) -> None:
    artifact = lower(ranged, tmp_path, engine="on", compute_capabilities="8.9")
    assert files(tmp_path) == ["main.commands.txt", "main.engine", "main.onnx"]
    assert (tmp_path / "main.engine").read_bytes().startswith(MAGIC)
    assert artifact.facts["engine"] == "main.engine"
    assert artifact.facts["engine_kind"] == "rtx"
    assert artifact.facts["engine_compute_capabilities"] == "8.9"
    assert artifact.facts["engine_compiler"].startswith("tensorrt_rtx 1.")
    data = (tmp_path / "main.engine").read_bytes()
    assert known_engine(tmp_path / "main.engine") == data, "what was compiled here is written down"
    places = (str(tmp_path), str(Path.home()) + "/", "site-packages", "vlexport-", ".py:")
    assert [place for place in places if place.encode() in data] == []
    for batch in (1, 8):
        agrees(ranged, tmp_path, artifact, image(batch), 1e-4)  # the bound that a build promises for fp32


def test_engine_is_compiled_when_the_graph_is_a_transformer_block(block: Program, tmp_path: Path) -> None:
    artifact = lower(block, tmp_path, RTX, engine="on")
    assert (tmp_path / "main.engine").read_bytes().startswith(MAGIC)
    assert artifact.facts["engine_compute_capabilities"] == "8.6, 8.9, 12.0"


def test_engine_is_left_out_when_the_device_is_a_jetson(fixed: Program, tmp_path: Path) -> None:
    artifact = lower(fixed, tmp_path / "a", JETSON, name="image-tower.v2")
    assert artifact.path == "image-tower.v2.onnx"
    assert files(tmp_path / "a") == ["image-tower.v2.commands.txt", "image-tower.v2.onnx"]
    assert artifact.facts["engine"] == "none"
    assert "8.7" in artifact.facts["engine_reason"]
    error = refused("VLX0510", lambda: lower(fixed, tmp_path / "b", JETSON, engine="on"))
    assert "compiles on the device" in error.message
    assert not (tmp_path / "b").exists()


def test_engine_is_left_out_when_a_dim_has_no_largest_size(tmp_path: Path) -> None:
    unbounded = program(Cnn(), image(2), dynamic=True)
    artifact = lower(unbounded, tmp_path / "a")
    assert "batch has no largest size" in artifact.facts["engine_reason"]
    error = refused("VLX0510", lambda: lower(unbounded, tmp_path / "b", engine="on"))
    assert "batch has no largest size" in error.message
    commands = (tmp_path / "a/main.commands.txt").read_text()
    assert "# No largest size is recorded for batch" in commands


@pytest.mark.parametrize(
    ("device", "asked"), [(THIS, "8.7"), (THIS, "9.0"), (RTX, "7.5"), (JETSON, "8.7"), (JETSON, "8.9")]
)
def test_compute_capability_is_refused_when_no_engine_fits_it(
    device: DeviceProfile, asked: str, fixed: Program, tmp_path: Path
) -> None:
    error = refused("VLX0703", lambda: lower(fixed, tmp_path / "a", device, compute_capabilities=asked))
    assert (error.exit_code, asked in error.message) == (2, True)
    assert not (tmp_path / "a").exists()


def test_compute_capabilities_are_those_of_the_compiler_when_listed() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert {f"SM{each.replace('.', '')}" for each in RTX_CAPABILITIES} == known


def test_builder_is_configured_as_asked_when_options_are_given() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    builder, flags = trt.Builder(trt.Logger(trt.Logger.ERROR)), trt.BuilderFlag

    def flagged(**options: Any) -> set[str]:
        config = configured(trt, builder, Request(**options))
        return {
            name for name in ("TF32", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN") if config.get_flag(getattr(flags, name))
        }

    assert flagged() == set()
    assert flagged(tf32=True) == {"TF32"}
    assert flagged(refittable=True) == {"REFIT"}
    assert flagged(strip_weights=True) == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    assert flagged(strip_weights=True, refittable=True) == {"STRIP_PLAN", "REFIT"}
    config = configured(trt, builder, Request(compute_capabilities=("8.6", "12.0")))
    found = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert found == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]


class Doubled(nn.Module):
    """No weights at all."""

    def forward(self, image: Tensor) -> Tensor:
        return image.relu() + image


def test_engine_needs_a_gpu_when_weights_are_to_be_replaced(fixed: Program, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the compiler finds a GPU here")
    artifact = lower(fixed, tmp_path / "a", refittable=True)
    assert artifact.facts["engine"] == "none"
    assert "needs a GPU" in artifact.facts["engine_reason"]
    error = refused("VLX0510", lambda: lower(fixed, tmp_path / "b", engine="on", strip_weights=True))
    assert ("needs a GPU" in error.message, error.where) == (True, "--set tensorrt.strip_weights")
    without = lower(program(Doubled()), tmp_path / "c", engine="on", strip_weights=True)
    assert without.facts["engine"] == "main.engine"
    assert without.facts["engine_compute_capabilities"] == "8.0, 8.6, 8.9, 12.0 and later"


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_node_is_named_with_module_and_line_when_the_device_refuses_it(dilated: Program, tmp_path: Path) -> None:
    error = refused("VLX0503", lambda: lower(dilated, tmp_path / "a", JETSON))
    assert error.where.startswith("MaxPool in stem (node_max_pool2d")
    assert "tensorrt_nets.py:" in error.where
    assert "dilations" in error.message
    assert not (tmp_path / "a").exists()
    (listed,) = TARGET.problems(dilated, Brief(TensorRTOptions(), device=JETSON))
    assert (listed.code, listed.message, listed.where) == (error.code, error.message, error.where)


def test_refusal_is_recorded_when_the_check_is_off_or_the_version_unknown(dilated: Program, tmp_path: Path) -> None:
    for name, device, options in (("a", JETSON, {"check_operators": False}), ("b", THIS, {"engine": "off"})):
        artifact = lower(dilated, tmp_path / name, device, **options)
        assert "MaxPool in stem" in artifact.facts["refused_by_tensorrt"]
        agrees(dilated, tmp_path / name, artifact, image(), 1e-4)  # the bound that a build promises for fp32


def test_parser_is_quoted_with_module_and_line_when_it_refuses_a_node(dilated: Program, tmp_path: Path) -> None:
    artifact = lower(dilated, tmp_path)
    assert files(tmp_path) == ["main.commands.txt", "main.onnx"]
    reason = artifact.facts["engine_reason"]
    assert "dilations" in reason
    assert "MaxPool in stem (node_max_pool2d" in reason
    assert "tensorrt_nets.py:" in reason
    assert str(tmp_path) not in reason


class Largest(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return torch.topk(scores, 4000).values


def test_builder_is_quoted_with_module_and_line_when_it_refuses_a_node(tmp_path: Path) -> None:
    error = refused("VLX0510", lambda: lower(program(Largest(), torch.rand(1, 5000)), tmp_path / "a", engine="on"))
    assert not (tmp_path / "a").exists()
    assert error.where.startswith("TopK (node_topk")
    assert f"{HERE}:" in error.where
    assert "3840" in error.message


def test_plan_tells_options_and_operators_when_they_do_not_fit() -> None:
    def codes(found: Program, device: DeviceProfile, **options: Any) -> list[str]:
        return [each.code for each in TARGET.problems(found, Brief(TensorRTOptions(**options), device=device))]

    largest, plain = program(Largest(), torch.rand(1, 5000)), program(Doubled())
    assert codes(largest, THIS) == ["VLX0503"]
    assert codes(plain, JETSON) == []
    assert codes(plain, JETSON, opset=21) == ["VLX0703"]
    assert codes(plain, JETSON, engine="on") == ["VLX0510"]


COMPILER = """
import os, time
from vlexport.core.artifact import Session

class Odd(Session):
    def run(self, inputs):
        if kind == "abort": os.abort()
        if kind == "hang": time.sleep(100)
        raise RuntimeError("out of luck\\nand more")
    def close(self): pass

def open_session(folder, artifact, threads):
    global kind
    kind = os.environ["ODD"]
    return Odd((), ())
"""


@pytest.mark.parametrize(
    ("kind", "said"), [("abort", "signal 6"), ("hang", "no answer within 1 s"), ("raise", "out of luck")]
)
def test_compiler_costs_only_the_engine_when_it_dies_or_hangs(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_compiler.py").write_text(COMPILER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ODD", kind)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("vlexport.targets.tensorrt.engine._COMPILER", "odd_compiler:open_session")
    found, limit = program(Doubled()), 1 if kind == "hang" else 60
    if kind == "abort":
        error = refused("VLX0510", lambda: lower(found, tmp_path / "a", engine="on", timeout_s=limit))
        assert (error.exit_code, said in error.message) == (4, True)
        assert not (tmp_path / "a").exists()
    artifact = lower(found, tmp_path / "a", timeout_s=limit)
    assert files(tmp_path / "a") == ["main.commands.txt", "main.onnx"]
    assert said in artifact.facts["engine_reason"]


# -- what a device is told ---------------------------------------------------------------------------------------------


def commands(found: Program, device: DeviceProfile, **options: Any) -> list[list[str]]:
    text = device_commands("main", "main.onnx", found.signature, TensorRTOptions(**options), device, engine="")
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def test_trtexec_line_has_types_and_shapes_when_the_batch_has_a_range(ranged: Program, tmp_path: Path) -> None:
    (line,) = commands(ranged, JETSON)
    lower(ranged, tmp_path, JETSON)
    assert (tmp_path / "main.commands.txt").read_text().splitlines()[-1] == shlex.join(line)
    assert line == [
        "trtexec", "--onnx=main.onnx", "--saveEngine=main.plan", "--stronglyTyped", "--noTF32",
        "--minShapes=image:1x3x8x8", "--optShapes=image:1x3x8x8", "--maxShapes=image:8x3x8x8",
        "--timingCacheFile=main.timing.cache",
    ]  # fmt: skip


def test_trtexec_line_follows_every_option_when_set(fixed: Program) -> None:
    (line,) = commands(
        fixed, JETSON, tf32=True, optimization_level=5, timing_cache=False, strip_weights=True,
        refittable=True,
    )  # fmt: skip
    assert line == [
        "trtexec", "--onnx=main.onnx", "--saveEngine=main.plan", "--stronglyTyped", "--builderOptimizationLevel=5",
        "--refit", "--stripWeights", "--skipInference",
    ]  # fmt: skip
    later = JETSON.model_copy(update={"facts": {**JETSON.facts, "tensorrt": Fact(value="11.0", source="a test")}})
    (line,) = commands(fixed, later)
    assert "--stronglyTyped" not in line


def test_both_runtimes_are_told_when_no_device_is_named(ranged: Program) -> None:
    lines = commands(ranged, THIS)
    assert [line[0] for line in lines] == ["trtexec", "tensorrt_rtx", "tensorrt_rtx"]
    assert "--saveEngine=main.engine" in lines[1]
    assert lines[2] == [
        "tensorrt_rtx", "--loadEngine=main.engine", "--shapes=image:1x3x8x8", "--runtimeCacheFile=main.runtime.cache",
    ]  # fmt: skip
    assert [line[0] for line in commands(ranged, RTX)] == ["tensorrt_rtx", "tensorrt_rtx"]
    (build,) = commands(ranged, RTX, strip_weights=True)  # has to be refitted before it runs
    assert "--stripWeights" in build
    text = device_commands("main", "main.onnx", ranged.signature, TensorRTOptions(), RTX, engine="main.engine")
    assert "--onnx" not in text


class Named(nn.Module):
    def forward(self, größe: Tensor) -> dict[str, Tensor]:
        return {"<img onerror=x>": größe + 1, "$(reboot); 'x' \"y\"": größe * 2, "\x1b[31m": größe - 1}


def test_names_stay_harmless_when_they_are_hostile(tmp_path: Path) -> None:
    found = program(Named(), torch.rand(2, 3), dynamic={"größe": {0: ("batch", 1, 4)}})
    artifact = lower(found, tmp_path, engine="on")
    assert (tmp_path / "main.engine").read_bytes().startswith(MAGIC)
    text = (tmp_path / "main.commands.txt").read_text(encoding="utf-8")
    assert "$(" not in text
    line = next(shlex.split(line) for line in text.splitlines() if line.startswith("trtexec"))
    assert "--maxShapes='größe':4x3" in line
    given = torch.rand(3, 3)
    with TARGET.open(tmp_path, artifact, threads=1) as session:
        made = session.run({"größe": given.numpy()})
    assert list(made) == ["<img onerror=x>", "$(reboot); 'x' \"y\"", "\x1b[31m"]
    np.testing.assert_array_equal(made["<img onerror=x>"], given.numpy() + 1)


def test_facts_tell_what_a_device_needs_when_recorded() -> None:
    assert TARGET.compatibility(Brief(TensorRTOptions(), device=JETSON)) == {
        "opset": "20", "domains": "ai.onnx", "typing": "strong", "oldest_tensorrt": "10.0", "device_tensorrt": "10.3",
        "device_compute_capability": "8.7",
    }  # fmt: skip
    assert TARGET.compatibility(Brief(TensorRTOptions(opset=23)))["oldest_tensorrt"] == "10.15"
    assert TARGET.tools()["tensorrt-rtx"].startswith("1.")


@pytest.mark.parametrize(
    "options",
    [{"opset": 17}, {"opset": "new"}, {"engine": "maybe"}, {"compute_capabilities": "sm89"}, {"optimization_level": 6},
     {"timeout_s": 0}, {"fp16": True}],
    ids=str,
)  # fmt: skip
def test_option_is_refused_when_it_is_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TARGET.check_options(options)


def test_options_are_read_when_given_as_text() -> None:
    found = TARGET.check_options({"opset": "19", "strip_weights": "true", "optimization_level": "3"})
    assert found == TensorRTOptions(opset=19, strip_weights=True, optimization_level=3)
    assert TARGET.check_options({"opset": "auto"}) == TensorRTOptions()
