"""Bundles of several components: a chained and an independent pair through build, verify, validate, run and profile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vlexport
from vlexport.cli.main import main
from vlexport.core.bundle import ARTIFACT_FOLDER, bundle_text, file_record, read_bundle
from vlexport.core.bundle_schema import Bundle, digest_of
from vlexport.core.config import BuildConfig
from vlexport.core.errors import VlexportError
from vlexport.core.progress import Silent
from vlexport.frontends.sources import open_sources
from vlexport.report.receipt import receipt
from vlexport.stages.naive import plain_export
from vlexport.stages.plan import plan
from vlexport.stages.profile import Measurable, Plan, measure_latency
from vlexport.stages.validate import ValidateConfig, validate
from vlexport.stages.whole_model import opt_inputs
from vlexport.targets import open_target

COLOURS = ("red", "green", "blue")
EDGES = 'edges = [["encoder.mean", "head.mean"], ["encoder.peak", "head.peak"]]\n'
TOML = "vlexport_components = 1\n{}[components.{}]\nmodel = '{}.pt'\n[components.{}]\nmodel = '{}.pt'\n"


class Encoder(nn.Module):
    """Two features of the same shape: their edges can be exchanged, and nothing but the numbers tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.conv.bias.fill_(0.1)
            self.norm.running_var.fill_(1.3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = torch.relu(self.norm(self.conv(image)))
        return {"mean": found.mean((2, 3)), "peak": found.amax((2, 3))}


class Head(nn.Module):
    """Scores by the mean alone, with a little of the peak."""

    def forward(self, mean: Tensor, peak: Tensor) -> Tensor:
        return 10 * mean + 0.01 * peak


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1)


def write_pair(folder: Path, first: str, second: str, edges: str) -> Path:
    """Saved components and the file that names them."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    spec = "resize=8,crop=8,scale=1/255"
    modules: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        "encoder": (Encoder(), torch.rand(2, 3, 8, 8, generator=generator), {"preprocess": spec}),
        "head": (Head(), tuple(torch.rand(2, 3, generator=generator) for _ in range(2)), {"labels": COLOURS}),
        "text": (Words(), torch.tensor([[1, 2, 3, 4]] * 2), {}),
    }
    for name in (first, second):
        module, inputs, more = modules[name]
        vlexport.save(module.eval(), folder / f"{name}.pt", inputs=inputs, **more)
    (folder / "components.toml").write_text(TOML.format(edges, first, first, second, second))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("chained") / "colours", "encoder", "head", EDGES)


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    """Not to be written to."""
    folder = model.parent / "made.bundle"
    vlexport.build(BuildConfig(model=str(model), output=str(folder), profile=False, threads=1))
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an image tower and a text tower without edges; not to be written to."""
    model = write_pair(tmp_path_factory.mktemp("towers") / "towers", "encoder", "text", "")
    vlexport.build(BuildConfig(model=str(model), output=str(model.parent / "b"), profile=False, threads=1))
    return model.parent / "b"


def samples(make: Any) -> str:
    return str(make.npz(Path("x.npz"), [0, 1, 2, 1, 0, 2, 2, 1]))


