"""The sample plugin, installed as its README says, through the command line and the suites for targets and passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlexport
from tests.harness import check_pass, one_thread
from tests.target_conformance import TargetConformance, refused
from vlexport.cli.main import main
from vlexport.core.artifact import Frozen
from vlexport.frontends.capture import capture
from vlexport.passes import pass_class
from vlexport.targets import open_target
from vlexport.targets.base import Brief

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plugin, built as pip builds it and unpacked into a folder that only this module's tests can import from."""
    source, site = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "samples" / "plugin", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.syspath_prepend(str(site))
        yield site
    for name in [each for each in sys.modules if each.partition(".")[0] == "vlexport_toy"]:
        del sys.modules[name]


class TestNumpyTarget(TargetConformance):
    """The toy target holds what every target owes its users."""

    target_name = "numpy"


# -- the pass ----------------------------------------------------------------------------------------------------------


class Negations(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        inner = -torch.tanh(x)
        if self.kind == "read twice":
            return -inner, inner * 2
        if self.kind == "four":
            return torch.neg(torch.neg(-inner)) + 1
        if self.kind == "reshape between":
            return -(inner.reshape(-1, 2, 2)) + 1
        if self.kind == "relu between":
            return -torch.relu(inner) + 1
        return -inner + 1


@pytest.mark.parametrize(("kind", "changes", "left"), [("two", 1, 0), ("read twice", 1, 1), ("four", 2, 0)])
def test_double_negation_disappears_when_the_two_follow_each_other(kind: str, changes: int, left: int) -> None:
    example = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    checked = check_pass(pass_class("fold-double-negation")(), Negations(kind), example, expect_changes=changes)
    assert len(checked.after.calls("aten.neg.default")) == left
    assert checked.near_misses == ()


@pytest.mark.parametrize(
    ("kind", "said"), [("reshape between", "reshape.default stands between"), ("relu between", "")]
)
def test_double_negation_stays_when_something_stands_between(kind: str, said: str) -> None:
    example = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    checked = check_pass(pass_class("fold-double-negation")(), Negations(kind), example, expect_changes=0)
    assert [said in miss.reason for miss in checked.near_misses] == ([True] if said else [])


# -- the command line --------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.neg(-torch.relu(self.first(x))))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vlexport.save(Tiny().eval(), tmp_path / "model.pt", inputs=torch.rand(2, 4))
    return tmp_path / "model.pt"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON object of a command."""
    capfd.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capfd.readouterr().out)


def test_plugin_is_used_like_ours_when_named(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, made = run(
        capfd, "build", "model.pt", "--target", "numpy", "--pass", "fold-double-negation", "-o", "made", "--set",
        "numpy.max_steps=9",
    )  # fmt: skip
    assert code == 0, made
    bundle = json.loads(Path("made/bundle.json").read_text())
    record = next(p for p in bundle["components"]["main"]["passes"] if p["name"] == "fold-double-negation")
    assert record["changes"][0]["count"] == 1
    assert bundle["tools"] == {"numpy": np.__version__, "vlexport-toy": "1.0"}
    assert bundle["compatibility"] == {"steps_format": "1"}
    assert 'passes = [\n    "fold-double-negation",\n]' in Path("made/recipe.toml").read_text()
    assert made["report"]["latency"] is None
    assert "latency is not measured: the target's timing is emulated" in made["report"]["notes"]

    assert run(capfd, "verify", "made")[0] == 0
    rows = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    np.savez("data.npz", x=rows, label=np.zeros(4, int))
    code, judged = run(capfd, "validate", "made", "--data", "data.npz", "--reference", "model.pt")
    assert code == 0, judged
    assert judged["report"]["fidelity"]["output"]["cosine_min"] > 0.9999  # the same numbers up to rounding
    with vlexport.load("made") as loaded:
        assert loaded.run({"x": rows})["output"].shape == (4, 2)

    code, again = run(capfd, "build", "model.pt", "--recipe", "made/recipe.toml", "-o", "again")
    assert (code, again["digest"]) == (0, made["digest"])


def test_latency_is_refused_in_words_when_timing_is_emulated(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "build", "model.pt", "--target", "numpy", "-o", "made")[0] == 0
    code, answer = run(capfd, "profile", "made", "--quick")
    assert (code, answer["error"]["code"]) == (4, "VLX0803")
    assert "timing is emulated" in answer["error"]["message"]
    assert not Path("made/measured/local-2").exists(), "no report of what was not measured"
    code, answer = run(capfd, "build", "model.pt", "--target", "numpy", "-o", "gated", "--gate", "p50_ms<=8")
    assert (code, answer["error"]["code"]) == (4, "VLX0803")
    assert not Path("gated").exists()


def test_plugins_are_listed_with_their_package_when_installed(capfd: pytest.CaptureFixture[str]) -> None:
    code, answer = run(capfd, "targets")
    assert (code, answer["broken"]) == (0, {})
    assert answer["targets"]["numpy"]["distribution"] == "vlexport-toy 1.0"
    assert answer["targets"]["onnxruntime"]["distribution"] == "vlexport"
    code, answer = run(capfd, "passes")
    assert (code, answer["broken"]) == (0, {})
    programs = [each["name"] for each in answer["passes"] if "turned_on_by" not in each]
    assert programs[-1] == "fold-double-negation"
    code, answer = run(capfd, "targets", "numpy")
    assert answer["options"] == [
        {
            "name": "max_steps",
            "type": "integer, ≥ 1",
            "default": "1000",
            "description": "The longest list of steps that is written; longer programs are refused.",
        }
    ]
    code, answer = run(capfd, "passes", "fold-double-negation")
    assert answer["description"].startswith("fold-double-negation: a value that is negated twice is the value.")


def test_options_of_the_toy_target_hold_when_given(tmp_path: Path) -> None:
    target = open_target("numpy")
    program = capture(Tiny().eval(), torch.rand(2, 4)).program

    def lower(options: Frozen) -> Any:
        return target.lower(program, tmp_path / "out", Brief(options, threads=1))

    error = refused("VLX0503", lambda: lower(target.check_options({"max_steps": 2})))
    assert "at most 2" in error.message
    assert lower(target.check_options({"max_steps": 9})).path == "main.json"


def test_plugin_works_in_a_new_process_when_it_is_on_the_path(installed: Path) -> None:
    script = (
        "import sys; sys.path.append(sys.argv[1]); from vlexport.cli.main import main\n"
        "code = main(['targets', 'numpy'])\n"
        "assert 'torch' not in sys.modules, 'a target is listed without torch'\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "[vlexport-toy 1.0]" in done.stdout
