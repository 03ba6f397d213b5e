"""Wherever a name is asked for, a misspelt one is answered with the nearest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stages.conftest import Colours, Make

MISSPELT: dict[str, tuple[list[str], str]] = {
    "command": (["buld", "model.pt"], "'build'"),
    "flag": (["build", "model.pt", "--targt", "coreml"], "--target"),
    "flag of bisect": (["bisect", "model.pt", "--recpe", "b"], "--recipe"),
    "target": (["build", "model.pt", "--target", "onnxruntim"], "did you mean 'onnxruntime'"),
    "target of inspect": (["inspect", "model.pt", "--target", "tensort"], "did you mean 'tensorrt'"),
    "target described": (["targets", "corem"], "did you mean 'coreml'"),
    "device": (["build", "model.pt", "--for", "cpu-x86-vni"], "did you mean 'cpu-x86-vnni'"),
    "precision": (["build", "model.pt", "--precision", "fp61"], "did you mean 'fp16'"),
    "pass": (["build", "model.pt", "--pass", "canonicalise"], "did you mean 'canonicalize'"),
    "pass described": (["passes", "simplify-onn"], "did you mean 'simplify-onnx'"),
    "pass explained": (["explain", "bundle", "--pass", "fold-constant"], "did you mean 'fold-constants'"),
    "error": (["explain", "VLX9501"], "did you mean 'VLX"),
    "scope": (["build", "model.pt", "--set", "onxruntime.opset=20"], "did you mean 'onnxruntime'"),
    "option": (["build", "model.pt", "--set", "onnxruntime.opsett=20"], "did you mean 'opset'"),
    "value of a list": (["build", "model.pt", "--set", "onnxruntime.provider=cud"], "did you mean 'cuda'"),
    "value of a choice": (
        ["build", "model.pt", "-t", "coreml", "--set", "coreml.compute_units=cpu-and-gp"], "did you mean 'cpu-and-gpu'"
    ),
    "state": (["build", "model.pt", "--require", "verifed"], "did you mean 'verified'"),
    "dim": (["build", "model.pt", "--dynamic", "bach=1"], "did you mean 'batch'"),
    "metric": (["build", "model.pt", "--gate", "drp<=1"], "did you mean 'drop'"),
    "metric of profile": (["profile", "bundle", "--gate", "p5_ms<=1"], "did you mean 'p50_ms'"),
    "recipe": (["build", "model.pt", "--recipe", "recipe.toml"], "did you mean 'precision'"),
    "preprocessing": (["build", "model.pt", "--preprocess", "resze=8"], "did you mean 'resize'"),
    "weights": (
        ["build", "weights.pth", "--arch", "timm:resnet10t", "--weights-key", "emma"], "did you mean 'ema'"
    ),
    "architecture": (["build", "weights.pth", "--arch", "timm:resnet10x"], "did you mean 'resnet10t'"),
    "function": (["build", "weights.pth", "--arch", "net.py:mak"], "did you mean 'make'"),
    "dtype of an input": (
        ["build", "conv.pth", "--arch", "net.py:make", "--input", "input=1x3x8x8:float3"], "did you mean 'float32'"
    ),
    "input": (["build", "conv.pth", "--arch", "net.py:make", "--input", "inpt=1x3x8x8"], "did you mean 'input'"),
    "input of data": (["validate", "bundle", "--data", "data.npz"], "'imag'"),
    "class of data": (["validate", "bundle", "--data", "classes"], "did you mean 'green'"),
    "component": (["build", "parts"], "did you mean 'head'"),
    "output of a component": (["build", "more"], "did you mean 'output'"),
}  # fmt: skip
_PARTS = """vlexport_components = 1
edges = [["{source}", "{sink}.image"]]
[components.head]
model = "model.pt"
[components.tail]
model = "model.pt"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_file: Path, built: Path) -> Path:
    """A folder with everything that the commands name; nothing is written to it."""
    found = tmp_path_factory.mktemp("names")
    shutil.copy(model_file, found / "model.pt")
    shutil.copytree(built, found / "bundle")
    (found / "recipe.toml").write_text('precison = "fp32"\n', encoding="utf-8")
    net = "from torch import nn\ndef make():\n    return nn.Conv2d(3, 3, 1)\n"
    (found / "net.py").write_text(net, encoding="utf-8")
    torch.save({"ema": Colours().state_dict(), "epoch": 3}, found / "weights.pth")
    torch.save(torch.nn.Conv2d(3, 3, 1).state_dict(), found / "conv.pth")
    image = np.stack([Make.image(0), Make.image(1)])
    np.savez(found / "data.npz", imag=image, label=np.array([0, 1]))
    Make.photo(found / "classes" / "grene" / "a.png", 1)
    for name, source, sink in (("parts", "hed.output", "tail"), ("more", "head.outputs", "tail")):
        (found / name).mkdir()
        shutil.copy(model_file, found / name / "model.pt")
        (found / name / "components.toml").write_text(_PARTS.format(source=source, sink=sink), encoding="utf-8")
    return found


@pytest.mark.parametrize("what", MISSPELT)
def test_nearest_name_is_given_when_one_is_misspelt(
    what: str, place: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    arguments, said = MISSPELT[what]
    code, out, err = cli(*arguments)
    assert code in (1, 2), err
    assert out == ""
    assert said in err
