"""--tokens: from the flag to the artifact, and what is refused on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlexport
from tests.token_models import PlainViT, drawn
from vlexport.core.bundle import read_bundle
from vlexport.core.config import BuildConfig, config_from
from vlexport.core.errors import VlexportError
from vlexport.frontends.sources import open_sources
from vlexport.passes import ON_REQUEST
from vlexport.passes.reduce_tokens import ReduceTokens
from vlexport.stages.bisect import bisect
from vlexport.stages.choices import open_dataset, options_of, passes_of
from vlexport.stages.plan import plan
from vlexport.stages.tokens import component_passes
from vlexport.targets import open_target

EVIT = "evit:keep=0.5,layers=2"


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = PlainViT(side=16, patch=4, width=16, depth=2, heads=2)
    model.load_state_dict(drawn({name: v.shape for name, v in model.state_dict().items()}, "concentrated"))
    path = tmp_path_factory.mktemp("vit") / "vit.pt"
    vlexport.save(model.eval(), path, inputs=torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return path


def config(model: Path, output: Path, **given: Any) -> BuildConfig:
    return BuildConfig(**{"model": str(model), "output": str(output), "profile": False, "threads": 1, **given})


@pytest.fixture(scope="module")
def built(vit_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a build with tokens."""
    return vlexport.build(config(vit_file, tmp_path_factory.mktemp("built") / "out", tokens=EVIT))


def test_bundle_holds_the_reduced_program_and_verifies_when_built_with_tokens(built: Any) -> None:
    bundle = read_bundle(built.output)
    assert bundle.state == "verified", "golden vectors are those of the reduced program"
    (record,) = [each for each in bundle.main.passes if each.name == "reduce-tokens"]
    assert (record.effect, record.options["keep"], record.options["layers"]) == ("approximate", 0.5, [2])
    assert [each.what for each in record.changes] == ["evit: 8 of 16 patch tokens stay, the others become one"]
    assert record.gate.statistic == "cosine"
    assert any("behind reduce-tokens" in note for note in built.report.notes)
    assert f'tokens = "{EVIT}"' in (built.output / "recipe.toml").read_text(encoding="utf-8")
    assert config_from({"model": "x"}, recipe=built.output / "recipe.toml").tokens == EVIT


def test_bisect_finds_nothing_when_the_bundle_was_built_with_tokens(built: Any, vit_file: Path) -> None:
    """The reduced Program is not the source's equal, and need not be: the artifact is that of the reduced one."""
    given = config(vit_file, built.output, tokens=EVIT)
    found = bisect(given, bundle=(built.output, read_bundle(built.output)))
    assert found.kind == "nothing", found
    assert any("reduce-tokens" in each for each in found.agreed)