def redigested(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit ``bundle.json`` and give it the digest that fits."""
    values = json.loads((folder / "bundle.json").read_text())
    edit(values)
    changed = Bundle.model_validate(values)
    (folder / "bundle.json").write_text(bundle_text(changed.model_copy(update={"digest": digest_of(changed)})))


# A chained pair


def test_bundle_holds_each_component_and_the_whole_when_built(made: Path) -> None:
    found = read_bundle(made)
    assert list(found.components) == ["encoder", "head"]
    assert found.edges == (("encoder.mean", "head.mean"), ("encoder.peak", "head.peak"))
    assert (made / "artifact/encoder/main.onnx").is_file()
    assert (made / "artifact/head/main.onnx").is_file()
    golden = {path for path in found.files if path.startswith("golden/")}
    kinds = ("inputs.npz", "outputs.npz", "inputs-smallest.npz", "outputs-smallest.npz")
    assert golden == {f"golden/{name}/{kind}" for name in ("encoder", "head", "whole") for kind in kinds}
    signature = found.signature()
    assert [(spec.name, spec.shape) for spec in signature.inputs] == [("image", ("batch", 3, 8, 8))]
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [("output", ("batch", 3))]
    assert found.main.labels == COLOURS
    assert list(found.main.preprocess) == ["image"]
    folds = {r.name: len(r.changes) for r in found.main.passes if r.name.endswith("reparameterize")}
    assert folds == {"encoder.reparameterize": 1, "head.reparameterize": 0}
    costs = [each.cost.macs for each in found.components.values()]
    assert found.main.cost.macs == sum(costs) > 0


def test_bundle_verifies_validates_and_runs_when_chained(
    bundle: Path, model: Path, make: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "bundle"]) == 0
    said = capfd.readouterr().out
    assert all(f"{name} " in said for name in ("encoder", "head", "whole"))
    report = validate(ValidateConfig(bundle, samples(make), reference=str(model)))
    assert report.accuracy is not None
    assert report.accuracy.top1 == 100
    assert report.fidelity["output"].relative_error < 1e-5
    make.photo(Path("photo.png"), 2)
    assert main(["run", "bundle", "photo.png", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["results"][0]["classes"][0]["label"] == "blue"


def test_bundle_is_loaded_without_torch_when_chained(bundle: Path, make: Any) -> None:
    make.photo(Path("photo.png"), 1)
    code = (
        "import sys; sys.modules['torch'] = None; import vlexport\n"
        "print(vlexport.verify('bundle').errors.keys(), vlexport.load('bundle').classify('photo.png')[0][0])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "dict_keys(['encoder', 'head', 'whole']) green\n", found.stderr


def test_outputs_are_those_of_the_modules_when_the_batch_is_new(made: Path) -> None:
    image = np.random.default_rng(0).random((5, 3, 8, 8), np.float32)
    with torch.no_grad():
        expected = Head()(**Encoder().eval()(torch.from_numpy(image))).numpy()
    with vlexport.load(made) as loaded:
        found = loaded.run({"image": image})
    assert list(found) == ["output"]
    # fp32 kernels of another library, three layers deep
    np.testing.assert_allclose(found["output"], expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("digest", ["left", "renewed"])
def test_verify_fails_when_two_edges_are_exchanged(
    digest: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = [["encoder.peak", "head.mean"], ["encoder.mean", "head.peak"]]
    if digest == "renewed":
        redigested(bundle, lambda values: values.update(edges=swapped))
    else:
        values = json.loads((bundle / "bundle.json").read_text())
        (bundle / "bundle.json").write_text(json.dumps({**values, "edges": swapped}))
    assert main(["verify", "bundle"]) == 3
    said = capsys.readouterr().err
    assert ("VLX0606" in said and "the whole, output" in said) if digest == "renewed" else "VLX0602" in said


def test_verify_names_the_component_when_its_vectors_differ(bundle: Path) -> None:
    def exchange(values: dict[str, Any]) -> None:
        golden = values["components"]["encoder"]["golden"]
        golden["outputs"] = "golden/encoder/outputs-wrong.npz"
        del values["components"]["encoder"]["golden_smallest"]

    with np.load(bundle / "golden/encoder/outputs.npz") as right:
        np.savez(bundle / "golden/encoder/outputs-wrong.npz", mean=right["mean"] + 1, peak=right["peak"])
    redigested(bundle, exchange)
    with pytest.raises(VlexportError) as caught:
        vlexport.verify(bundle)
    assert caught.value.code == "VLX0602"  # not recorded
    record = file_record(bundle / "golden/encoder/outputs-wrong.npz").model_dump()
    redigested(bundle, lambda values: values["files"].update({"golden/encoder/outputs-wrong.npz": record}))
    with pytest.raises(VlexportError) as caught:
        vlexport.verify(bundle)
    assert (caught.value.code, caught.value.where) == ("VLX0606", "component encoder, mean")


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "edge to nowhere": ("VLX1102", lambda v: v.update(edges=[["encoder.mean", "head.means"]])),
    "circle": ("VLX1102", lambda v: v["edges"].append(["head.output", "encoder.image"])),
    "name": ("VLX0605", lambda v: v["components"].update({"../x": v["components"].pop("head")})),
    "odd name": ("VLX1102", lambda v: v["components"].update({"a b": v["components"].pop("head")})),
    "no vectors of the whole": ("VLX0601", lambda v: v.pop("golden")),
    "vectors elsewhere": ("VLX0605", lambda v: v["golden"].update(inputs="../x.npz")),
    "path of a component": ("VLX0605", lambda v: v["components"]["head"]["artifact"].update(path="../../x")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_bundle_is_refused_when_its_components_are_hostile(kind: str, bundle: Path) -> None:
    code, edit = HOSTILE[kind]
    redigested(bundle, edit)
    with pytest.raises(VlexportError) as caught:
        vlexport.load(bundle)
    assert (caught.value.code, caught.value.exit_code) == (code, 1)


def test_recipe_replays_the_bundle_when_components_lie_elsewhere(made: Path, model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    arguments = ["build", str(moved / "components.toml"), "--recipe", str(made / "recipe.toml")]
    assert main([*arguments, "--no-profile", "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/bundle.json").read_bytes() == (made / "bundle.json").read_bytes()


def test_latency_covers_all_components_when_timed_against_naive(made: Path, model: Path, tmp_path: Path) -> None:
    target, sources = open_target("onnxruntime"), open_sources(BuildConfig(model=str(model)))
    naive = plain_export(target, sources, tmp_path, cache=None, reporter=Silent())
    ours = Measurable("artifact", target, made / ARTIFACT_FOLDER, read_bundle(made).main.artifact)
    inputs = opt_inputs(sources, 0)
    expected = sources.run(inputs)
    for each in (naive, ours):
        with each.target.open(each.folder, each.artifact, threads=1) as session:
            np.testing.assert_allclose(session.run(inputs)["output"], expected["output"], rtol=1e-4)
    quick = Plan(rounds=1, block_seconds=0.01, limit_seconds=5)
    found = measure_latency(ours, inputs, baseline=naive, plan=quick, threads=1, reporter=Silent(), operators=True)
    assert found.p50_ms > 0
    before, after = ({each.operator: each for each in t} for t in (found.baseline_operators, found.operators))
    assert {"Conv", "Mul"} <= before.keys() & after.keys(), "of both components"
    assert [each.ms for each in found.operators] == sorted((each.ms for each in found.operators), reverse=True)
    assert found.baseline_size_bytes == sum(f.stat().st_size for f in tmp_path.rglob("*.onnx"))


def test_calibration_sample_reaches_the_second_component_when_given(
    model: Path, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = BuildConfig(
        model=str(model), output="b", calib=samples(make), data=samples(make), max_drop=1.0, profile=False, threads=1,
        dump="dump",
    )  # fmt: skip
    found = vlexport.build(config)
    changed = [record for record in found.bundle.components["encoder"].passes if record.changes]
    assert {record.gate.probes for record in changed} == {4}
    assert found.report.accuracy is not None
    assert found.report.accuracy.drop == 0
    assert sorted(path.name for path in Path("dump").iterdir()) == ["encoder", "head"]
    assert any("are calibration samples as well" in note for note in found.report.notes)
    lines = receipt(found.bundle, found.report, "b")
    assert "2 components (encoder, head)" in lines[0]
    assert lines[2] == "Passes   encoder.reparameterize 1 change; all others nothing to do"
    page = Path("b/measured/local-1/report.html").read_text()
    assert "Components: encoder, head; encoder.mean → head.mean, encoder.peak → head.peak." in page


def test_plan_covers_all_components_when_nothing_is_written(model: Path, tmp_path: Path) -> None:
    found = plan(BuildConfig(model=str(model), output=str(tmp_path / "b")))
    assert not found.problems
    assert {record.name.partition(".")[0] for record in found.passes} == {"encoder", "head"}
    assert found.calls_after < found.calls_before
    assert not (tmp_path / "b").exists()


def test_bundle_is_as_of_a_lone_model_when_one_component_is_named(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "encoder.pt", tmp_path)
    text = "vlexport_components = 1\n[components.eye]\nmodel = 'encoder.pt'\n"
    (tmp_path / "components.toml").write_text(text)
    vlexport.build(BuildConfig(model=str(tmp_path), output=str(tmp_path / "b"), profile=False, threads=1))
    found = read_bundle(tmp_path / "b")
    assert found.golden is None
    assert {path for path in found.files if path.startswith("artifact/")} == {"artifact/main.onnx"}
    assert list(vlexport.verify(tmp_path / "b").errors) == ["eye"]
    alone = open_sources(BuildConfig(model=str(tmp_path / "encoder.pt")))
    assert (found.source_hash, found.signature()) == (alone.source_hash, alone.signature)


# What is refused


@pytest.mark.parametrize(
    ("option", "value"),
    [("arch", "timm:x"), ("weights_key", "k"), ("input", ("x=1x3",)), ("preprocess", "crop=8")],
)
def test_option_of_a_single_model_is_refused_when_there_are_several(option: str, value: Any, model: Path) -> None:
    with pytest.raises(VlexportError) as caught:
        open_sources(BuildConfig(model=str(model), **{option: value}))
    assert (caught.value.code, caught.value.exit_code) == ("VLX0703", 2)


@pytest.mark.parametrize(
    ("edit", "code", "where"),
    [
        (("head.pt", "lost.pt"), "VLX0101", "component head"),
        (("head.pt", "components.toml"), "VLX0104", "component head"),
        (("head.mean", "head.mena"), "VLX1102", "edge"),
        (("[components.head]", "[components.whole]"), "VLX1102", "components"),
        (("head.pt", "../head.pt"), "VLX1101", "components.toml"),
    ],
)
def test_model_is_refused_and_nothing_written_when_a_component_is_wrong(
    edit: tuple[str, str], code: str, where: str, model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    file = folder / "components.toml"
    file.write_text(file.read_text().replace(*edit))
    with pytest.raises(VlexportError) as caught:
        vlexport.build(BuildConfig(model=str(folder), output=str(tmp_path / "b"), profile=False))
    assert caught.value.code == code
    assert where in caught.value.where + str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


# An independent pair


def test_towers_run_together_or_alone_when_no_edge_joins_them(towers: Path) -> None:
    image, ids = np.random.default_rng(0).random((1, 3, 8, 8), np.float32), np.asarray([[1, 2, 3, 4]] * 5)
    with vlexport.load(towers) as loaded:
        assert [spec.name for spec in loaded.bundle.signature().inputs] == ["image", "ids"]
        both = loaded.run({"image": image, "ids": ids})  # one image against five texts
        assert {name: value.shape for name, value in both.items()} == {"mean": (1, 3), "peak": (1, 3), "output": (5, 3)}
        alone = loaded.run({"ids": ids})
        assert list(alone) == ["output"]
        np.testing.assert_array_equal(alone["output"], both["output"])
        prepared = loaded.prepare(Image.new("RGB", (9, 9), (200, 10, 10)))
        assert loaded.run(prepared)["mean"].argmax() == 0
        with pytest.raises(VlexportError, match="VLX0507"):
            loaded.run({"idz": ids})


def test_towers_verify_and_validate_when_no_edge_joins_them(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(towers, tmp_path / "towers"))
    assert list(vlexport.verify(folder).errors) == ["encoder", "text", "whole"]
    random = np.random.default_rng(0)
    images = random.random((4, 3, 8, 8)).astype(np.float32)
    np.savez("x.npz", image=images, ids=random.integers(0, 11, (4, 4)))
    report = validate(ValidateConfig(folder, "x.npz", reference=str(towers)))
    assert {name: found.samples for name, found in report.fidelity.items()} == {"mean": 4, "peak": 4, "output": 4}
    assert all(found.relative_error == 0 for found in report.fidelity.values())
