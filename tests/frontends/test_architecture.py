"""Architectures by name: timm's, and a factory in the user's own file, whatever that file does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vlexport.core.errors import CapabilityError, ModelFileError, UsageError
from vlexport.frontends import architecture
from vlexport.frontends.architecture import architecture_identity, factory_from_text, preprocess_from_timm

NET = """
from __future__ import annotations
import torch
from dataclasses import dataclass

@dataclass
class Settings:
    width: int = 4

class Net(torch.nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.head = torch.nn.Linear(settings.width, 2)
    def forward(self, x):
        return self.head(x)

def make():
    return Net(Settings())
"""


def written(folder: Path, text: str, name: str = "net.py") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_timm_gives_module_input_and_preprocessing_when_named() -> None:
    made = factory_from_text("timm:test_vit")
    assert made.inputs.shape == (1, 3, 160, 160)
    assert torch.equal(made.inputs, factory_from_text("timm:test_vit").inputs), "a seeded draw"
    assert made.preprocess is not None
    assert made.preprocess.output_shape == (3, 160, 160)
    assert made.labels == ()
    assert sum(p.numel() for p in made.module.parameters()) == 371_240


def test_tag_chooses_the_recorded_preprocessing_when_given() -> None:
    plain, other = preprocess_from_timm("resnet50.a1_in1k"), preprocess_from_timm("resnet50.tv_in1k")
    assert plain.mean == other.mean
    assert plain != other


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("resnet1", "did you mean 'resnet18'?"),
        ("", "timm has no model ''"),
        ("resnet18.a1_in2k", "did you mean 'a1_in1k'?"),
        ("resnet18.zzzz", "timm has no weights 'zzzz' for 'resnet18'"),
        ("../../etc/passwd", "timm has no model"),
        ("hf-hub:timm/resnet18", "timm has no model"),
    ],
)
def test_nearest_is_named_when_timm_does_not_know_it(name: str, part: str) -> None:
    for make in (lambda: factory_from_text(f"timm:{name}"), lambda: preprocess_from_timm(name)):
        with pytest.raises(ModelFileError) as caught:
            make()
        assert caught.value.code == "VLX0110"
        assert part in caught.value.message


def test_install_line_is_printed_when_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CapabilityError) as caught:
        factory_from_text("timm:resnet18")
    assert caught.value.code == "VLX0501"
    assert "pip install timm" in caught.value.hint


@pytest.mark.parametrize("text", ["resnet18", "net.py", "make", "", "net-1:make", "a..b:make", ":make"])
def test_form_is_refused_when_it_is_neither(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        factory_from_text(text)
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--arch")


def test_factory_is_called_when_its_file_uses_dataclasses(tmp_path: Path) -> None:
    made = factory_from_text(f"{written(tmp_path, NET)}:make")
    assert made.module(torch.zeros(1, 4)).shape == (1, 2)
    assert made.inputs is None
    assert made.preprocess is None


def test_file_imports_its_neighbour_when_run_as_a_script_would(tmp_path: Path) -> None:
    written(tmp_path, NET, "neighbour_of_net.py")
    file = written(tmp_path, "from neighbour_of_net import make\n", "entry.py")
    before = list(sys.path)
    try:
        assert factory_from_text(f"{file}:make").module is not None
        assert sys.path == before
    finally:
        sys.modules.pop("neighbour_of_net", None)


def test_two_files_of_one_name_stay_apart_when_both_are_used(tmp_path: Path) -> None:
    widths = []
    for width in (4, 6):
        folder = tmp_path / str(width)
        folder.mkdir()
        file = written(folder, NET.replace("= 4", f"= {width}"))
        widths.append(factory_from_text(f"{file}:make").module.head.in_features)
    assert widths == [4, 6]


def test_example_inputs_are_taken_when_the_module_has_some(tmp_path: Path) -> None:
    text = NET.replace(
        "return Net(Settings())", "net = Net(Settings())\n    net.example_inputs = torch.ones(1, 4)\n    return net"
    )
    assert factory_from_text(f"{written(tmp_path, text)}:make").inputs.shape == (1, 4)


BROKEN = {
    "no such function": (NET, "mak", "did you mean 'make'?"),
    "no function": ("make = 3\n", "make", "has no function 'make'"),
    "raises": ("def make():\n    raise KeyError('α <b>')\n", "make", "make fails: KeyError: 'α <b>'"),
    "attribute error inside": ("import os\ndef make():\n    os.nothing\n", "make", "make fails: AttributeError"),
    "exits": ("import sys\ndef make():\n    sys.exit(0)\n", "make", "make fails: SystemExit"),
    "exits at import": ("import sys\nsys.exit(0)\n", "make", "importing net.py fails: SystemExit"),
    "syntax": ("def make(:\n", "make", "importing net.py fails: SyntaxError"),
    "import": ("import nothing_of_this_name\n", "make", "importing net.py fails: ModuleNotFoundError"),
    "attribute error at import": ("import os\nos.nothing\n", "make", "importing net.py fails: AttributeError"),
    "wants an argument": ("def make(width):\n    return 1\n", "make", "make fails: TypeError"),
    "returns none": ("def make():\n    pass\n", "make", "make returns a NoneType, not an nn.Module"),
    "returns a class": (NET, "Settings", "Settings returns a Settings, not an nn.Module"),
    "returns weights": ("def make():\n    return {'a': 1}\n", "make", "returns a dict"),
}


@pytest.mark.parametrize(("text", "factory", "part"), BROKEN.values(), ids=BROKEN)
def test_file_is_blamed_when_its_code_goes_wrong(tmp_path: Path, text: str, factory: str, part: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        factory_from_text(f"{written(tmp_path, text)}:{factory}")
    assert caught.value.code == "VLX0110"
    assert part in caught.value.message
    assert caught.value.where.endswith(f"net.py:{factory}")


def test_interrupt_passes_when_the_factory_is_interrupted(tmp_path: Path) -> None:
    file = written(tmp_path, "def make():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        factory_from_text(f"{file}:make")


def test_missing_file_is_named_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        factory_from_text(f"{tmp_path / 'none.py'}:make")
    assert caught.value.code == "VLX0110"
    assert "none.py" in caught.value.where


def test_identity_is_of_the_content_when_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, NET)
    monkeypatch.chdir(tmp_path)
    whole = architecture_identity(f"{file}:make")
    assert architecture_identity("net.py:make") == whole
    assert architecture_identity("net.py:make2") != whole
    file.write_text(NET + "\n", encoding="utf-8")
    assert architecture_identity("net.py:make") != whole
    assert architecture_identity("timm:resnet18") != architecture_identity("timm:resnet34")


def test_nothing_is_fetched_when_an_architecture_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert architecture.factory_from_text("timm:test_resnet").module is not None
