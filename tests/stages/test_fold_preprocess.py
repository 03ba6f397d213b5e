"""--fold-preprocess: graph and recorded preprocessing are rewritten together, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vlexport
from vlexport.core.bundle import read_bundle
from vlexport.core.config import BuildConfig
from vlexport.core.errors import UsageError
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.stages.build import build
from vlexport.stages.plan import plan
from vlexport.stages.validate import ValidateConfig, validate

SPEC = "resize=8,crop=8,scale=1/255,mean=imagenet,std=imagenet"


class Net(nn.Module):
    """A patch embedding and a head, or a convolution that pads."""

    def __init__(self, *, padding: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 4, stride=4, padding=padding), nn.Linear(6, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).relu().mean((2, 3)))


def save(folder: Path, *, padding: int = 0, preprocess: str | None = SPEC) -> Path:
    torch.manual_seed(0)
    path = folder / f"model{padding}.pt"
    example = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vlexport.save(Net(padding=padding).eval(), path, inputs=example, preprocess=preprocess)
    return path


def config(model: Path, output: Path, *, fold: bool = True) -> BuildConfig:
    return BuildConfig(model=str(model), output=str(output), fold_preprocess=fold, profile=False, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("folded") / "made.bundle"
    build(config(model, output))
    return output


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_bundle_records_scale_only_and_sees_the_same_when_folded(folded: Path, photo: Path) -> None:
    main = read_bundle(folded).main
    (how,) = main.preprocess.values()
    assert (how.mean, how.std, how.scale) == ((0.0,), (1.0,), 1 / 255)
    assert "fold_preprocess = true" in (folded / "recipe.toml").read_text(encoding="utf-8")
    record = next(each for each in main.passes if each.name == "fold-preprocess")
    assert [change.what for change in record.changes] == ["arithmetic at an input folded into conv2d"]
    before = preprocess_from_spec(SPEC)
    with Image.open(photo) as image:
        plain, scaled = before.apply(image)[None], how.apply(image)[None]
    torch.manual_seed(0)
    expected = Net(padding=0).eval()(torch.from_numpy(plain)).detach().numpy()
    with vlexport.load(folded) as session:
        found = session.run({"image": scaled})["output"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_reference_is_given_the_same_inputs_when_it_is_the_model(folded: Path, model: Path, photo: Path) -> None:
    report = validate(ValidateConfig(bundle=folded, data=str(photo.parent), reference=str(model)))
    assert report.samples == 1
    assert report.fidelity["output"].cosine_min > 1 - 1e-6


def test_build_is_refused_with_the_reason_when_the_convolution_pads(tmp_path: Path) -> None:
    padded = save(tmp_path, padding=1)
    with pytest.raises(UsageError) as caught:
        build(config(padded, tmp_path / "out"))
    assert caught.value.code == "VLX0708"
    assert "pads with zeros, where the shift is not zero" in caught.value.message
    assert not (tmp_path / "out").exists()
    problems = plan(config(padded, tmp_path / "out")).problems
    assert [each.code for each in problems] == ["VLX0708"]
    assert not plan(config(padded, tmp_path / "out", fold=False)).problems


@pytest.mark.parametrize(
    ("preprocess", "shape", "part"),
    [
        (None, (1, 3, 8, 8), "the model has no recorded preprocessing"),
        ("scale=1/255,mean=imagenet", (1, 8, 8, 3), "not a batch of images of 3 channels"),
    ],
)
def test_build_is_refused_when_there_is_nothing_to_fold(
    preprocess: str | None, shape: tuple[int, ...], part: str, tmp_path: Path
) -> None:
    from vlexport.frontends.capture import capture
    from vlexport.frontends.source import Source

    known = {"input": preprocess_from_spec(preprocess)} if preprocess else {}
    program = capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval(), torch.zeros(shape)).program
    with pytest.raises(UsageError) as caught:
        Source(program, known, (), "hash").with_arithmetic()
    assert caught.value.code == "VLX0708"
    assert part in caught.value.message
