"""bisect names the pass and the match, the lowered pass, the lowering, or that nothing differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

import vlexport
from tests.harness import one_thread, randomize
from tests.passes.broken import with_tensor
from tests.stages.planted import BODIES, FAULTS, PLACE, RAISES, Bodies, offer
from tests.targets.onnx_passes import Replacing
from vlexport.cli.bisect import _following
from vlexport.cli.main import main
from vlexport.core.config import BuildConfig
from vlexport.core.errors import UsageError
from vlexport.core.finding import Finding
from vlexport.frontends.sources import Sources, open_sources
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE
from vlexport.stages.bisect import bisect
from vlexport.targets.onnxruntime import OnnxRuntimeTarget


@pytest.fixture(scope="module", autouse=True)
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("plugin")
    offer(folder)
    sys.path.insert(0, str(folder))
    with one_thread():
        yield
    sys.path.remove(str(folder))
    sys.modules.pop("planted_plugin", None)


@pytest.fixture(scope="module")
def saved(model: Path) -> Sources:
    """Opened once; not to be altered."""
    return open_sources(BuildConfig(model=str(model)))


@pytest.fixture
def opened(saved: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bisection opens a copy with weights of its own, for a broken pass may write into them."""

    def copied(config: BuildConfig) -> Sources:
        assert saved.only is not None
        program = saved.only.program.copy()
        program.tensors = {name: tensor.clone() for name, tensor in program.tensors.items()}
        return replace(saved, components={"main": replace(saved.only, program=program)})

    monkeypatch.setattr("vlexport.stages.bisect.open_sources", copied)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    vlexport.save(randomize(Bodies()), path, inputs=torch.randn(1, 3, 8, 8))
    return path


def config(model: Path, *passes: str, **more: Any) -> BuildConfig:
    return BuildConfig(model=str(model), passes=passes, threads=1, **more)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("name", FAULTS)
def test_pass_and_match_are_named_when_a_broken_pass_is_planted(name: str, model: Path) -> None:
    found = bisect(config(model, name))
    assert (found.kind, found.culprit, found.distribution) == ("pass", name, "planted 2.1")
    assert found.passes[found.position - 1] == name
    assert found.match is not None, found
    assert PLACE in found.node, found.node
    assert ".py:" in found.node
    assert 1 <= found.match <= found.matches
    if name not in ("cut-further", "edit-weight"):
        assert (found.match, found.matches) == (2, BODIES), "of three matches the second is guilty"
    if name not in ("edit-weight", "mistake-size"):  # those never come to a value
        assert found.before is not None
        assert found.after is not None
        assert found.before.value <= 1e-5 < found.after.value
        assert found.after.output in ("logits", "doubled")
        assert found.change == "broken"
    assert found.reason


@pytest.mark.usefixtures("opened")
def test_match_that_raises_is_named_when_the_pass_does_not_come_to_its_end(model: Path) -> None:
    found = bisect(config(model, RAISES))
    assert (found.culprit, found.match) == (RAISES, 2)
    assert PLACE in found.node
    assert "division by zero" in found.reason
    assert (found.before, found.after) == (None, None)


@pytest.mark.usefixtures("opened")
def test_guilty_pass_is_named_when_others_stand_around_it(model: Path) -> None:
    found = bisect(config(model, "swap-operands", "drop-bias"))
    assert found.culprit == "swap-operands", "the first that differs"
    assert found.agreed == ()
    assert found.passes.index("swap-operands") < found.passes.index("drop-bias")


def test_nothing_is_blamed_when_passes_and_artifact_agree(model_file: Path) -> None:
    found = bisect(config(model_file), bound=3.0)
    assert (found.kind, found.culprit) == ("nothing", "")
    assert found.agreed[0].startswith(", ".join(CATALOGUE))
    assert found.agreed[-1].startswith("artifact (")
    assert found.notes == ("--bound is about approximate passes, and none ran",)


