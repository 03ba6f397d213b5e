"""One build for several targets: what is shared is done once, and no target spoils another's bundle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlexport
from tests.stages.conftest import Make
from vlexport.cli.main import main
from vlexport.core.bundle import COMPARE_FILE, read_bundle
from vlexport.core.comparison import Comparison
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, GateError, UsageError
from vlexport.stages import prepare as prepare_module
from vlexport.stages.build import build
from vlexport.stages.build_each import Built, build_each
from vlexport.targets.coreml import CoreMLTarget
from vlexport.targets.onnxruntime import OnnxRuntimeTarget

SMALL: dict[str, str] = {"tensorrt.engine": "off"}
"""Compiling an engine is another test's matter."""


def config(model: Path, output: Path, target: str, **values: Any) -> BuildConfig:
    options = {**(SMALL if "tensorrt" in target else {}), **values.pop("options", {})}
    fixed = {"model": str(model), "output": str(output), "target": target, "options": options, "threads": 1}
    return BuildConfig(**{"profile": False, **fixed, **values})


def files_of(folder: Path) -> dict[str, bytes]:
    """Path → bytes of a bundle, without what was measured."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("measured/")}


def comparison_of(folder: Path) -> Comparison:
    return Comparison.model_validate_json((folder / COMPARE_FILE).read_text())


@pytest.fixture(scope="module")
def two(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """Not to be written to: bundles for two targets, accuracy measured, latency not."""
    place = tmp_path_factory.mktemp("two")
    data = Make.npz(place / "data.npz", [0, 1, 2, 0])
    return place, build_each(config(model_file, place / "out", "onnxruntime,tensorrt", data=data))


def test_capture_and_shared_passes_run_once_when_there_are_two_targets(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[str] = Counter()
    for name in ("open_sources", "optimize_component", "specialize_component", "open_dataset"):
        original = getattr(prepare_module, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counted[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(prepare_module, name, counting)
    build_each(config(model_file, tmp_path / "out", "onnxruntime,coreml", precision="fp32"))
    assert counted == {"open_sources": 1, "optimize_component": 1, "specialize_component": 2, "open_dataset": 2}


def test_bundle_is_that_of_a_single_build_byte_for_byte(
    two: tuple[Path, Built], model_file: Path, tmp_path: Path
) -> None:
    for target in ("onnxruntime", "tensorrt"):
        build(config(model_file, tmp_path / target, target, options=SMALL))
        assert files_of(tmp_path / target) == files_of(two[0] / "out" / target)


def test_comparison_holds_what_each_bundle_says(two: tuple[Path, Built]) -> None:
    place, made = two
    found = comparison_of(place / "out")
    assert found == made.comparison
    assert [row.target for row in found.rows] == ["onnxruntime", "tensorrt"]
    for row in found.rows:
        bundle = read_bundle(place / "out" / row.target)
        assert (row.digest, row.state, row.precision) == (bundle.digest, bundle.state, bundle.precision)
        assert row.accuracy is not None
        assert (row.accuracy.top1, row.accuracy.samples) == (100.0, 4)
        assert row.latency is None
        assert row.size_bytes == made.results[row.target].report.size_bytes
    assert [row.state for row in found.rows] == ["verified", "built"]


def test_refusing_target_spoils_nothing_when_lowering_fails(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *args: object) -> None:
        raise CapabilityError("VLX0503", "no such operator")

    monkeypatch.setattr(CoreMLTarget, "lower", refuse)
    made = build_each(config(model_file, tmp_path / "out", "coreml,onnxruntime"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [COMPARE_FILE, "onnxruntime"]
    assert vlexport.verify(tmp_path / "out" / "onnxruntime").errors
    first, second = made.comparison.rows
    assert (first.target, first.error, first.digest) == ("coreml", "VLX0503: no such operator", "")
    assert (second.target, second.error) == ("onnxruntime", "")


def test_target_that_wants_a_bound_refuses_alone_when_another_takes_any_size(tmp_path: Path) -> None:
    model = tmp_path / "free.pt"
    sizes = {"input": {0: ("batch", 1, 32), 2: ("height", 8, None)}}
    vlexport.save(torch.nn.AvgPool2d(2).eval(), model, inputs=torch.rand(1, 3, 16, 8), dynamic=sizes)
    made = build_each(config(model, tmp_path / "out", "onnxruntime,tensorrt"))
    assert list(made.results) == ["onnxruntime"]
    assert made.refused["tensorrt"].code == "VLX0706"
    with pytest.raises(UsageError, match="did you mean 'height'"):
        build_each(config(model, tmp_path / "none", "onnxruntime,tensorrt", dynamic=("heigth=8",)))
    assert not (tmp_path / "none").exists()


def test_nothing_is_written_when_all_refuse(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, *args: object) -> None:
        raise GateError("VLX0504", "not the same")

    for kind in (CoreMLTarget, OnnxRuntimeTarget):
        monkeypatch.setattr(kind, "lower", refuse)
    with pytest.raises(GateError, match="not the same"):
        build_each(config(model_file, tmp_path / "out", "onnxruntime,coreml"))
    with pytest.raises(CapabilityError) as error:
        build_each(config(model_file, tmp_path / "out", "onnxruntime,coreml", precision="bf16"))
    assert error.value.code == "VLX0502"
    assert list(tmp_path.iterdir()) == []


def test_folder_of_several_is_replaced_when_forced_and_only_then(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "tensorrt").mkdir(parents=True)
    (tmp_path / "out" / COMPARE_FILE).write_text("{}")
    asked = config(model_file, tmp_path / "out", "onnxruntime,tensorrt", precision="bf16")
    with pytest.raises(CapabilityError):  # refused for another reason: what stands there stays
        build_each(asked.model_copy(update={"force": True}))
    assert (tmp_path / "out" / COMPARE_FILE).read_text() == "{}"
    asked = config(model_file, tmp_path / "out", "onnxruntime,tensorrt", precision="fp32", gate=("size_mb<=1",))
    with pytest.raises(vlexport.VlexportError) as error:
        build_each(asked)
    assert error.value.code == "VLX0604"
    build_each(asked.model_copy(update={"force": True}))
    assert len(comparison_of(tmp_path / "out").rows) == 2
    (tmp_path / "out" / COMPARE_FILE).unlink()
    with pytest.raises(vlexport.VlexportError, match="is no bundle"):
        build_each(asked.model_copy(update={"force": True}))


def cli(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["build", *arguments])
    return code, capfd.readouterr().out


def test_device_profile_goes_to_the_target_that_fits(model_file: Path, tmp_path: Path) -> None:
    made = build_each(config(model_file, tmp_path / "out", "onnxruntime,coreml", device_profile="ios18"))
    assert [row.device_profile for row in made.comparison.rows] == ["this", "ios18"]
    assert made.results["coreml"].bundle.compatibility["deployment-target"] == "iOS18"
    assert "device_profile" not in (tmp_path / "out/onnxruntime/recipe.toml").read_text()
    with pytest.raises(UsageError, match="does not run on ios18"):
        build_each(config(model_file, tmp_path / "none", "onnxruntime,tensorrt", device_profile="ios18"))


def test_exit_code_is_four_when_verified_is_required_and_one_is_not(
    model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    given = (str(model_file), "--target", "onnxruntime,coreml", "--no-profile", "--precision", "fp32", "-o", out)
    code, shown = cli(capfd, *given, "--require", "verified")
    assert code == 4
    lines = shown.splitlines()
    assert lines[0].split()[:5] == ["target", "precision", "for", "size", "state"]
    assert lines[1].split()[:3] == ["onnxruntime", "fp32", "this"]
    assert "verified" in lines[1]
    assert "built" in lines[2]
    assert "not measured here" in lines[2]
    assert "Note     coreml: batch is fixed to 1" in shown
    assert lines[-1] == f"Built    {out}: onnxruntime, coreml; compare.json holds the table"
    code = main(["build", *given, "--force", "--json"])
    written = capfd.readouterr()
    found = json.loads(written.out)
    assert code == 0
    for name in ("onnxruntime", "coreml"):
        assert f"precision of {name}: fp32, asked for" in written.err
    assert set(found) >= {"output", "comparison", "targets", "refused"}
    assert found["refused"] == {}
    assert {name: each["state"] for name, each in found["targets"].items()} == {
        "onnxruntime": "verified", "coreml": "built",
    }  # fmt: skip
    assert all(Path(each["report_file"]).is_file() for each in found["targets"].values())
    assert main(["verify", out]) == 1
    assert "out/coreml" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("target", "gate", "profile"), [("coreml", "drop<=5", False), ("tensorrt", "p50_ms<=100", True)]
)
def test_gate_is_refused_before_any_work_when_it_cannot_be_judged_here(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, gate: str, profile: bool
) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(prepare_module, "open_sources", forbidden)
    data = Make.npz(tmp_path / "data.npz", [0, 1])
    with pytest.raises(CapabilityError) as error:
        build_each(config(model_file, tmp_path / "out", target, data=data, gate=(gate,), profile=profile))
    assert error.value.code == "VLX0803"
    assert gate in error.value.message


def test_plan_covers_every_target_when_all_are_named(
    model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown = cli(capfd, str(model_file), "--target", "all", "--plan", "--json", "-o", str(tmp_path / "out"))
    found = json.loads(shown)["targets"]
    assert (code, list(found)) == (0, ["onnxruntime", "tensorrt", "coreml"])
    assert "legalize-spelling" in [record["name"] for record in found["coreml"]["passes"]]
    data = Make.npz(tmp_path / "data.npz", [0, 1])
    code, shown = cli(
        capfd, str(model_file), "--target", "all", "--plan", "-o", str(tmp_path / "out"), "--data", data,
        "--gate", "drop<=1",
    )  # fmt: skip
    assert code == 4
    assert shown.count("VLX0803") == 1
    code, shown = cli(capfd, str(model_file), "--target", "all", "--plan", "--autotune", "-o", str(tmp_path / "out"))
    assert (code, shown.count("not searched")) == (0, 2)


def test_search_is_for_those_that_have_something_to_search(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(
        model_file, tmp_path / "out", "onnxruntime,coreml", autotune=True, profile=True, budget_minutes=1e-9,
    )  # fmt: skip
    made = build_each(asked)
    assert made.results["onnxruntime"].report.tuning is not None
    assert made.results["coreml"].report.tuning is None
    assert any(note.startswith("not searched") for note in made.results["coreml"].report.notes)
    assert files_of(tmp_path / "out/coreml")["recipe.toml"].count(b"autotune") == 0
    with pytest.raises(UsageError) as error:
        build_each(config(model_file, tmp_path / "none", "tensorrt,coreml", autotune=True, profile=True))
    assert error.value.code == "VLX0805"
    with pytest.raises(UsageError, match="--no-profile"):
        build_each(config(model_file, tmp_path / "none", "onnxruntime,coreml", autotune=True))


def test_option_of_a_pass_goes_to_the_targets_that_run_it(model_file: Path, tmp_path: Path) -> None:
    asked = {"cast-floats.min_sqnr_db": "30"}
    made = build_each(config(model_file, tmp_path / "out", "onnxruntime,coreml", options=asked))
    (record,) = [each for each in made.results["coreml"].bundle.main.passes if each.name == "cast-floats"]
    assert record.options["min_sqnr_db"] == 30
    assert b"cast-floats" not in files_of(tmp_path / "out/onnxruntime")["recipe.toml"]
    with pytest.raises(UsageError, match="is not run"):
        build_each(config(model_file, tmp_path / "none", "onnxruntime,coreml", precision="fp32", options=asked))
    with pytest.raises(UsageError, match="no pass or target 'nosuch'"):
        build_each(config(model_file, tmp_path / "none", "onnxruntime,coreml", options={"nosuch.a": "1"}))


def test_core_ml_bundle_gives_no_number_when_it_cannot_run_here(
    model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(config(model_file, tmp_path / "b", "coreml"))
    before = files_of(tmp_path)
    data = Make.npz(tmp_path / "data.npz", [0, 1])
    for command in (
        ["verify", str(tmp_path / "b")],
        ["validate", str(tmp_path / "b"), "--data", data],
        ["profile", str(tmp_path / "b"), "--against", "naive", "--reference", str(model_file)],
        ["run", str(tmp_path / "b"), data],
    ):
        assert main(command) == 4
        out, err = capfd.readouterr()
        assert out == ""
        assert "VLX0501" in err
        assert "here" in err
    assert {**files_of(tmp_path), "data.npz": b""} == {**before, "data.npz": b""}


def test_emulated_figures_say_whose_they_are(
    two: tuple[Path, Built], model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, made = two
    report = made.results["tensorrt"].report
    assert report.emulator.startswith("ONNX Runtime")
    assert made.results["onnxruntime"].report.emulator == ""
    bundle = str(place / "out" / "tensorrt")
    page = (place / "out/tensorrt/measured/local-1/report.html").read_text()
    assert "on the same graph, not by tensorrt itself" in page
    assert any("engine: none" in note for note in report.notes)
    assert main(["verify", bundle]) == 0
    assert "emulated: computed by ONNX Runtime" in capfd.readouterr().out
    code = main(["validate", bundle, "--data", Make.npz(tmp_path / "data.npz", [0, 1]), "--reference", str(model_file)])
    assert code == 0
    assert "emulated: computed by ONNX Runtime" in capfd.readouterr().out
    assert main(["profile", bundle]) == 4
    out, err = capfd.readouterr()
    assert (out, "VLX0803" in err) == ("", True)


def test_components_are_built_for_each_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    vlexport.save(torch.nn.Linear(4, 3).eval(), folder / "a.pt", inputs=torch.rand(2, 4))
    vlexport.save(torch.nn.Linear(3, 2).eval(), folder / "b.pt", inputs=torch.rand(2, 3))
    text = 'vlexport_components = 1\nedges = [["a.output", "b.input"]]\n'
    text += '[components.a]\nmodel = "a.pt"\n[components.b]\nmodel = "b.pt"\n'
    (folder / "components.toml").write_text(text)
    made = build_each(config(folder, tmp_path / "out", "onnxruntime,tensorrt", precision="fp32"))
    assert list(made.results) == ["onnxruntime", "tensorrt"]
    fixed = made.results["tensorrt"].bundle
    assert all(each.dims == {} for each in fixed.components.values())
    assert all(each.artifact.inputs[0].shape[0] == 1 for each in fixed.components.values())
    free = made.results["onnxruntime"].bundle
    assert all(list(each.dims) == ["batch"] for each in free.components.values())
    values = np.random.default_rng(0).random((1, 4), dtype=np.float32)
    name = fixed.main.artifact.inputs[0].name
    outputs = [vlexport.load(tmp_path / "out" / target).run({name: values}) for target in made.results]
    for key, value in outputs[0].items():
        np.testing.assert_allclose(outputs[1][key], value, atol=1e-5)  # two graphs, one runtime


def test_note_says_whose_golden_vectors_they_are_when_the_package_takes_images(
    model_file: Path, tmp_path: Path
) -> None:
    made = build(config(model_file, tmp_path / "a", "coreml", options={"coreml.inputs": "image"}))
    assert any("golden vectors: of the source program (image → output as arrays)" in n for n in made.report.notes)
    made = build(config(model_file, tmp_path / "b", "coreml", options={"coreml.classifier": "off"}))
    assert not any("golden vectors" in note for note in made.report.notes)
