"""``vlexport build --target tensorrt`` and its plan, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

import vlexport
from tests.targets.tensorrt_nets import Cnn, Dilated, image
from vlexport.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.pt``, which every TensorRT takes, and ``dilated.pt``, which none does."""
    place = tmp_path_factory.mktemp("tensorrt")
    torch.manual_seed(0)
    vlexport.save(Cnn().eval(), place / "net.pt", inputs=image(), dynamic=False)
    vlexport.save(Dilated().eval(), place / "dilated.pt", inputs=image(), dynamic=False)
    return place


def build(folder: Path, model: str, *arguments: str) -> int:
    fixed = ("--target", "tensorrt", "--precision", "fp32", "--no-profile", "--json")
    return main(["build", str(folder / model), *fixed, *arguments])


def answer(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_bundle_for_jetson_is_portable_and_the_same_when_built_twice(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for name in ("a", "b"):
        assert build(folder, "net.pt", "--for", "jetson-orin-jp6", "-o", str(folder / name)) == 0
        digests.append(answer(capfd)["digest"])
    assert digests[0] == digests[1]
    assert sorted(file.name for file in (folder / "a" / "artifact").iterdir()) == ["main.commands.txt", "main.onnx"]
    assert onnx_ir.load(folder / "a/artifact/main.onnx").opset_imports == {"": 20}
    bundle = json.loads((folder / "a/bundle.json").read_text())
    assert bundle["components"]["main"]["artifact"]["facts"]["engine"] == "none"
    assert bundle["compatibility"]["device_tensorrt"] == "10.3"
    assert main(["verify", str(folder / "a")]) == 0


def test_engine_lies_in_the_bundle_when_the_device_is_an_rtx_gpu(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build(folder, "net.pt", "--for", "rtx", "-o", str(folder / "c")) == 0
    bundle = json.loads((folder / "c/bundle.json").read_text())
    assert "artifact/main.engine" in bundle["files"]
    assert bundle["components"]["main"]["artifact"]["facts"]["engine_kind"] == "rtx"


def test_plan_names_node_module_and_line_when_the_device_refuses_one(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for device in ("this", "jetson-orin-jp6"):
        assert build(folder, "dilated.pt", "--plan", "--for", device) == 4
        (problem,) = answer(capfd)["problems"]
        assert problem["code"] == "VLX0503"
        assert problem["where"].startswith("MaxPool in stem")
        assert "tensorrt_nets.py:" in problem["where"]
    assert build(folder, "net.pt", "--plan", "--for", "jetson-orin-jp6", "-o", str(folder / "new")) == 0
    assert answer(capfd)["problems"] == []


def test_nothing_is_written_when_the_device_refuses_a_node(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build(folder, "dilated.pt", "--for", "jetson-orin-jp6", "-o", str(folder / "none")) == 4
    assert answer(capfd)["error"]["code"] == "VLX0503"
    assert not (folder / "none").exists()
