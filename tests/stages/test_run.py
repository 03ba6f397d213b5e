"""A bundle as a function: `vlexport.load`, `vlexport run`, and the receipt's snippet as a user pastes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vlexport
from vlexport.cli.main import main
from vlexport.core.errors import VlexportError


class Pair(nn.Module):
    """No image: two inputs, one of them integers, one of dynamic length."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)

    def forward(self, ids: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"pooled": (self.words(ids) * weight[..., None]).sum(1), "longest": ids.amax(1)}


class Segmenter(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image * 2


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    vlexport.save(Pair().eval(), folder / "pair.pt", inputs=(torch.ones(1, 4, dtype=torch.long), torch.rand(1, 4)))
    assert main(["build", str(folder / "pair.pt"), "-o", str(folder / "pair"), "--no-profile"]) == 0
    return folder / "pair"


def code_of(call: Any) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        call()
    return caught.value


# load


def test_classify_ranks_labels_when_given_a_photo(bundle: Path, make: Any) -> None:
    photo = make.photo(Path("photo.png"), 1)
    with vlexport.load(bundle) as loaded:
        found = loaded.classify(photo)
        assert found[0][0] == "green"
        assert sum(share for _, share in found) == pytest.approx(1)
        assert found == sorted(found, key=lambda pair: -pair[1])
        with Image.open(photo) as opened:
            assert loaded.classify(opened) == found
        assert loaded.classify(str(photo), top=1) == found[:1]
        prepared = loaded.prepare(photo)
        assert (prepared["image"].shape, prepared["image"].dtype) == ((1, 3, 8, 8), np.float32)
        scores = loaded.run(prepared)["output"][0].astype(np.float64)
    softmax = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    assert dict(found)["green"] == pytest.approx(softmax[1])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"imgae": np.zeros((1, 3, 8, 8), np.float32)}, "no input 'imgae'; did you mean 'image'?"),
        ({}, "input image: it is missing"),
        ({"image": np.zeros((1, 3, 8, 7), np.float32)}, "shape is 1×3×8×7"),
        ({"image": np.zeros((3, 8, 8), np.float32)}, "shape is 3×8×8"),
        ({"image": np.zeros((1, 3, 8, 8))}, "dtype is float64, float32 is wanted"),
        ({"image": [[1.0, 2.0]]}, "input image: "),
        ({"image": np.zeros((0, 3, 8, 8), np.float32)}, "shape is 0×3×8×8"),
        (np.zeros((1, 3, 8, 8), np.float32), "inputs are arrays by name, not ndarray"),
    ],
)
def test_run_refuses_arrays_when_they_do_not_fit(inputs: Any, said: str, built: Path) -> None:
    with vlexport.load(built) as loaded:
        error = code_of(lambda: loaded.run(inputs))
    assert (error.code, error.exit_code) == ("VLX0507", 1)
    assert said in error.message


def test_run_refuses_sizes_that_a_dim_was_not_built_for(model_file: Path, tmp_path: Path) -> None:
    config = vlexport.BuildConfig(
        model=str(model_file), output=str(tmp_path / "made"), dynamic=("batch=2:3:4",), profile=False, threads=1
    )
    with vlexport.load(vlexport.build(config).output) as loaded:
        for size, code in ((1, "VLX0507"), (2, ""), (4, ""), (5, "VLX0507")):
            inputs = {"image": np.zeros((size, 3, 8, 8), np.float32)}
            if code:
                error = code_of(lambda inputs=inputs: loaded.run(inputs))
                assert (error.code, f"batch is {size}, and the bundle takes sizes from 2 to 4" in error.message) == (
                    code, True,
                )  # fmt: skip
            else:
                assert loaded.run(inputs)["output"].shape[0] == size
        assert loaded.batched({"image": np.zeros((3, 8, 8), np.float32)})["image"].shape[0] == 2


@pytest.mark.parametrize("threads", [-1, "a"])
def test_load_refuses_threads_that_are_no_count(threads: Any, built: Path) -> None:
    assert code_of(lambda: vlexport.load(built, threads=threads)).code == "VLX0703"