def test_bisect_names_the_pass_when_more_is_asked_of_it_than_it_promises(vit_file: Path, tmp_path: Path) -> None:
    earlier = "evit:keep=0.5,layers=1"  # what the last block drops, the class token has read already
    found = bisect(config(vit_file, tmp_path / "out", tokens=earlier), bound=0.9999999)
    assert (found.kind, found.culprit) == ("pass", "reduce-tokens")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"tokens": "evot"}, "VLX0703", "no token method 'evot'; did you mean 'evit'?"),
        ({"tokens": "evit:keep=0"}, "VLX0703", "--tokens evit: keep: input should be greater than 0"),
        ({"tokens": "evit:keep=1.5"}, "VLX0703", "--tokens evit: keep: input should be less than or equal to 1"),
        ({"tokens": "evit:layers=two"}, "VLX0703", "--tokens evit: layers"),
        ({"tokens": "evit:layers=3"}, "VLX0703", "there is no layer 3"),
        ({"tokens": "tome:r=9"}, "VLX0703", "r=9 tokens cannot merge, there are 17"),
        ({"tokens": "evit:component=image"}, "VLX0703", "there is no component 'image'"),
        ({"passes": ("reduce-tokens",)}, "VLX0703", "it runs with --tokens evit"),
    ],
)
def test_build_is_refused_in_words_when_tokens_do_not_fit(
    given: dict[str, Any], code: str, said: str, vit_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(VlexportError) as caught:
        vlexport.build(config(vit_file, tmp_path / "out", **given))
    assert caught.value.code == code
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


def test_plan_collects_the_refusal_when_the_model_has_no_tokens(model_file: Path, tmp_path: Path) -> None:
    found = plan(config(model_file, tmp_path / "out", tokens="tome:r=2"))
    assert [problem.code for problem in found.problems] == ["VLX0411"]
    assert found.passes[-1].name == "narrow-to-demand"


def test_plan_says_a_problem_once_when_several_checks_meet_it(vit_file: Path, tmp_path: Path) -> None:
    found = plan(config(vit_file, tmp_path / "out", tokens="evot"))
    assert [problem.code for problem in found.problems] == ["VLX0703"]


class LastOfTheKept(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, x[0, :, 0] > 0][:, -1]


def test_plan_collects_the_refusal_when_the_tokens_cannot_be_frozen(tmp_path: Path) -> None:
    x = torch.ones(1, 4, 2)
    vlexport.save(LastOfTheKept().eval(), tmp_path / "last.pt", inputs=x, dynamic=False)
    found = plan(config(tmp_path / "last.pt", tmp_path / "out", tokens="freeze"))
    assert "VLX0412" in [problem.code for problem in found.problems]


@pytest.mark.parametrize("batch", ["0", "9999999999"])
def test_both_kinds_of_a_value_are_named_when_it_is_neither(batch: str, vit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(VlexportError) as caught:
        passes_of(config(vit_file, tmp_path, tokens=f"freeze:batch={batch}"))
    assert caught.value.code == "VLX0703"
    assert f"--tokens freeze: batch: no value is called '{batch}'; it is one of dynamic; or " in caught.value.message
    assert "than or equal to" in caught.value.message


def test_hint_names_the_flag_when_an_option_of_the_pass_is_set_without_it(vit_file: Path, tmp_path: Path) -> None:
    asked = config(vit_file, tmp_path, options={"reduce-tokens.min_cosine": "0.5"})
    with pytest.raises(VlexportError) as caught:
        options_of(asked, open_target("onnxruntime"))
    assert caught.value.hint == "add --tokens evit:keep=0.7,layers=4+7+10"
    assert [each.name for each in passes_of(asked) if each.name in ON_REQUEST] == []


def test_calibration_samples_reach_the_pass_anew_each_time_when_given(vit_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", image=np.arange(3 * 768, dtype=np.float32).reshape(3, 3, 16, 16))
    asked = config(
        vit_file, tmp_path, tokens="tome:r=2", calib=str(tmp_path / "calib.npz"),
        options={"reduce-tokens.min_cosine": "0.5"},
    )  # fmt: skip
    sources = open_sources(asked)
    passes = component_passes(asked, sources, "main", open_dataset(asked.calib, sources))
    (made,) = [each for each in passes if isinstance(each, ReduceTokens)]
    assert (made.options.method, made.options.r, made.options.min_cosine) == ("tome", (2,), 0.5)
    for _ in range(2):
        assert [tuple(image.shape) for (image,) in made.samples] == [(1, 3, 16, 16)] * 3


class Live(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, x[0, :, 0] > 0].mean(1)


def test_bundle_verifies_when_a_model_is_frozen_for_a_batch_of_its_own(tmp_path: Path) -> None:
    """Golden vectors have the batch of the frozen model, not that of the saved one."""
    rows = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
    vlexport.save(Live().eval(), tmp_path / "live.pt", inputs={"x": torch.from_numpy(rows[:1])}, dynamic=False)
    np.savez(tmp_path / "calib.npz", x=rows)
    given = {"tokens": "freeze:percentile=100,batch=3", "calib": str(tmp_path / "calib.npz")}
    result = vlexport.build(config(tmp_path / "live.pt", tmp_path / "out", **given))
    assert result.bundle.state == "verified"
    assert result.bundle.main.artifact.inputs[0].shape[0] == 3
