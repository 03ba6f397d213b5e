"""A training checkpoint as DINOv2 writes one, and its package, become a bundle with one command and no consent."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlexport
from tests.pickle_mutator import Bomb
from vlexport.cli.main import main
from vlexport.core.config import BuildConfig, read_recipe
from vlexport.core.errors import ModelFileError, UsageError
from vlexport.core.progress import Silent
from vlexport.frontends.architecture import architecture_identity, arguments_from_text, factory_from_text
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.fit_weights import fit_state_dict
from vlexport.frontends.source import open_source
from vlexport.stages.naive import naive_baseline

PACKAGE = {
    "dinolike/__init__.py": "",
    "dinolike/layers/__init__.py": "from .block import Block\n",
    "dinolike/layers/block.py": """
from torch import nn

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x)).relu().mean(1, keepdim=True)
""",
    "dinolike/models/__init__.py": "",
    "dinolike/models/vision.py": """
import torch
from torch import nn

from ..layers import Block

class Vision(nn.Module):
    def __init__(self, depth, dim):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return {"class_token": x[:, 0], "patch_tokens": x[:, 1:], "masks": None}

def vision(depth=1, dim=8):
    from ..layers.block import Block as again
    assert again is Block
    return Vision(depth, dim)
""",
}
ARCH = "dinolike.models.vision:vision"
INPUT = ("image=1x3x8x8",)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """The package and ``checkpoint.pth`` in the current directory; the trained network."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = factory_from_text(ARCH, {"depth": 2}).module.eval()
    teacher: dict[str, Any] = {f"backbone.{name}": each for name, each in net.state_dict().items()}
    teacher |= {"dino_head.weight": torch.ones(3, 3), "dino_head.bad": Bomb(tmp_path / "canary")}
    content = {
        "args": argparse.Namespace(lr=1e-3, output=Path("somewhere")),
        "student": {f"module.backbone.{name}": each + 1 for name, each in net.state_dict().items()},
        "teacher": teacher,
        "optimizer": torch.optim.AdamW(net.parameters()).state_dict(),
        "evil": Bomb(tmp_path / "canary"),
    }
    torch.save(content, "checkpoint.pth")
    yield net
    for name in [each for each in sys.modules if each.partition(".")[0] == "dinolike"]:
        del sys.modules[name]


