"""What a build makes, that it makes the same bytes anywhere, and that it makes nothing when the numbers are wrong."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.cli.main import main
from vlexport.core.artifact import Artifact
from vlexport.core.bundle import read_bundle
from vlexport.core.config import BuildConfig
from vlexport.core.devices import this_machine
from vlexport.core.errors import CapabilityError, VlexportError
from vlexport.ir.program import Program
from vlexport.stages.profile import Plan
from vlexport.targets.onnxruntime import OnnxRuntimeTarget

TOLERANCE = 1e-4  # of the largest value: the bound that a build promises for fp32, other kernels sum in another order
GOLDEN = tuple(f"golden/main/{kind}{size}.npz" for kind in ("inputs", "outputs") for size in ("", "-smallest"))
PROMISED = ("artifact/main.onnx", "bundle.json", *GOLDEN, "recipe.toml")


def built(model: Path, output: Path, **options: Any) -> Path:
    config = BuildConfig(model=str(model), output=str(output), **{"profile": False, "threads": 1, **options})
    return vlexport.build(config).output


def saved_and_built(module: nn.Module, folder: Path, inputs: Any, **options: Any) -> Path:
    vlexport.save(module.eval(), folder / "m.pt", inputs=inputs, **options)
    return built(folder / "m.pt", folder / "m.bundle")


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        expected = value.detach().numpy()
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE * max(np.abs(expected).max(), 1e-30))


def content(bundle: Path) -> dict[str, bytes]:
    return {name: (bundle / name).read_bytes() for name in PROMISED}


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# Layout


def test_bundle_holds_the_documented_files_when_built(bundle: Path) -> None:
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    measured = {"measured/index.json", "measured/local-1/report.json", "measured/local-1/report.html"}
    assert files == {*PROMISED, *measured}
    about = json.loads((bundle / "bundle.json").read_text())
    assert (about["schema_version"], about["state"], about["target"]) == (1, "verified", "onnxruntime")
    assert set(about["files"]) == set(PROMISED) - {"bundle.json"}
    for name, record in about["files"].items():
        data = (bundle / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    assert json.loads((bundle / "measured/index.json").read_text()) == {"schema_version": 1, "reports": ["local-1"]}
    assert list(about["components"]) == ["main"]
    assert about["components"]["main"]["labels"] == ["red", "green", "blue"]


def test_bundle_records_changes_and_gate_when_a_batch_norm_was_folded(bundle: Path) -> None:
    fold = next(p for p in read_bundle(bundle).main.passes if p.name == "reparameterize")
    assert [(c.count, c.where) for c in fold.changes] == [(1, ("conv", "norm"))]
    assert fold.gate.proof in ("float32", "float64")
    assert fold.gate.worst < 1e-5
    ops = [node.op_type for node in onnx_ir.load(bundle / "artifact/main.onnx").graph]
    assert "BatchNormalization" not in ops


def test_bundle_has_the_permissions_of_the_umask_when_built(built: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert built.stat().st_mode & 0o777 == 0o777 & ~umask


def test_output_is_named_after_the_model_when_not_given(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(model_file, "net.pt")
    assert vlexport.build(BuildConfig(model="net.pt", profile=False)).output == Path("net.bundle")
    assert hidden(tmp_path) == []


# The same bytes everywhere


def test_bundle_is_byte_identical_when_built_again_elsewhere(model_file: Path, built: Path, tmp_path: Path) -> None:
    """Another process, folder, file name, locale, umask, time zone, hash seed and home."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.copy(model_file, tmp_path / "far" / "renamed.pt")
    environment = {
        **os.environ, "LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "77", "HOME": str(tmp_path),
        "USER": "somebody", "COLUMNS": "20",
    }  # fmt: skip
    code = (
        "import os; os.umask(0o077); from vlexport.cli.main import main; "
        "raise SystemExit(main(['build', 'renamed.pt', '-o', 'away/other', '--no-profile', '--threads', '1']))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "far", env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    other = tmp_path / "far" / "away" / "other"
    assert content(other) == content(built)
    assert other.stat().st_mode & 0o777 == 0o700


def test_recipe_replays_the_build_when_given(model_file: Path, tmp_path: Path) -> None:
    first = built(
        model_file, tmp_path / "a", options={"onnxruntime.opset": "19"}, seed=5, numeric_gate=False,
        gate=("size_mb<=9",), preprocess="resize=9,crop=8,scale=1/255",
    )  # fmt: skip
    shutil.copy(first / "recipe.toml", tmp_path / "r.toml")
    arguments = ["build", str(model_file), "-o", str(tmp_path / "b"), "--recipe", str(tmp_path / "r.toml")]
    assert main([*arguments, "--no-profile", "--threads", "1"]) == 0
    assert content(tmp_path / "b") == content(first)
    assert read_bundle(first).digest == read_bundle(tmp_path / "b").digest


def test_flags_win_over_the_recipe_when_both_are_given(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('seed = 3\n[options]\n"onnxruntime.opset" = "19"\n')
    arguments = ["build", str(model_file), "-o", str(tmp_path / "b"), "--recipe", str(tmp_path / "r.toml")]
    more = ["--no-profile", "--set", "onnxruntime.graph_optimization=basic", "--seed", "4"]
    assert main([*arguments, *more]) == 0
    recipe = (tmp_path / "b" / "recipe.toml").read_text()
    assert "seed = 4" in recipe
    assert 'opset" = "19"' in recipe
    assert read_bundle(tmp_path / "b").main.artifact.session_options["graph_optimization"] == "basic"


def test_nothing_names_this_machine_when_saved_and_built(
    model_file: Path, built: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    told = {str(Path.cwd()), str(Path.home()), str(model_file.parent), str(tmp_path_factory.getbasetemp())}
    told |= {str(Path(__file__).parent), str(Path(vlexport.__file__).parent), sys.prefix, socket.gethostname()}
    told |= {getpass.getuser() + "@"} if len(getpass.getuser()) < 5 else {getpass.getuser()}
    files = [p for p in built.rglob("*") if p.is_file()]
    assert len(files) == 10
    pieces = {p.name: p.read_bytes() for p in files}
    with zipfile.ZipFile(model_file) as archive:
        pieces |= {name: archive.read(name) for name in archive.namelist()}
    for name, data in pieces.items():
        leaks = [word for word in told if len(word) > 3 and word.encode() in data]
        assert not leaks, name


# Options


def test_opset_reaches_the_artifact_when_set(model_file: Path, tmp_path: Path) -> None:
    bundle = built(model_file, tmp_path / "b", options={"onnxruntime.opset": "19"})
    assert onnx_ir.load(bundle / "artifact/main.onnx").opset_imports[""] == 19
    assert read_bundle(bundle).compatibility["opset"] == "19"


def test_gate_is_recorded_as_off_when_not_wanted(model_file: Path, tmp_path: Path, capfd: Any) -> None:
    assert main(["build", str(model_file), "-o", str(tmp_path / "b"), "--no-profile", "--no-gate"]) == 0
    assert "numeric gate off" in capfd.readouterr().out
    assert {p.gate.proof for p in read_bundle(tmp_path / "b").main.passes} == {"off"}
    assert "numeric_gate = false" in (tmp_path / "b" / "recipe.toml").read_text()


# Wrong numbers


def test_build_fails_and_leaves_nothing_when_lowering_changes_a_weight(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    lower = OnnxRuntimeTarget.lower

    def perturbed(self: OnnxRuntimeTarget, program: Any, folder: Path, brief: Any) -> Any:
        artifact = lower(self, program, folder, brief)
        model = onnx_ir.load(folder / artifact.path)
        value = next(v for v in model.graph.initializers.values() if "head.weight" in (v.name or ""))
        assert value.const_value is not None
        # 0.1 % of the largest weight: ten times the bound of 1e-4
        value.const_value = onnx_ir.tensor(value.const_value.numpy() + np.float32(0.01))
        onnx_ir.save(model, folder / artifact.path)
        return artifact

    monkeypatch.setattr(OnnxRuntimeTarget, "lower", perturbed)
    assert main(["build", str(model_file), "-o", str(tmp_path / "b"), "--no-profile"]) == 3
    assert "error VLX0504: output output of the artifact differs" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_build_fails_and_leaves_nothing_when_the_runtime_refuses_the_artifact(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = OnnxRuntimeTarget.lower

    def cut(self: OnnxRuntimeTarget, program: Any, folder: Path, brief: Any) -> Any:
        artifact = lower(self, program, folder, brief)
        (folder / artifact.path).write_bytes(b"\x08\x0ajunk")
        return artifact

    monkeypatch.setattr(OnnxRuntimeTarget, "lower", cut)
    with pytest.raises(VlexportError) as caught:
        built(model_file, tmp_path / "b")
    assert (caught.value.code, caught.value.exit_code) == ("VLX0505", 4)
    assert list(tmp_path.iterdir()) == []


def test_build_writes_the_bundle_and_exits_3_when_a_gate_fails(
    model_file: Path, tmp_path: Path, make: Any, capfd: Any
) -> None:
    data = make.npz(tmp_path / "x.npz", [0, 1, 2] * 8, labels=[0, 1, 2, 1, 2, 0, 0, 1] * 3)
    code = main(["build", str(model_file), "-o", str(tmp_path / "b"), "--no-profile", "--data", data,
                 "--gate", "top1>=99", "--gate", "cosine>=0.999"])  # fmt: skip
    out = capfd.readouterr().out
    assert code == 3
    assert "top1>=99: fail" in out
    assert "cosine>=0.999: pass" in out
    assert read_bundle(tmp_path / "b").state == "verified"
    report = json.loads((tmp_path / "b/measured/local-1/report.json").read_text())
    assert [v["outcome"] for v in report["verdicts"]] == ["fail", "pass"]
    assert report["reference"] == "source program"
    assert report["accuracy"]["drop"] == 0.0


def test_notes_of_the_source_reach_the_report_when_data_is_given_too(tmp_path: Path, make: Any) -> None:
    (tmp_path / "arch.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.head = nn.Linear(3, 3)\n"
        "    def forward(self, image):\n        return self.head(image.mean(dim=(2, 3)))\n"
    )
    torch.save(
        {"model": {"module.head.weight": 9 * torch.eye(3), "module.head.bias": torch.zeros(3)}}, tmp_path / "w.pt"
    )
    common = {"arch": f"{tmp_path}/arch.py:Net", "input": ("image=1x3x8x8",), "profile": False}
    plain = vlexport.build(BuildConfig(model=str(tmp_path / "w.pt"), output=str(tmp_path / "a"), **common))
    data = make.npz(tmp_path / "x.npz", [0, 1, 2] * 4)
    with_data = vlexport.build(
        BuildConfig(model=str(tmp_path / "w.pt"), output=str(tmp_path / "b"), data=data, **common)
    )
    assert plain.report.notes
    assert set(plain.report.notes) <= set(with_data.report.notes)


# Kinds of models


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_artifact_equals_pytorch_when_batch_is_any(batch: int, built: Path, model_file: Path) -> None:
    exported = torch.export.load(model_file).module()
    image = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    with vlexport.load(built) as loaded:
        assert_same(loaded.run({"image": image.numpy()}), {"output": exported(image)[0]})


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.mix = nn.Linear(7, 5)

    def forward(self, ids: Tensor, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        words = (self.words(ids) * mask[..., None]).sum(1)
        both = torch.cat([words, image.mean(dim=(2, 3))], 1)
        return {"scores": self.mix(both), "best": self.mix(both).argmax(1), "seen": mask.any(1)}


def test_artifact_equals_pytorch_when_inputs_and_outputs_are_several(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Several().eval()
    example = (torch.randint(11, (1, 6)), torch.rand(1, 3, 4, 4), torch.ones(1, 6, dtype=torch.bool))
    bundle = saved_and_built(module, tmp_path, example)
    signature = read_bundle(bundle).signature()
    assert [(s.name, s.dtype) for s in signature.inputs] == [("ids", "int64"), ("image", "float32"), ("mask", "bool")]
    assert [(s.name, s.dtype) for s in signature.outputs] == [
        ("scores", "float32"),
        ("best", "int64"),
        ("seen", "bool"),
    ]
    for batch in (1, 3):
        inputs = (torch.randint(11, (batch, 6)), torch.rand(batch, 3, 4, 4), torch.rand(batch, 6) > 0.4)
        with vlexport.load(bundle) as loaded:
            found = loaded.run(dict(zip(("ids", "image", "mask"), (v.numpy() for v in inputs), strict=True)))
        assert_same(found, module(*inputs))


def test_bundle_verifies_when_names_are_those_of_numpy_arguments(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, file: Tensor, allow_pickle: Tensor) -> dict[str, Tensor]:
            return {"file": file * 2 + allow_pickle, "a/b ü": file - allow_pickle}

    bundle = saved_and_built(Net(), tmp_path, (torch.rand(1, 3), torch.rand(1, 3)))
    vlexport.verify(bundle)
    assert [s.name for s in read_bundle(bundle).signature().outputs] == ["file", "a/b ü"]


class Branches(nn.Module):
    """Python control flow on the batch size: it can only be captured at one size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 4:
            return x * 2
        return x * 3


def test_static_batch_model_builds_when_it_branches_on_size(tmp_path: Path) -> None:
    bundle = saved_and_built(Branches(), tmp_path, torch.rand(4, 3))
    assert read_bundle(bundle).signature().inputs[0].shape == (4, 3)
    with vlexport.load(bundle) as loaded:
        value = np.ones((4, 3), np.float32)
        assert (loaded.run({"x": value})["output"] == 2 * value).all()
        with pytest.raises(VlexportError) as caught:
            loaded.run({"x": value[:1]})
    assert caught.value.code == "VLX0507"
    np.savez(tmp_path / "x.npz", x=np.arange(18, dtype=np.float32).reshape(6, 3))
    assert main(["run", str(bundle), str(tmp_path / "x.npz"), "-o", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as out:
        assert (out["output"] == 2 * np.arange(18).reshape(6, 3)).all()


def test_latency_is_not_claimed_when_this_machine_is_not_the_device(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = this_machine().model_copy(update={"instruction_set": ("avx2", "fma")})
    monkeypatch.setattr("vlexport.stages.build.this_machine", lambda: plain)
    config = BuildConfig(model=str(model_file), output=str(tmp_path / "b"), device_profile="cpu-x86-vnni")
    made = vlexport.build(config)
    assert made.bundle.device_profile == "cpu-x86-vnni"
    assert made.report.latency is None
    assert "latency was not measured: this machine is no cpu-x86-vnni" in made.report.notes


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).mean((2, 3))


def test_gate_sees_when_a_fixed_batch_of_one_is_built_with_the_default_seed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vlexport.save(Fixed().eval(), tmp_path / "m.pt", inputs=torch.randn(1, 3, 8, 8), dynamic=False)
    made = vlexport.build(BuildConfig(model=str(tmp_path / "m.pt"), output=str(tmp_path / "b"), profile=False))
    assert made.bundle.state == "verified"
    assert made.bundle.main.golden_smallest is None


def test_golden_check_fails_when_lowering_bakes_the_traced_batch_in(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = OnnxRuntimeTarget.lower

    def baked(self: OnnxRuntimeTarget, program: Any, folder: Path, brief: Any) -> Any:
        artifact = lower(self, program, folder, brief)
        graph = onnx_ir.load(folder / "main.onnx")
        graph.graph.inputs[0].shape = onnx_ir.Shape([2, *list(graph.graph.inputs[0].shape)[1:]])
        onnx_ir.save(graph, folder / "main.onnx")
        return artifact

    monkeypatch.setattr(OnnxRuntimeTarget, "lower", baked)
    with pytest.raises(VlexportError):
        vlexport.build(BuildConfig(model=str(model_file), output=str(tmp_path / "b"), profile=False))
    assert not (tmp_path / "b").exists()


def test_bundle_holds_vectors_at_two_sizes_when_a_dim_is_dynamic(model_file: Path, tmp_path: Path) -> None:
    made = vlexport.build(BuildConfig(model=str(model_file), output=str(tmp_path / "b"), profile=False))
    sizes = []
    for golden in (made.bundle.main.golden_smallest, made.bundle.main.golden):
        assert golden is not None
        with np.load(tmp_path / "b" / golden.inputs) as vectors:
            sizes.append(vectors[vectors.files[0]].shape[0])
    assert sizes == [1, 3]


@pytest.mark.parametrize("writes", [False, True])
def test_build_measures_ours_alone_when_the_plain_export_is_broken(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    def broken(self: OnnxRuntimeTarget, program: Program, folder: Path) -> Artifact:
        if not writes:
            raise CapabilityError("VLX0503", "the exporter gave up")
        folder.mkdir(parents=True)
        (folder / "main.onnx").write_bytes(b"no model")
        return Artifact(
            target="onnxruntime", path="main.onnx", inputs=program.signature.inputs, outputs=program.signature.outputs
        )

    monkeypatch.setattr(OnnxRuntimeTarget, "lower_naive", broken)
    monkeypatch.setattr("vlexport.stages.build.QUICK", Plan(rounds=1, block_seconds=0.01))
    result = vlexport.build(BuildConfig(model=str(model_file), output=str(tmp_path / "b"), threads=1))
    assert result.report.latency is not None
    assert result.report.latency.p50_ms > 0
    assert not result.report.latency.baseline
    said = [note for note in result.report.notes if note.startswith("no ratio: the plain export")]
    assert len(said) == 1
    assert writes or "the exporter gave up" in said[0]


class Padded(nn.Module):
    """Attention that leaves out what ``pad`` is true for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=pad, need_weights=False)[0]


def test_padding_mask_is_obeyed_when_the_bundle_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, pad = Padded().eval(), torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    pad[:, 4:] = True
    bundle = saved_and_built(model, tmp_path, (x, pad))
    assert read_bundle(bundle).state == "verified"
    with vlexport.load(bundle) as loaded:
        assert_same(loaded.run({"x": x.numpy(), "pad": pad.numpy()}), {"output": model(x, pad)})


def test_note_names_output_and_weight_when_the_model_itself_gives_nan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan  # type: ignore[index]
    vlexport.save(model.eval(), tmp_path / "m.pt", inputs=torch.randn(1, 3, 2, 2))
    config = BuildConfig(model=str(tmp_path / "m.pt"), output=str(tmp_path / "m.bundle"), profile=False, threads=1)
    first = vlexport.build(config).report.notes[0]
    assert first.startswith("the model itself, before any pass, gives NaN or infinity on the probes of the gate: ")
    assert first.endswith("output in 25%; NaN is stored in 1.weight")


class TakesSome(nn.Module):
    """What it keeps of the image follows from a number that drawn ids do not reach."""

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        count = (ids == 7).sum().item()
        torch._check(count >= 3)
        torch._check(count <= 8)
        return image[:, :count].sum(1) + ids.sum()  # type: ignore[misc]


@pytest.mark.parametrize("keep_example", [False, True], ids=["example", "golden vectors"])
def test_check_of_the_model_is_named_when_a_drawn_input_breaks_it(keep_example: bool, tmp_path: Path) -> None:
    model, inputs = tmp_path / "model.pt", (torch.full((2, 3), 7), torch.randn(2, 8))
    vlexport.save(TakesSome().eval(), model, inputs=inputs, keep_example=keep_example)
    with pytest.raises(VlexportError, match=r"VLX0302: an input breaks a check of the model: .*>= 3") as caught:
        vlexport.build(BuildConfig(model=str(model), target="onnxruntime", output=str(tmp_path / "b"), profile=False))
    assert "test_build.py:" in caught.value.where
