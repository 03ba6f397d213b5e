"""Passes over the lowered graph are listed, described and set as all others; what is not asked for leaves no trace."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from tests.targets.onnx_passes import UNFUSED
from vlexport.core.bundle import read_bundle

LOWERED = {
    "simplify-onnx": "simplify",
    "optimize-onnx": "optimize",
    "gather-rows": "gather_rows",
    "part-norms": "part_norms",
    "fuse-qattention": "fuse_qattention",
    "fuse-attention": "fuse_attention",
    "fuse-biased-attention": "fuse_biased_attention",
    "fuse-multi-head-attention": "fuse_multi_head_attention",
    "fuse-dynamic-linear": "fuse_dynamic_linear",
}
SET_UNFUSED = tuple(word for option, value in UNFUSED.items() for word in ("--set", f"{option}={value}"))


def _turned_on(option: str) -> str:
    switch = f"--set onnxruntime.{option}=true"
    asked = option in ("simplify", "optimize")
    return f"run with {switch}" if asked else f"run as onnxruntime decides; {switch} or =false overrules"


def test_lowered_passes_are_listed_last_with_what_turns_them_on(cli: Any) -> None:
    code, out, _ = cli("passes")
    lines = out.splitlines()
    assert code == 0
    assert [line.partition(" ")[0] for line in lines[-len(LOWERED) :]] == list(LOWERED)
    for line, option in zip(lines[-len(LOWERED) :], LOWERED.values(), strict=True):
        assert line.endswith(_turned_on(option))
    rows = {row["name"]: row for row in json.loads(cli("passes", "--json")[1])["passes"]}
    assert rows["simplify-onnx"]["turned_on_by"] == ["onnxruntime.simplify=true"]
    assert "turned_on_by" not in rows["canonicalize"]


@pytest.mark.parametrize(("name", "option"), [("simplify-onnx", "timeout_s"), ("optimize-onnx", "input_limit")])
def test_lowered_pass_is_described_when_named(name: str, option: str, cli: Any) -> None:
    code, out, _ = cli("passes", name)
    assert code == 0
    assert out.startswith(f"{name}: ")
    assert _turned_on(LOWERED[name]) in out.splitlines()
    assert f"--set {name}.{option}=…" in out
    found = json.loads(cli("passes", name, "--json")[1])
    assert (found["name"], found["stage"]) == (name, "legalize")
    assert option in [each["name"] for each in found["options"]]


def test_nearest_name_is_offered_when_a_lowered_pass_is_misspelt(cli: Any, here: Path) -> None:
    cli.refused(2, "VLX0703", "passes", "simplify-onx", said="did you mean 'simplify-onnx'?")
    said = "did you mean 'optimize-onnx'?"
    cli.refused(2, "VLX0703", "build", "model.pt", "--set", "optimise-onnx.input_limit=1", said=said)


def test_option_of_a_lowered_pass_is_refused_when_it_does_not_run_or_has_none(cli: Any, here: Path) -> None:
    build = ("build", "model.pt", "--set", "optimize-onnx.input_limit=1")
    err = cli.refused(2, "VLX0703", *build, said="pass 'optimize-onnx' is not run")
    assert "add --set onnxruntime.optimize=true" in err
    on = ("build", "model.pt", "--set", "onnxruntime.optimize=true")
    err = cli.refused(2, "VLX0703", *on, "--set", "optimize-onnx.inputlimit=1", said="did you mean 'input_limit'?")
    assert "options of optimize-onnx: input_limit, output_limit" in err
    cli.refused(2, "VLX0703", *on, "--set", "optimize-onnx.input_limit=many", said="optimize-onnx.input_limit")


def test_option_reaches_the_lowered_pass_and_the_recipe_when_set(cli: Any, here: Path) -> None:
    options = ("--set", "onnxruntime.optimize=true", "--set", "optimize-onnx.input_limit=7", *SET_UNFUSED)
    assert cli("build", "model.pt", "-o", "made", "--no-profile", *options)[0] == 0
    record = read_bundle(here / "made").main.passes[-1]
    assert (record.name, record.options["input_limit"]) == ("optimize-onnx", 7)
    assert cli("build", "model.pt", "-o", "again", "--no-profile", "--recipe", "made/recipe.toml")[0] == 0
    assert read_bundle(here / "again").digest == read_bundle(here / "made").digest


def test_plan_names_lowered_passes_when_they_are_asked_for(cli: Any, here: Path) -> None:
    code, out, _ = cli("build", "model.pt", "--plan", "--set", "onnxruntime.simplify=true")
    assert code == 0
    assert "Pass     simplify-onnx: on the lowered graph" in out
    assert "optimize-onnx" not in out
    assert json.loads(cli("build", "model.pt", "--plan", "--json", *SET_UNFUSED)[1])["lowered_passes"] == []
    code, out, _ = cli("build", "model.pt", "--plan", "--set", "optimize-onnx.input_limit=1")
    assert (code, "pass 'optimize-onnx' is not run" in out) == (2, True)


def test_tools_name_the_optimizer_when_and_only_when_it_took_part(cli: Any, here: Path, built: Path) -> None:
    pytest.importorskip("onnxsim", reason="there is no onnxsim for Python 3.10")
    assert "onnxsim" not in read_bundle(built).tools
    assert cli("build", "model.pt", "-o", "made", "--no-profile", "--set", "onnxruntime.simplify=true")[0] == 0
    assert read_bundle(here / "made").tools["onnxsim"] == importlib.metadata.version("onnxsim")
