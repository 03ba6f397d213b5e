"""A build runs the target's lowered passes between lowering and writing, and records them like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

import vlexport
from tests.targets.onnx_passes import UNFUSED, Editing
from vlexport.cli.main import main
from vlexport.core.artifact import Artifact
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import PassRecord
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, GateError
from vlexport.targets.base import Brief, Target
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime import OnnxRuntimeTarget


def built(model: Path, output: Path, **options: Any) -> Path:
    config = BuildConfig(model=str(model), output=str(output), **{"profile": False, "threads": 1, **options})
    return vlexport.build(config).output


def records(bundle: Path) -> dict[str, PassRecord]:
    return {record.name: record for record in read_bundle(bundle).main.passes}


OPTIMIZED = {"onnxruntime.optimize": "true", **UNFUSED}


def test_lowered_pass_is_recorded_last_when_asked_for(model_file: Path, tmp_path: Path) -> None:
    bundle = built(model_file, tmp_path / "b", options=OPTIMIZED, dump=str(tmp_path / "dump"))
    found = records(bundle)
    assert list(found)[-1] == "optimize-onnx"
    assert (found["optimize-onnx"].stage, found["optimize-onnx"].gate.proof) == ("legalize", "identical")
    assert '"onnxruntime.optimize" = "true"' in (bundle / "recipe.toml").read_text(encoding="utf-8")
    files = sorted(p.name for p in (tmp_path / "dump" / "onnxruntime" / "lowered").iterdir())
    assert files == ["00-source.txt", "01-optimize-onnx.txt"]
    assert (
        (tmp_path / "dump/onnxruntime/lowered/00-source.txt")
        .read_text(encoding="utf-8")
        .startswith("onnx(image: f32[batch,3,")
    )


def test_no_lowered_pass_runs_when_none_is_asked_for(built: Path) -> None:
    assert not {"optimize-onnx", "simplify-onnx"} & set(records(built))


def with_passes(monkeypatch: pytest.MonkeyPatch, *passes: Any) -> None:
    monkeypatch.setattr(OnnxRuntimeTarget, "lowered_passes", lambda self, options: passes)


def scaled(model: OnnxModel) -> None:
    value = next(v for v in model.model.graph.initializers.values() if "head.weight" in str(v.name))
    assert value.const_value is not None
    value.const_value = onnx_ir.tensor(value.const_value.numpy() * np.float32(1.001), name=value.name)


def test_gate_names_pass_and_module_when_a_lowered_pass_is_broken(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_passes(monkeypatch, Editing(lambda ir: None, says=0), Editing(scaled))
    with pytest.raises(GateError) as error:
        built(model_file, tmp_path / "b")
    assert error.value.code == "VLX0401"
    assert "pass edit-lowered changed what the model computes" in error.value.message
    assert " in head (" in error.value.where
    assert list(tmp_path.iterdir()) == []


def test_golden_check_catches_a_broken_lowered_pass_when_the_gate_is_off(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The artifact is held against the source program, whatever the passes were held against."""
    with_passes(monkeypatch, Editing(scaled))
    assert main(["build", str(model_file), "-o", str(tmp_path / "b"), "--no-profile", "--no-gate"]) == 3
    assert "error VLX0504" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def renamed_weight(model: OnnxModel) -> None:
    graph = model.model.graph
    value = next(v for v in graph.initializers.values() if "head.weight" in str(v.name))
    value.name = "another"


def test_change_of_a_lowered_pass_reaches_the_artifact_when_it_is_accepted(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_passes(monkeypatch, Editing(renamed_weight))
    bundle = built(model_file, tmp_path / "b")
    assert "another" in onnx_ir.load(bundle / "artifact/main.onnx").graph.initializers
    assert records(bundle)["edit-lowered"].gate.proof == "identical"
    assert records(bundle)["edit-lowered"].gate.probes > 0


def test_nothing_is_left_when_an_outside_optimizer_crashes(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/onnxsim.py").write_text("import os\ndef simplify(*a, **k):\n    os.abort()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    with pytest.raises(CapabilityError) as error:
        built(model_file, tmp_path / "b", options={"onnxruntime.simplify": "true"})
    assert (error.value.code, error.value.where) == ("VLX0408", "simplify-onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["fake"]


def test_bundle_is_byte_identical_when_simplified_twice(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxsim", reason="there is no onnxsim for Python 3.10")
    monkeypatch.setenv("VLEXPORT_CACHE", "off")
    wanted = {"options": {"onnxruntime.simplify": "true", **OPTIMIZED}}
    first, second = (built(model_file, tmp_path / name, **wanted) for name in ("a", "b"))
    for name in ("artifact/main.onnx", "bundle.json", "recipe.toml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert list(records(first))[-2:] == ["simplify-onnx", "optimize-onnx"]


class Plain(Target):
    """A target without lowered passes, written before there were any."""

    id = "plain"
    summary = precision_reason = session_entry = ""
    precisions = ("fp32",)

    def probe(self) -> Any:
        raise NotImplementedError

    def lower(self, program: Any, folder: Path, brief: Any) -> Any:
        return Artifact(target=self.id, path="main", inputs=(), outputs=(), session_options={"threads": brief.threads})

    def lower_naive(self, program: Any, folder: Path) -> Any:
        raise NotImplementedError


def test_target_is_lowered_as_ever_when_it_has_no_lowered_passes(tmp_path: Path) -> None:
    from vlexport.stages.lowered import lower_and_rewrite

    program: Any = None
    options: Any = None
    artifact, records = lower_and_rewrite(Plain(), program, tmp_path, Brief(options, threads=3), probes=None)
    assert (artifact.session_options, records) == ({"threads": 3}, ())