def test_lowering_is_blamed_when_the_artifact_differs_from_the_last_program(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = OnnxRuntimeTarget.lower

    def wrong(self: OnnxRuntimeTarget, program: Program, folder: Path, brief: Any) -> Any:
        program = program.copy()
        for node in program.calls("aten.linear.default"):
            program.replace(node, with_tensor(program, node, 1, lambda t: t * 1.01))
        return lower(self, program, folder, brief)

    monkeypatch.setattr(OnnxRuntimeTarget, "lower", wrong)
    monkeypatch.setattr(OnnxRuntimeTarget, "tunables", lambda self, options: {"allow_spinning": ("false",)})
    found = bisect(config(model_file))
    assert (found.kind, found.culprit, found.cure) == ("lowering", "", "")
    assert found.after is not None
    assert found.after.value > 1e-4
    assert found.after.output == "output"
    assert found.agreed[0].startswith(", ".join(CATALOGUE)), "the passes agree"


def test_lowered_pass_is_blamed_when_it_breaks_the_onnx_graph(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(old: onnx_ir.Node) -> onnx_ir.Node:
        return onnx_ir.node("Mul", [old.inputs[0], old.inputs[0]])

    monkeypatch.setattr(OnnxRuntimeTarget, "lowered_passes", lambda self, options: [Replacing("relu", broken)])
    found = bisect(config(model_file))
    assert (found.kind, found.culprit, found.match, found.matches) == ("lowered pass", "break-lowered", 1, 1)
    assert "Relu" in found.node
    assert found.before is not None
    assert found.before.value == 0.0
    assert found.passes[-1] == "break-lowered"


@pytest.mark.usefixtures("opened")
def test_approximate_pass_is_judged_by_its_statistic_when_a_bound_is_given(model: Path) -> None:
    found = bisect(config(model, precision="fp16"), bound=100.0)
    assert (found.culprit, found.effect, found.statistic, found.bound) == ("cast-floats", "approximate", "sqnr_db", 100)
    assert found.match is not None
    assert found.before is not None
    assert found.after is not None
    assert found.after.value < 100.0 <= found.before.value
    assert "typed fp16" in found.change


def test_several_targets_are_refused_when_asked_for(model: Path) -> None:
    with pytest.raises(UsageError) as error:
        bisect(config(model, target="onnxruntime,tensorrt"))
    assert error.value.code == "VLX0701"
    assert error.value.hint == "as --target onnxruntime"


def test_command_says_who_where_and_what_next_when_a_pass_is_guilty(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bisect", str(model), "--pass", "drop-bias", "--pass", "swap-outputs"]) == 0
    out = capfd.readouterr().out
    assert "Blame    drop-bias of planted 2.1 (normalize, exact)" in out
    assert f"Match    2 of {BODIES}: aten.conv2d in {PLACE}.stem" in out
    assert f"Next     vlexport build {model} --pass swap-outputs" in out
    assert list(tmp_path.iterdir()) == []


def test_recipe_of_a_bundle_is_followed_and_its_artifact_compared_when_given(
    model_file: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", str(model_file), "--recipe", "bundle", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["ok"], found["kind"], found["component"]) == (True, "nothing", "")
    assert found["agreed"][-1].startswith("the bundle's artifact (")
    assert bundle.name == "bundle"
    assert found["next"] == f"vlexport bisect {model_file} --recipe bundle/recipe.toml --data DATA"


def test_gates_of_a_recipe_are_left_to_builds_that_measure(
    model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('gate = ["top1>=90", "p50_ms<=5"]\nmax_drop = 0.5\n')
    assert main(["bisect", str(model_file), "--recipe", str(recipe), "--json"]) == 0
    assert main(["inspect", str(model_file), "--recipe", str(recipe), "--target", "onnxruntime"]) == 0
    assert "VLX0804" not in capfd.readouterr().out


def test_next_command_has_other_probes_when_nothing_differs_on_samples() -> None:
    """Never the command that has just been run."""
    given = {"model": "model.pt", "target": ["onnxruntime"], "data": "photos", "calib": None, "seed": None}
    nothing = Finding(kind="nothing")
    assert _following(nothing, given, 0) == "vlexport bisect model.pt --target onnxruntime --data photos --seed 1"
    assert _following(nothing, {**given, "data": None}, 0).endswith("--target onnxruntime --data DATA")


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["nowhere.pt"], "VLX0101", 1),
        (["--target", "onnxruntim"], "VLX0701", 2),
        (["--recipe", "."], "VLX0601", 1),
        (["--pass", "drop-bia"], "VLX0703", 2),
    ],
)
def test_wrong_input_is_refused_in_words_when_given(
    arguments: list[str], code: str, exit_code: int, model_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments if arguments == ["nowhere.pt"] else [str(model_file), *arguments]
    assert main(["bisect", *given]) == exit_code
    assert f"error {code}: " in capfd.readouterr().err
