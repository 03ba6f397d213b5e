"""Execution providers of the onnxruntime target: recorded, checked when a session opens, never replaced in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import vlexport
from vlexport.core.artifact import Artifact
from vlexport.core.bundle import ARTIFACT_FOLDER, read_bundle
from vlexport.core.config import BuildConfig
from vlexport.core.errors import VlexportError
from vlexport.frontends.capture import capture
from vlexport.stages.build import build
from vlexport.stages.order import reason_of
from vlexport.stages.searches import fusions_to_try
from vlexport.targets.base import Brief
from vlexport.targets.onnx.providers import FLOATS, PROVIDERS
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget

TARGET = OnnxRuntimeTarget()
GIVEN = {"input": np.ones((2, 4), np.float32)}


@pytest.fixture(autouse=True)
def only_the_cpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another ONNX Runtime may have more."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def program() -> Any:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)).program


@pytest.fixture(scope="module")
def folder(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("artifact")
    TARGET.lower(program, made, Brief(OnnxRuntimeOptions()))
    return made


def artifact_of(program: Any, **options: Any) -> Artifact:
    """As lowered into ``folder`` with these options: they decide how it is opened, not its bytes."""
    specs = program.signature
    plain = Artifact(target="onnxruntime", path="main.onnx", inputs=specs.inputs, outputs=specs.outputs)
    return TARGET.retuned(plain, OnnxRuntimeOptions(**options))


def refused(call: Any) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        call()
    assert (caught.value.code, caught.value.exit_code) == ("VLX0508", 4)
    return caught.value


class FakeSession:
    """An ONNX Runtime session whose provider's libraries load, or do not: then it is the CPU's, as the real one."""

    loads = True
    asked: list[tuple[str, dict[str, str]]]

    def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
        type(self).asked = providers
        self.providers = [name for name, _ in providers] if self.loads else ["CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        return self.providers


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """A runtime that offers every provider."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(FakeSession, "loads", True)
    return FakeSession


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_session_asks_for_the_provider_and_the_cpu_when_the_runtime_has_it(
    name: str, program: Any, folder: Path, fake: type[FakeSession]
) -> None:
    artifact = artifact_of(program, provider=name)
    assert artifact.session_options["provider"] == name
    assert TARGET.probe_for(Brief(OnnxRuntimeOptions(provider=name))).available
    with TARGET.open_here(folder, artifact) as session:
        assert [asked for asked, _ in fake.asked] == [PROVIDERS[name], "CPUExecutionProvider"]
        assert session.timing == "real"


@pytest.mark.parametrize("floats", FLOATS)
def test_openvino_is_told_threads_and_what_floats_are_computed_in(
    floats: str, program: Any, folder: Path, fake: type[FakeSession]
) -> None:
    with TARGET.open_here(folder, artifact_of(program, provider="openvino", provider_floats=floats), threads=3):
        (_, told), (_, of_cpu) = fake.asked
    assert (told["device_type"], told["num_of_threads"], of_cpu) == ("CPU", "3", {})
    assert json.loads(told["load_config"])["CPU"]["INFERENCE_PRECISION_HINT"] == floats


def test_session_is_refused_when_a_bundle_records_floats_that_are_none(program: Any, folder: Path) -> None:
    artifact = artifact_of(program, provider="openvino", provider_fallback=True)
    foreign = artifact.model_copy(update={"session_options": {**artifact.session_options, "provider_floats": "f8"}})
    with pytest.raises(VlexportError, match="provider_floats") as caught:
        TARGET.open_here(folder, foreign)
    assert caught.value.code == "VLX0505"


@pytest.mark.parametrize(
    ("options", "precision", "computed"),
    [
        ({"provider": "openvino", "provider_floats": "bf16"}, "fp32", "bf16"),
        ({"provider": "openvino", "provider_floats": "bf16"}, "int8", "int8"),
        ({"provider": "openvino"}, "fp32", "fp32"),
        ({"provider_floats": "bf16"}, "fp32", "fp32"),
    ],
)
def test_golden_vectors_have_the_bound_of_bf16_only_where_openvino_rounds_floats(
    options: dict[str, str], precision: str, computed: str
) -> None:
    brief = Brief(OnnxRuntimeOptions(**options), precision=precision)
    assert TARGET.computes_in(brief) == computed
    asked = f"computed in {computed}, as options of onnxruntime ask"
    assert reason_of(TARGET, brief, "the default") == ("the default" if computed == precision else asked)


