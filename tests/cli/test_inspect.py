"""inspect and explain: what they show of a model, a bundle and an error, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlexport
from tests.harness import one_thread
from vlexport.core.bundle import read_bundle
from vlexport.core.errors import CODES
from vlexport.core.explanations import code_in, explanations


class Hostile(nn.Module):
    """Something for every target to refuse, and an operator that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.windows, self.order, self.far, self.head = Windows(), Order(), Far(), nn.Linear(6, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.far(self.order(self.windows(image))))


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(x.shape[0], 2, 2, 2, 3, 6).permute(0, 2, 4, 1, 3, 5) + 1).reshape(x.shape[0], 24, 6)


class Order(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=-1, stable=True)[0]


class Far(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.erfinv(torch.tanh(x))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "hostile.pt"
    torch.manual_seed(0)
    with one_thread():
        vlexport.save(Hostile().eval(), path, inputs=torch.randn(1, 4, 6, 6), dynamic=False)
    return path


# -- models ------------------------------------------------------------------------------------------------------------


def test_model_is_shown_with_its_face_and_cost_when_inspected(here: Path, cli: Any) -> None:
    code, out, _ = cli("inspect", "model.pt")
    assert code == 0
    assert "Input    image: float32 batch×3×8×8; resize=8:bilinear,crop=8,scale=1/255" in out
    assert "Output   output: float32 batch×3" in out
    assert "Dim      batch: 1 to any size, tuned for 1" in out
    assert "Labels   red, green, blue" in out
    assert "Cost     585 MACs at batch=1, 36 parameters, 144 B" in out
    assert "conv2d.default ×1" in out
    assert out.splitlines()[-1].startswith("Next     vlexport inspect model.pt --target all")
    found = json.loads(cli("inspect", "model.pt", "--depth", "3", "--json")[1])
    part = found["components"]["main"]
    assert (found["kind"], found["support"], part["opaque"]) == ("model", [], [])
    assert part["cost"]["macs"] == sum(row["macs"] for row in part["modules"]) == 585
    assert sum(part["operators"].values()) == sum(row["calls"] for row in part["modules"]) == 5


def test_every_refusal_is_named_with_its_place_when_targets_are_asked(
    hostile: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("inspect", hostile, "--target", "onnxruntime,coreml", "--json")
    found = json.loads(out)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    support = {each["target"]: each for each in found["support"]}
    assert (support["coreml"]["device_profile"], support["coreml"]["precision"]) == ("ios17", "fp16")
    refused = {
        name: {(p["code"], p["where"].split(" (")[0]) for p in each["problems"]} for name, each in support.items()
    }
    far = ("VLX0503", "aten.special_erfinv in far")
    assert refused["onnxruntime"] == {far}  # the passes have a top-k for the stable sort
    assert {far, ("VLX0503", "aten.add.Tensor in windows")} <= refused["coreml"]
    assert all("test_inspect.py:" in p["where"] for each in support.values() for p in each["problems"])
    (opaque,) = found["components"]["main"]["opaque"]
    assert opaque["operator"] == "aten.special_erfinv.default"
    assert opaque["where"].startswith("aten.special_erfinv in far (test_inspect.py:")


def test_device_is_looked_at_when_named(here: Path, cli: Any) -> None:
    code, out, _ = cli("inspect", "model.pt", "--target", "coreml", "--for", "ios18", "--precision", "fp32")
    assert code == 0
    assert "Target   coreml for ios18, fp32: nothing is known to stop it; " in out
    assert "Verdict  nothing that is known would stop it on ios18" in out


def test_only_its_targets_are_asked_when_a_device_is_named(hostile: Path, here: Path, cli: Any) -> None:
    found = json.loads(cli("inspect", "model.pt", "--for", "jetson-orin-jp6", "--json")[1])
    assert [(each["target"], each["device_profile"]) for each in found["support"]] == [("tensorrt", "jetson-orin-jp6")]
    assert found["device"]["facts"]["tensorrt"]["value"] == "10.3"
    out = cli("inspect", hostile, "--for", "ios17")[1]
    assert "Device   ios17: iPhone or iPad with iOS 17, Mac with macOS 14; deployment-target iOS17" in out
    problems = [line for line in out.splitlines() if line.startswith("         VLX")]
    assert f"Verdict  {len(problems)} problems by coreml would stop it on ios17" in out


def test_what_this_machine_lacks_stops_no_device(here: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = "coremltools not installed: pip install 'vlexport[build,coreml]'"
    monkeypatch.setattr("vlexport.targets.coreml.CoreMLTarget.missing_tools", lambda self, brief: lacks)
    out = cli("inspect", "model.pt", "--for", "ios17")[1]
    assert out.count("pip install") == 1
    assert "VLX0501: coreml cannot be built here: coremltools not installed; pip install 'vlexport" in out
    assert "Verdict  nothing that is known would stop it on ios17" in out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "said"),
    [
        (["nowhere.pt"], 1, "VLX0101", "does not exist"),
        (["model.pt", "--target", "coremll"], 2, "VLX0701", "did you mean 'coreml'"),
        (["model.pt", "--for", "ios"], 2, "VLX0703", "no device profile 'ios'"),
        (["model.pt", "--precision", "fp33", "--target", "all"], 2, "VLX0703", "did you mean 'fp32'"),
        (["model.pt", "--depth", "0"], 2, "VLX0703", "--depth"),
    ],
)
def test_model_is_refused_in_words_when_asked_wrongly(
    arguments: list[str], exit_code: int, code: str, said: str, here: Path, cli: Any
) -> None:
    cli.refused(exit_code, code, "inspect", *arguments, said=said)


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_bundle_is_shown_with_passes_files_and_tools_when_inspected(bundle: Path, cli: Any) -> None:
    code, out, _ = cli("inspect", "bundle")
    assert code == 0
    held = read_bundle(bundle)
    for path in held.files:
        assert f"File     {path}  " in out
    for name, version in held.tools.items():
        assert f"{name} {version}" in out
    assert "Pass     reparameterize 1 change; largest change " in out
    assert "Golden   golden/main/outputs.npz: max|a−b| / max|b| within 0.0001" in out
    assert f"Needs    opset: {held.compatibility['opset']}" in out
    assert f"Intact   all {len(held.files)} files fit their hashes" in out
    assert "Report   local-1 (" in out
    found = json.loads(cli("inspect", "bundle", "--json")[1])
    assert (found["kind"], found["altered"], found["unreadable"]) == ("bundle", "", [])
    assert found["bundle"]["digest"] == held.digest
    assert [each["name"] for each in found["measured"]] == ["local-1"]


def test_altered_bundle_is_shown_and_said_to_be_when_inspected(bundle: Path, cli: Any) -> None:
    (bundle / "artifact" / "main.onnx").write_bytes(b"x")
    (bundle / "measured" / "local-1" / "report.json").write_text("{", encoding="utf-8")
    code, out, _ = cli("inspect", "bundle")
    assert code == 0
    assert "Intact   the bundle was altered: artifact/main.onnx was altered" in out
    assert "Report   local-1 cannot be read" in out


def test_bundle_is_refused_when_it_is_none_or_options_are_given(bundle: Path, cli: Any) -> None:
    cli.refused(2, "VLX0703", "inspect", "bundle", "--target", "coreml", said="options are for models")
    several = bundle.parent / "several"
    several.mkdir()
    shutil.copytree(bundle, several / "onnxruntime")
    (several / "compare.json").write_text("{}", encoding="utf-8")
    err = cli.refused(1, "VLX0601", "inspect", "several")
    assert "several/onnxruntime" in err


# -- explain -----------------------------------------------------------------------------------------------------------


def test_passes_are_explained_with_places_when_a_bundle_is_named(bundle: Path, cli: Any) -> None:
    code, out, _ = cli("explain", "bundle", "--pass", "reparameterize")
    assert code == 0
    assert out.splitlines()[1:] == [
        "         batch norm folded into conv2d ×1 (1 fewer call, 9 fewer parameters)",
        "           in conv",
        "           in norm",
    ]
    whole = cli("explain", "bundle")[1].splitlines()
    assert "           in conv, norm" in whole
    assert whole[-2].startswith("Idle     nothing to do: ")
    assert "         batch norm folded into conv2d ×1 (1 fewer call, 9 fewer parameters)" in whole
    every = json.loads(cli("explain", "bundle", "--json")[1])["components"]["main"]
    assert [each["name"] for each in every] == [each.name for each in read_bundle(bundle).main.passes]
    cli.refused(2, "VLX0703", "explain", "bundle", "--pass", "reparametrize", said="did you mean 'reparameterize'")


def test_near_miss_is_explained_with_node_and_reason_when_there_is_one(bundle: Path, cli: Any) -> None:
    held = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    miss = {"pattern": "conv → batch_norm", "node": "aten.batch_norm in norm (net.py:3)", "reason": "read by 2 others"}
    other = {"pattern": "conv → batch_norm", "node": "aten.batch_norm in one", "reason": "another reason"}
    misses = [other, *({**miss, "node": f"aten.batch_norm in norm{n} (net.py:3)"} for n in range(5))]
    held["components"]["main"]["passes"][0]["near_misses"] = misses
    from vlexport.core.bundle import bundle_text
    from vlexport.core.bundle_schema import Bundle, digest_of

    changed = Bundle.model_validate(held)
    changed = changed.model_copy(update={"digest": digest_of(changed)})
    (bundle / "bundle.json").write_text(bundle_text(changed), encoding="utf-8")
    _, out, _ = cli("explain", "bundle")
    lines = out.splitlines()
    at = lines.index("         not conv → batch_norm ×5: read by 2 others")
    places = [f"aten.batch_norm in norm{n} (net.py:3)" for n in range(5)]
    assert lines[at + 1] == f"           at {', '.join(places[:3])} and 2 more"
    assert lines[at + 2] == "         not conv → batch_norm ×1: another reason"
    assert lines[-1] == "Next     vlexport explain bundle --pass NAME   (every place)"
    name = held["components"]["main"]["passes"][0]["name"]
    shown = cli("explain", "bundle", "--pass", name)[1].splitlines()
    assert [line.removeprefix("           at ") for line in shown if " at aten" in line] == [*places, other["node"]]


@pytest.mark.parametrize("code", CODES)
def test_code_is_explained_in_full_when_it_exists(code: str) -> None:
    found = explanations()[code]
    assert found.kind == CODES[code]
    for text in (found.cause, found.example, found.fix):
        assert len(text) > 8
    assert found.cause.endswith(".")
    assert found.fix.endswith(".")


def test_flags_in_explanations_exist_when_a_user_types_them() -> None:
    import typer.main

    from vlexport.cli.main import app

    group: Any = typer.main.get_command(app)
    known = {
        each for command in group.commands.values() for p in command.params for each in (*p.opts, *p.secondary_opts)
    }
    said = " ".join(f"{each.cause} {each.example} {each.fix}" for each in explanations().values())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", said)) <= known
    named = set(re.findall(r"`vlexport ([a-z]+)", said)) - {"broke"}
    assert named <= set(group.commands)


def test_no_code_is_explained_that_does_not_exist() -> None:
    from importlib import resources

    text = resources.files("vlexport.core").joinpath("explanations.json").read_text(encoding="utf-8")
    assert sorted(json.loads(text)) == sorted(CODES)


def test_error_is_explained_when_its_code_is_named_in_any_spelling(cli: Any) -> None:
    code, out, _ = cli("explain", "vlx503")
    assert code == 0
    assert [line[:10].strip() for line in out.splitlines()] == ["VLX0503", "Cause", "Example", "Do"]
    assert json.loads(cli("explain", "VLX0503", "--json")[1])["kind"] == CODES["VLX0503"]
    assert (code_in("vlx-0101"), code_in("model.bundle"), code_in("VLX12x")) == ("VLX0101", "", "VLX12X")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["VLX0519"], "VLX0703", "did you mean 'VLX05"),
        (["VLX0503x"], "VLX0703", "did you mean 'VLX0503'"),
        (["nothing"], "VLX0703", "no error code, and no bundle"),
        (["VLX0503", "--pass", "canonicalize"], "VLX0703", "--pass goes with a bundle"),
    ],
)
def test_explanation_is_refused_in_words_when_there_is_none(
    arguments: list[str], code: str, said: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.refused(2, code, "explain", *arguments, said=said)