def outputs_of(source: Any, net: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = {name: each.numpy() for name, each in net(image).items() if each is not None}
    return source.run({"image": image.numpy()}), wanted


def test_bundle_is_built_with_one_command_when_the_checkpoint_is_from_training(
    trained: torch.nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["build", "checkpoint.pth", "--arch", ARCH, "--arch-arg", "depth=2", "--input", INPUT[0]]
    assert main([*command, "--output", "class_token", "-o", "made", "--no-profile"]) == 0, capfd.readouterr().err
    assert not Path("canary").exists()
    found, wanted = outputs_of(vlexport.load("made"), trained)
    assert list(found) == ["class_token"]
    np.testing.assert_allclose(found["class_token"], wanted["class_token"], rtol=1e-4, atol=1e-5)
    recipe = read_recipe(Path("made/recipe.toml"))
    assert (recipe["arch_arg"], recipe["outputs"]) == (["depth=2"], ["class_token"])
    assert "arch" not in recipe, "code is never recorded"
    with naive_baseline(Path("made"), "checkpoint.pth", ARCH, Silent()) as plain:  # as the recipe opened it
        assert [spec.name for spec in plain.artifact.outputs] == ["class_token"]


def test_entry_that_fits_is_chosen_and_said_when_several_could(trained: torch.nn.Module) -> None:
    options: dict[str, Any] = {"arch": ARCH, "arch_arg": ("depth=2",), "input": INPUT}
    source = open_source(BuildConfig(model="checkpoint.pth", **options))
    found, wanted = outputs_of(source, trained)
    assert list(found) == ["class_token", "patch_tokens"], "what is None is no output"
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    said = " | ".join(source.notes)
    for part in (
        "the weights are the checkpoint's entry 'teacher'; there are also 'student' (--weights-key)",
        "stripped the prefix 'backbone.'",
        "1 of the checkpoint's keys lie beside 'backbone.' and were left out: 'dino_head.weight'",
        "asks for code, which was not run: 'argparse.Namespace'",
        "being no tensors: 'dino_head.bad'",
    ):
        assert part in said
    other = open_source(BuildConfig(model="checkpoint.pth", weights_key="student", **options))
    assert not np.allclose(outputs_of(other, trained)[0]["class_token"], wanted["class_token"])
    assert not Path("canary").exists()


@pytest.mark.parametrize("arch", ["dinolike/models/vision.py:vision", ARCH])
def test_factory_in_a_package_imports_relatively_when_named_so(
    trained: torch.nn.Module, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(sys.path)
    module = factory_from_text(arch, {"dim": 4}).module
    assert module.token.shape == (1, 1, 4)
    assert sys.path == before
    identity = architecture_identity(arch)
    assert architecture_identity(arch) == identity
    assert architecture_identity(arch, ["dim=4"]) != identity
    block = Path("dinolike/layers/block.py")
    block.write_text(block.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    assert architecture_identity(arch) != identity, "the whole package is part of what was named"


def test_package_makes_room_when_another_folder_has_one_of_its_name(
    trained: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "dinolike"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("", encoding="utf-8")
    (other / "net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(7, 1)\n", encoding="utf-8")
    factory_from_text(ARCH)
    assert factory_from_text(f"{other}/net.py:make").module.in_features == 7
    assert factory_from_text(ARCH).module is not None


def test_package_is_refused_when_it_has_the_name_of_one_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "numpy"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "net.py").write_text("def make(): pass\n", encoding="utf-8")
    with pytest.raises(ModelFileError) as caught:
        factory_from_text(f"{folder}/net.py:make")
    assert caught.value.code == "VLX0110"
    assert "called 'numpy', as one that is in use" in caught.value.message
    assert sys.modules["numpy"] is np


@pytest.mark.parametrize(
    ("arch", "part"),
    [
        ("no_such_package.net:make", "ModuleNotFoundError"),
        ("dinolike.models.visio:vision", "ModuleNotFoundError"),
        ("dinolike.models.vision:visio", "did you mean 'vision'?"),
    ],
)
def test_package_is_blamed_when_it_has_no_such_part(trained: torch.nn.Module, arch: str, part: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        factory_from_text(arch)
    assert caught.value.code == "VLX0110"
    assert part in caught.value.message


def test_arguments_are_literals_where_they_can_be() -> None:
    found = arguments_from_text(["depth=12", "drop=0.5", "act='gelu'", "name=vit", "sizes=(1, 2)", "on=True", "a=b=c"])
    assert found == {
        "depth": 12, "drop": 0.5, "act": "gelu", "name": "vit", "sizes": (1, 2), "on": True, "a": "b=c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "part"),
    [(["depth"], "NAME=VALUE"), (["=1"], "NAME=VALUE"), (["a-b=1"], "NAME"), (["a=1", "a=2"], "twice")],
)
def test_argument_is_refused_when_it_is_not_understood(texts: list[str], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        arguments_from_text(texts)
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--arch-arg")
    assert part in caught.value.message


def test_arguments_reach_timm_when_given() -> None:
    assert factory_from_text("timm:test_vit", {"num_classes": 7}).module.num_classes == 7
    with pytest.raises(ModelFileError) as caught:
        factory_from_text("timm:test_vit", {"nonsense": 7})
    assert (caught.value.code, caught.value.hint) == ("VLX0110", "check --arch-arg")
    for name, value in (("pretrained", True), ("checkpoint_path", "other.pth")):
        with pytest.raises(UsageError, match=f"{name} would fetch weights"):
            factory_from_text("timm:test_vit", {name: value})


WEIGHTS = {"a": torch.ones(2), "b.c": torch.ones(3)}


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("ema.state_dict", {"ema": {"state_dict": WEIGHTS, "decay": 0.9}, "model": {"a": torch.zeros(1)}}),
        ("generator", {"generator": WEIGHTS}),
        ("a.b", {"a.b": WEIGHTS, "a": {"b": 1}}),
        ("a.b.c", {"a.b": {"c": WEIGHTS}, "a": {"b": 3}}),
    ],
)
def test_entry_is_found_when_its_path_is_given(tmp_path: Path, key: str, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt", weights_key=key)
    assert found.tensors.keys() == WEIGHTS.keys()
    assert found.notes == (f"the weights are the checkpoint's entry '{key}'",)


def test_entries_are_listed_when_none_is_the_one_asked_for(tmp_path: Path) -> None:
    torch.save({"nets": {"first": WEIGHTS, "second": WEIGHTS}, "epoch": 3}, tmp_path / "w.pt")
    for key, part in (("nets.frst", "did you mean 'nets.first'?"), (None, "any of model, state_dict")):
        with pytest.raises(ModelFileError) as caught:
            read_weights(tmp_path / "w.pt", weights_key=key)
        assert caught.value.code == "VLX0104"
        assert part in caught.value.message
        assert "it holds state dicts under 'nets.first', 'nets.second'" in caught.value.hint


def test_keys_beside_a_prefix_are_refused_when_the_others_are_not_all() -> None:
    stored = {f"backbone.{name}": each for name, each in WEIGHTS.items()} | {"head.weight": torch.ones(1)}
    fitted, notes = fit_state_dict(stored, WEIGHTS)
    assert fitted.keys() == WEIGHTS.keys()
    assert "left out: 'head.weight'" in notes[-1]
    for changed in (
        {name: each for name, each in stored.items() if name != "backbone.a"},
        {**stored, "backbone.more": torch.ones(1)},
    ):
        with pytest.raises(ModelFileError) as caught:
            fit_state_dict(changed, WEIGHTS)
        assert caught.value.code == "VLX0109"
