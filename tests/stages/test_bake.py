"""--bake from the flag to the bundle: the input is gone, its value is in the recipe, its file's path is nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.core.bundle import read_bundle
from vlexport.core.config import BuildConfig, config_from
from vlexport.core.progress import Silent
from vlexport.ir import dialect
from vlexport.stages.build import build
from vlexport.stages.naive import naive_baseline
from vlexport.stages.validate import ValidateConfig, validate

PROMPT = np.array([[4, 1]])


class Prompted(nn.Module):
    """Scores a picture by a prompt of two words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head, self.mix = nn.Embedding(6, 4), nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:
        text = self.mix(self.words(prompt).mean(1)).relu()
        return self.head(image) * text


def prompted() -> Prompted:
    torch.manual_seed(0)
    return Prompted().eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompted") / "model.pt"
    inputs = {"image": torch.rand(1, 5, generator=torch.Generator().manual_seed(0)), "prompt": torch.from_numpy(PROMPT)}
    vlexport.save(prompted(), path, inputs=inputs)
    return path


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    np.save(folder / "ids.npy", PROMPT)
    output = tmp_path_factory.mktemp("baked") / "made.bundle"
    given = {"bake": (f"prompt={folder / 'ids.npy'}",), "dynamic": ("batch=1",)}
    build(BuildConfig(model=str(model), output=str(output), profile=False, threads=1, **given))  # type: ignore[arg-type]
    return output


def test_input_is_gone_and_what_follows_from_it_is_constant_when_baked(bundle: Path, model: Path) -> None:
    component = read_bundle(bundle).main
    assert [spec.name for spec in component.artifact.inputs] == ["image"]
    assert component.cost.macs == 5 * 4, "words, mean, linear and relu of the prompt are computed"
    image = np.random.default_rng(0).standard_normal((1, 5)).astype(np.float32)
    expected = prompted()(torch.from_numpy(image), torch.from_numpy(PROMPT)).detach().numpy()
    with vlexport.load(bundle) as session:
        assert np.allclose(session.run({"image": image})["output"], expected, rtol=1e-4, atol=1e-5)


def test_recipe_replays_to_the_same_bytes_when_the_file_is_gone(bundle: Path, model: Path, tmp_path: Path) -> None:
    recipe = bundle / "recipe.toml"
    assert "private" not in recipe.read_text(encoding="utf-8")
    assert "ids" not in recipe.read_text(encoding="utf-8")
    values = {"model": str(model), "output": str(tmp_path / "again"), "profile": False}
    build(config_from(values, recipe=recipe))
    assert (tmp_path / "again" / "bundle.json").read_bytes() == (bundle / "bundle.json").read_bytes()


def test_reference_and_plain_export_are_specialised_when_the_model_has_the_input(bundle: Path, model: Path) -> None:
    images = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    np.savez(bundle.parent / "data.npz", image=images)
    report = validate(ValidateConfig(bundle=bundle, data=str(bundle.parent / "data.npz"), reference=str(model)))
    assert report.samples == 4
    assert report.fidelity["output"].cosine_min > 1 - 1e-6
    with naive_baseline(bundle, str(model), None, Silent()) as plain:
        assert [spec.name for spec in plain.artifact.inputs] == ["image"]


def test_report_says_which_inputs_are_constant_when_baked(model: Path) -> None:
    from vlexport.frontends.sources import open_sources

    sources = open_sources(BuildConfig(model=str(model), bake=("prompt=[4,1]",)))
    assert "constant in the artifact: prompt (int64)" in sources.notes
    (source,) = sources.components.values()
    assert "expand" in {dialect.plain_name(call) for call in source.program.calls()}, (
        "the batch is another input's, too"
    )