def test_run_takes_nested_lists_when_their_dtype_fits(plain: Path) -> None:
    with vlexport.load(plain) as loaded:
        found = loaded.run({"ids": [[1, 6, 2, 3]], "weight": np.ones((1, 4), np.float32)})  # type: ignore[dict-item]
    assert found["longest"].tolist() == [6]


def test_classify_is_refused_when_the_bundle_cannot(plain: Path, tmp_path: Path, bundle: Path, make: Any) -> None:
    with vlexport.load(plain) as loaded:
        error = code_of(lambda: loaded.classify("photo.png"))
    assert error.code == "VLX0206"
    assert "preprocess=" in error.hint
    vlexport.save(Segmenter().eval(), "seg.pt", inputs=torch.rand(1, 3, 8, 8), preprocess="resize=8,crop=8,scale=1/255")
    assert main(["build", "seg.pt", "-o", "seg", "--no-profile"]) == 0
    photo = make.photo(tmp_path / "photo.png", 0)
    with vlexport.load("seg") as loaded:
        assert code_of(lambda: loaded.classify(photo)).code == "VLX0208"
        assert loaded.run(loaded.prepare(photo))["output"].shape == (1, 3, 8, 8)
    with vlexport.load(bundle) as loaded:
        assert code_of(lambda: loaded.classify("nowhere.png")).code == "VLX0203"
        for junk in (b"no photo", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, photo.read_bytes()[:45]):
            Path("junk.png").write_bytes(junk)
            assert code_of(lambda: loaded.classify("junk.png")).code == "VLX0203"
            error = code_of(lambda: loaded.classify(np.zeros((8, 8, 3), np.uint8)))  # type: ignore[arg-type]
            assert (error.code, "fromarray" in error.hint) == ("VLX0203", True)


def test_loaded_bundle_is_closed_when_its_block_ends(built: Path) -> None:
    with vlexport.load(built) as loaded:
        pass
    loaded.close()
    error = code_of(lambda: loaded.run({"image": np.zeros((1, 3, 8, 8), np.float32)}))
    assert (error.code, "closed" in error.message) == ("VLX0506", True)