def test_openvino_is_tried_by_a_search_when_the_runtime_has_it_and_nobody_chose(fake: type[FakeSession]) -> None:
    options = OnnxRuntimeOptions()
    assert TARGET.relowered(options) == {"provider": ("openvino",)}
    config = BuildConfig(model="m.pt", output="b", options={"onnxruntime.provider": "cpu"})
    assert "onnxruntime.provider" in fusions_to_try(BuildConfig(model="m.pt", output="b"), TARGET, options)
    assert "onnxruntime.provider" not in fusions_to_try(config, TARGET, options)
    assert TARGET.relowered(OnnxRuntimeOptions(provider="openvino")) == {}
    assert TARGET.tunables(OnnxRuntimeOptions(provider="openvino")) == {"provider_floats": ("bf16",)}


def test_openvino_is_not_tried_when_the_runtime_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert TARGET.relowered(OnnxRuntimeOptions()) == {}
    assert "provider_floats" not in TARGET.tunables(OnnxRuntimeOptions())


def test_nothing_new_is_recorded_when_the_provider_is_the_cpu(program: Any) -> None:
    assert "provider" not in artifact_of(program).session_options
    assert TARGET.compatibility(Brief(OnnxRuntimeOptions()))["provider"] == "CPUExecutionProvider"


def test_session_is_refused_when_the_provider_does_not_load(
    program: Any, folder: Path, fake: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(program, provider="cuda")
    monkeypatch.setattr(fake, "loads", False)
    error = refused(lambda: TARGET.open_here(folder, artifact))
    assert "CUDAExecutionProvider" in error.message
    artifact = artifact_of(program, provider="cuda", provider_fallback=True)
    with TARGET.open_here(folder, artifact) as session:
        assert session.timing == "emulated"


@pytest.mark.parametrize("isolated", [False, True])
def test_session_is_refused_with_what_is_installed_when_the_runtime_lacks_the_provider(
    isolated: bool, program: Any, folder: Path
) -> None:
    artifact = artifact_of(program, provider="xnnpack")
    error = refused(lambda: (TARGET.open if isolated else TARGET.open_here)(folder, artifact))
    assert "XnnpackExecutionProvider" in error.message
    assert "it offers cpu" in error.hint


def test_cpu_stands_in_when_it_may(program: Any, folder: Path) -> None:
    artifact = artifact_of(program, provider="openvino", provider_fallback=True)
    with TARGET.open_here(folder, artifact) as session:
        found = session.run(GIVEN)
        assert session.timing == "emulated"
    wanted = program.run(torch.from_numpy(GIVEN["input"]))
    np.testing.assert_allclose(next(iter(found.values())), wanted[0], rtol=0, atol=1e-5)  # one product of four terms


def test_provider_is_refused_when_it_is_misspelt() -> None:
    with pytest.raises(ValueError, match="provider"):
        OnnxRuntimeOptions(provider="cudaa")


@pytest.mark.parametrize("fallback", [False, True])
def test_bundle_is_built_and_not_verified_when_the_provider_is_elsewhere(fallback: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vlexport.save(nn.Linear(4, 3).eval(), tmp_path / "m.pt", inputs=torch.randn(2, 4))
    options = {"onnxruntime.provider": "openvino", "onnxruntime.provider_fallback": str(fallback).lower()}
    found = build(BuildConfig(model=str(tmp_path / "m.pt"), output=str(tmp_path / "b"), options=options))
    bundle = read_bundle(tmp_path / "b")
    assert (bundle.state, bundle.compatibility["provider"]) == ("built", "OpenVINOExecutionProvider")
    assert found.report.latency is None
    said = "latency is not measured" if fallback else "does not offer"
    assert any(said in note for note in found.report.notes)
    if not fallback:
        refused(lambda: TARGET.open(tmp_path / "b" / ARTIFACT_FOLDER, bundle.main.artifact))


def test_gate_is_refused_when_the_provider_is_elsewhere(tmp_path: Path) -> None:
    vlexport.save(nn.Linear(4, 3).eval(), tmp_path / "m.pt", inputs=torch.randn(2, 4))
    config = BuildConfig(
        model=str(tmp_path / "m.pt"), output=str(tmp_path / "b"), gate=("p50_ms<=5",),
        options={"onnxruntime.provider": "cuda"},
    )  # fmt: skip
    with pytest.raises(VlexportError) as caught:
        build(config)
    assert caught.value.code == "VLX0803"
    assert "CUDAExecutionProvider" in caught.value.message
