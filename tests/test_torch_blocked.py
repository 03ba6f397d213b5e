"""The half that runs on a device works where torch, onnx and the exporters cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlexport
from vlexport.core.config import BuildConfig

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "timm", "transformers", "safetensors", "sympy")
NEEDS_TORCH = (
    "calibration/calibrate.py", "calibration/collect.py", "calibration/keys.py", "ir", "frontends", "passes",
    *(f"stages/{name}.py" for name in (
        "account", "bisect", "bisect_artifact", "blame", "build", "build_each", "candidates", "choices", "component",
        "fastest", "folded", "inspect_model", "layer_figures", "layer_search", "lowered", "lowering_cache", "make",
        "naive", "operators", "order", "plan", "prepare", "probe_memory", "quantized", "searches", "smoothed", "tokens",
        "whole_model",
    )),
    "targets/onnx/",
    *(f"targets/onnxruntime/{name}.py" for name in (
        "attention_operator", "emit_quant", "fuse_attention", "fuse_biased_attention", "fuse_dynamic_linear",
        "fuse_multi_head_attention", "fuse_qattention", "gather_rows", "integer_linear", "norm_biases", "part_norms",
        "projections", "score_bias", "small_weights",
    )),
    *(f"targets/tensorrt/{name}.py" for name in (
        "emit_quant", "lower", "op_limits", "op_support", "quantize_softmax",
    )),
    *(f"targets/coreml/{name}.py" for name in (
        "classify", "convert", "emit_quant", "legalize_resize", "legalize_spelling", "open_attention", "op_support",
        "outputs", "pixels", "plan", "quantized",
    )),
)  # fmt: skip
"""What belongs to the other half: the extra ``build`` installs what it imports."""

# Python imports sitecustomize at start, in the children that isolate a runtime as well.
_BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.norm(self.conv(image)).relu().mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its bundle, a photo and labelled arrays."""
    place = tmp_path_factory.mktemp("device")
    torch.manual_seed(0)
    vlexport.save(
        Tiny().eval(),
        place / "model.pt",
        inputs=torch.randn(1, 3, 8, 8),
        preprocess="resize=8x8,scale=1/255",
        labels=["cat", "dog"],
    )
    vlexport.build(BuildConfig(model=str(place / "model.pt"), output=str(place / "bundle"), profile=False))
    drawn = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    np.savez(place / "data.npz", image=drawn, label=np.array([0, 1, 0, 1, 0, 1]))
    Image.new("RGB", (10, 9), (200, 10, 60)).save(place / "photo.png")
    (place / "sitecustomize.py").write_text(_BLOCK, encoding="utf-8")
    return place


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def blocked(folder: Path) -> Run:
    """Runs a Python script with the build half blocked from import, in the folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def device_modules() -> list[str]:
    """Every module of the package but those of the other half."""
    names = []
    for part in ("vlexport", "passes", "targets", "calibration"):
        for file in sorted((ROOT / part).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix() if part != "vlexport" else file.relative_to(ROOT / part).as_posix()
            linked = part == "vlexport" and path.startswith(("passes/", "targets/", "calibration/"))
            if linked or path.startswith(NEEDS_TORCH) or path == "__main__.py":
                continue
            names.append(".".join(["vlexport", *Path(path).with_suffix("").parts]).removesuffix(".__init__"))
    return names


def test_block_holds_and_public_names_say_what_to_install(blocked: Run) -> None:
    script = (
        "import json, vlexport\n"
        "said = []\n"
        "for line in ('import torch', 'import onnx', 'vlexport.build', 'vlexport.save'):\n"
        "    try: exec(line)\n"
        "    except ImportError as error: said.append(str(error))\n"
        "print(json.dumps(said))\n"
    )
    needs = "vlexport.{} needs torch, which is not installed: pip install 'vlexport[build]'"
    assert json.loads(blocked("-c", script).stdout) == [
        "torch is blocked", "onnx is blocked", needs.format("build"), needs.format("save"),
    ]  # fmt: skip


def test_device_modules_import_when_torch_is_blocked(blocked: Run) -> None:
    names = device_modules()
    assert {"vlexport.stages.profile", "vlexport.targets.onnxruntime.session", "vlexport.core.isolate"} <= set(names)
    script = (
        "import importlib, json, sys\n"
        "failed = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: failed[name] = str(error)\n"
        "print(json.dumps(failed))\n"
    )
    done = blocked("-c", script, json.dumps(names))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_verify_and_run_work_when_torch_is_blocked(blocked: Run) -> None:
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from vlexport.stages.run import run\n"
        "from vlexport.stages.verify import verify\n"
        "found = verify(Path('bundle'))\n"
        "rows = run(Path('bundle'), 'data.npz')\n"
        "print(json.dumps({'errors': found.errors, 'rows': [(n, v['output'].tolist()) for n, v in rows]}))\n"
    )
    done = blocked("-c", script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"]["main"] < 1e-4
    assert len(found["rows"]) == 6
    assert np.isfinite([row for _, row in found["rows"]]).all()


def test_load_answers_as_with_torch_when_torch_is_blocked(blocked: Run, folder: Path) -> None:
    script = (
        "import json, vlexport\n"
        "with vlexport.load('bundle') as bundle: print(json.dumps(bundle.classify('photo.png')))\n"
    )
    done = blocked("-c", script)
    assert done.returncode == 0, done.stderr
    with vlexport.load(folder / "bundle") as bundle:
        expected = bundle.classify(folder / "photo.png")
    found = json.loads(done.stdout)
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [share for _, share in found] == pytest.approx([share for _, share in expected])


COMMANDS = (
    ["verify", "bundle"],
    ["run", "bundle", "photo.png"],
    ["inspect", "bundle"],
    ["explain", "bundle"],
    ["explain", "VLX0503"],
    ["validate", "bundle", "--data", "data.npz", "--reference", "bundle"],
    # What needs the other half says so.
    ["validate", "bundle", "--data", "data.npz", "--reference", "model.pt"],
    ["inspect", "model.pt"],
    ["bisect", "model.pt"],
)


@pytest.fixture(scope="module")
def answers(blocked: Run) -> list[dict[str, Any]]:
    """What each of the commands printed with ``--json``, asked one after the other in one process."""
    script = "import json, sys\nfrom vlexport.cli.main import main\nfor each in json.loads(sys.argv[1]): main(each)\n"
    done = blocked("-c", script, json.dumps([[*each, "--json"] for each in COMMANDS]))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(COMMANDS), done.stderr
    return found


@pytest.mark.parametrize("number", range(6), ids=lambda number: " ".join(COMMANDS[number]))
def test_command_works_when_torch_is_blocked(answers: list[dict[str, Any]], number: int) -> None:
    assert (answers[number]["exit"], answers[number]["ok"]) == (0, True)


def test_model_as_reference_is_refused_in_words_when_torch_is_blocked(answers: list[dict[str, Any]]) -> None:
    error = answers[6]["error"]
    assert error["code"] == "VLX0104"
    assert "vlexport[build]" in error["hint"]


@pytest.mark.parametrize("number", [7, 8], ids=lambda number: " ".join(COMMANDS[number]))
def test_command_on_a_model_says_what_to_install_when_torch_is_blocked(
    answers: list[dict[str, Any]], number: int
) -> None:
    assert (answers[number]["exit"], answers[number]["error"]["code"]) == (4, "VLX0501")
    assert "vlexport[build]" in answers[number]["error"]["hint"]