def test_load_needs_no_torch_when_it_runs(bundle: Path, make: Any) -> None:
    make.photo(Path("photo.png"), 2)
    code = (
        "import sys; sys.modules['torch'] = None\nimport vlexport\nprint(vlexport.load('bundle').classify('photo.png'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("[('blue', ")


# vlexport run


def test_run_prints_classes_when_given_an_image(bundle: Path, make: Any, capfd: Any) -> None:
    make.photo(Path("my photo.png"), 2)
    assert main(["run", "bundle", "my photo.png", "--top", "2"]) == 0
    line = capfd.readouterr().out
    assert line.startswith("my photo.png: blue ")
    assert line.count(",") == 1
    assert main(["run", "bundle", "my photo.png", "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert value["results"][0]["sample"] == "my photo.png"
    assert value["results"][0]["classes"][0]["label"] == "blue"


def test_run_takes_every_kind_of_data_when_named(bundle: Path, make: Any, capfd: Any) -> None:
    for name, colour in (("a", 0), ("b", 1)):
        make.photo(Path("photos") / f"{name}.png", colour)
    make.npz(Path("x.npz"), [2, 0])
    Path("x.jsonl").write_text('{"image": "photos/b.png"}\n{"image": "photos/a.png"}\n')
    for data, said in (("photos", ["a.png: red", "b.png: green"]), ("photos/*.png", ["a.png: red", "b.png: green"]),
                       ("x.npz", ["#0: blue", "#1: red"]),
                       ("x.jsonl", ["x.jsonl:1: green", "x.jsonl:2: red"])):  # fmt: skip
        assert main(["run", "bundle", data]) == 0
        lines = capfd.readouterr().out.splitlines()
        assert [line.rpartition(" ")[0].split(",")[0].rsplit(" ", 1)[0] for line in lines] == said


def test_run_writes_the_outputs_when_a_file_is_named(bundle: Path, make: Any, model_file: Path) -> None:
    make.npz(Path("x.npz"), [2, 0, 1])
    for name in ("out.npz", "no-suffix"):
        assert main(["run", "bundle", "x.npz", "--output", name]) == 0
        with np.load(name) as out, np.load("x.npz") as given:
            wanted = torch.export.load(model_file).module()(torch.from_numpy(given["image"]))[0].detach().numpy()
            assert out.files == ["output"]
            np.testing.assert_allclose(out["output"], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert not list(Path().glob(".*"))


def test_run_prints_shapes_when_the_output_is_no_score_vector(plain: Path, tmp_path: Path, capfd: Any) -> None:
    np.savez(tmp_path / "x.npz", ids=np.ones((2, 4), np.int64), weight=np.ones((2, 4), np.float32))
    assert main(["run", str(plain), str(tmp_path / "x.npz"), "--json"]) == 0
    results = json.loads(capfd.readouterr().out)["results"]
    assert [r["sample"] for r in results] == ["#0", "#1"]
    assert len(results[0]["classes"]) == 3  # pooled: three numbers


# The receipt


def receipt_of(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> list[str]:
    capfd.readouterr()
    assert main(["build", *arguments]) == 0
    return capfd.readouterr().out.splitlines()


def pasted(lines: list[str], folder: Path) -> str:
    code = "\n".join(lines[lines.index("Use it:") + 1 :])
    lines = [line.removeprefix("    ") for line in code.splitlines()]
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_snippet_runs_verbatim_when_the_bundle_classifies_photos(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make.photo(Path("photo.png"), 0)
    name = "my \"bundle's"  # the path is quoted as Python wants it
    data = make.npz(Path("x.npz"), [0, 1, 2] * 8)
    lines = receipt_of(
        [
            str(model_file),
            "-o",
            name,
            "--data",
            data,
            "--gate",
            "top1>=50",
            "--gate",
            "drop<=20",
            "--gate",
            "cosine>=0.9",
        ],
        capfd,
    )
    assert len(lines) <= 12
    assert "classify" in lines[-1]
    assert pasted(lines, tmp_path).startswith("[('red', ")


def test_snippet_runs_verbatim_when_the_bundle_takes_arrays(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = receipt_of([str(plain.parent / "pair.pt"), "-o", "pair", "--no-profile"], capfd)
    assert len(lines) <= 12
    assert "'pooled': array([[" in pasted(lines, tmp_path)


def test_receipt_says_what_was_not_measured_when_nothing_was(model_file: Path, tmp_path: Path, capfd: Any) -> None:
    lines = receipt_of([str(model_file), "-o", str(tmp_path / "b"), "--no-profile"], capfd)
    assert any(line.startswith("Accuracy not measured: give samples with --data") for line in lines)
    assert any(line.startswith("Latency  not measured here") for line in lines)
    assert any("reparameterize 1 change" in line for line in lines)
    assert any(line.startswith("Next ") for line in lines)


def test_receipt_has_a_latency_when_profiled(model_file: Path, tmp_path: Path, capfd: Any) -> None:
    lines = receipt_of([str(model_file), "-o", str(tmp_path / "b"), "--threads", "1"], capfd)
    latency = next(line for line in lines if line.startswith("Latency"))
    assert "ms at 1 thread" in latency
    assert "quick rounds, no verdict" in latency or "too noisy to tell" in latency
    report = json.loads((tmp_path / "b/measured/local-1/report.json").read_text())
    assert report["latency"]["baseline"] == "naive"
    assert report["latency"]["baseline_size_bytes"] > report["size_bytes"] / 2
    before, after = (report["latency"][key] for key in ("baseline_operators", "operators"))
    counts = [{each["operator"]: each["count"] for each in times} for times in (before, after)]
    assert counts[0]["Conv"] == counts[1]["Conv"] == 1
    assert all(each["ms"] > 0 for each in (*before, *after))
    page = (tmp_path / "b/measured/local-1/report.html").read_text()
    assert page.index('<th scope="col" class="number">naive</th>') < page.index(
        '<th scope="col" class="number">this bundle</th>'
    )
