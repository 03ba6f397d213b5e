"""MODEL, whatever it is, becomes a Source; what is no model is refused with the line to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlexport.core.config import BuildConfig
from vlexport.core.errors import CaptureError, DataError, ModelFileError, UsageError
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.frontends.architecture import factory_from_text, preprocess_from_timm
from vlexport.frontends.example_inputs import input_specs
from vlexport.frontends.save import save
from vlexport.frontends.source import open_source

ARCH = "timm:resnet18"
SMALL = ("x=1x3x32x32",)
NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 2)
    def forward(self, image):
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))

def make():
    return Net()

def with_inputs():
    net = Net()
    net.example_inputs = torch.randn(1, 3, 8, 8)
    return net

def in_half():
    return Net().half()

def junk_inputs():
    net = Net()
    net.example_inputs = "junk"
    return net
"""


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """timm's resnet18 with seeded weights and moved batch norms."""
    torch.manual_seed(0)
    module = factory_from_text(ARCH).module
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.uniform_(-0.1, 0.1)
            each.running_var.uniform_(0.5, 1.5)
    return module.eval()


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A file with factories; ``net.pth`` beside it holds seeded weights."""
    file = tmp_path / "net.py"
    file.write_text(NET, encoding="utf-8")
    torch.manual_seed(0)
    torch.save(factory_from_text(f"{file}:make").module.state_dict(), tmp_path / "net.pth")
    return file


def stored(folder: Path, content: Any) -> str:
    torch.save(content, folder / "weights.pth")
    return str(folder / "weights.pth")


def opened(model: str | Path, **options: Any) -> Any:
    return open_source(BuildConfig(model=str(model), **options))


def assert_computes(source: Any, module: nn.Module, size: int, *, atol: float = 1e-5) -> None:
    values = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    name = source.program.signature.inputs[0].name
    with torch.no_grad():
        expected: Tensor = module.float()(values)
    found = source.run({name: values.numpy()})["output"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=atol)


WRAPPERS: dict[str, Any] = {
    "state dict": lambda state: state,
    "module.": lambda state: {f"module.{k}": v for k, v in state.items()},
    "_orig_mod.module.": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "checkpoint": lambda state: {"epoch": 7, "state_dict": state, "optimizer": {"lr": 0.1, "m": [torch.ones(2)]}},
    "checkpoint with module.": lambda state: {"epoch": 7, "model": {f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_open_with_their_architecture_when_stored_so(tmp_path: Path, resnet: nn.Module, wrap: Any) -> None:
    source = opened(stored(tmp_path, wrap(resnet.state_dict())), arch=ARCH, input=SMALL)
    assert source.program.signature.inputs[0].shape == ("batch", 3, 32, 32)
    assert_computes(source, resnet, 32)
    prefixed = any(k.startswith(("module.", "_orig_mod.")) for k in wrap({"a": 1}))
    assert any("stripped the prefix" in note for note in source.notes) or not prefixed


def test_preprocessing_is_timms_when_the_input_is_timms(tmp_path: Path) -> None:
    module = factory_from_text("timm:test_vit").module.eval()
    source = opened(stored(tmp_path, module.state_dict()), arch="timm:test_vit")
    name = source.program.signature.inputs[0].name
    assert source.preprocess == {name: preprocess_from_timm("test_vit")}
    assert_computes(source, module, 160)


def test_preprocessing_is_not_recorded_when_the_input_has_another_size(tmp_path: Path, resnet: nn.Module) -> None:
    source = opened(stored(tmp_path, resnet.state_dict()), arch=ARCH, input=SMALL)
    assert source.preprocess == {}
    assert any("makes 3×224×224, input 'x' is 3×32×32" in note and "--preprocess" in note for note in source.notes)


def test_preprocess_flag_wins_when_given(tmp_path: Path, net: Path) -> None:
    spec, other = "resize=10,crop=8,scale=1/127.5,mean=1", "resize=8x8:lanczos"
    source = opened(tmp_path / "net.pth", arch=f"{net}:with_inputs", preprocess=spec)
    assert source.preprocess == {"image": preprocess_from_spec(spec)}
    save(
        factory_from_text(f"{net}:make").module.eval(),
        tmp_path / "m.pt",
        inputs=torch.randn(1, 3, 8, 8),
        preprocess=spec,
    )
    assert opened(tmp_path / "m.pt").preprocess == {"image": preprocess_from_spec(spec)}
    assert opened(tmp_path / "m.pt", preprocess=other).preprocess == {"image": preprocess_from_spec(other)}
    assert opened(tmp_path / "m.pt", preprocess=other).source_hash == opened(tmp_path / "m.pt").source_hash
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "m.pt", preprocess="timm:resnet18")
    assert caught.value.code == "VLX0207"


def test_keys_are_named_when_weights_are_of_another_architecture(tmp_path: Path, resnet: nn.Module) -> None:
    state = dict(resnet.state_dict())
    state["fc.weigth"] = state.pop("fc.weight")
    with pytest.raises(ModelFileError) as caught:
        opened(stored(tmp_path, state), arch=ARCH, input=SMALL)
    assert caught.value.code == "VLX0109"
    assert "'fc.weight'" in caught.value.message
    assert "'fc.weigth'" in caught.value.message


def test_shapes_are_named_when_the_head_is_another(tmp_path: Path, resnet: nn.Module) -> None:
    state = {**resnet.state_dict(), "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}
    with pytest.raises(ModelFileError) as caught:
        opened(stored(tmp_path, state), arch=ARCH, input=SMALL)
    assert caught.value.code == "VLX0109"
    assert "(2, 512), not (1000, 512)" in caught.value.message


def test_nearest_architecture_is_named_when_it_is_misspelt(net: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        opened(net.with_suffix(".pth"), arch="timm:resnet1")
    assert caught.value.code == "VLX0110"
    assert "did you mean 'resnet18'?" in caught.value.message


def test_factory_in_a_file_opens_when_its_input_is_given(tmp_path: Path, net: Path) -> None:
    source = opened(tmp_path / "net.pth", arch=f"{net}:make", input=("image=1x3x8x8",))
    module = factory_from_text(f"{net}:make").module.eval()
    module.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    assert source.program.signature.inputs[0].shape == ("batch", 3, 8, 8)
    assert_computes(source, module, 8)


def test_input_is_asked_for_when_a_factory_does_not_tell(tmp_path: Path, net: Path) -> None:
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "net.pth", arch=f"{net}:make")
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--input")
    assert "--input image=1x3x224x224" in caught.value.hint


def test_arguments_of_forward_are_shown_when_the_input_has_another_name(tmp_path: Path, net: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        opened(tmp_path / "net.pth", arch=f"{net}:make", input=("picture=1x3x8x8",))
    assert caught.value.code == "VLX0302"
    assert "(image)" in caught.value.message


def test_example_inputs_are_refused_when_they_are_junk(tmp_path: Path, net: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        opened(tmp_path / "net.pth", arch=f"{net}:junk_inputs")
    assert caught.value.code == "VLX0302"


def test_half_precision_weights_are_said_when_loaded(tmp_path: Path, resnet: nn.Module) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in resnet.state_dict().items()}
    source = opened(stored(tmp_path, state), arch=ARCH, input=SMALL)
    assert any("half- or double-precision weights were loaded as float32" in note for note in source.notes)
    assert {t.dtype for t in source.program.tensors.values() if t.is_floating_point()} == {torch.float32}


def test_no_precision_is_lost_when_the_factory_gives_a_half_module(tmp_path: Path, net: Path) -> None:
    source = opened(tmp_path / "net.pth", arch=f"{net}:in_half", input=("image=1x3x8x8",))
    module = factory_from_text(f"{net}:make").module.eval()
    module.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    assert_computes(source, module, 8, atol=1e-6)


def test_hash_is_of_content_when_files_move(tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(model: Path, arch: str) -> str:
        found: str = opened(model, arch=arch).source_hash
        return found

    first = hashed(tmp_path / "net.pth", f"{net}:with_inputs")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "renamed.py").write_text(NET, encoding="utf-8")
    (moved / "renamed.bin").write_bytes((tmp_path / "net.pth").read_bytes())
    monkeypatch.chdir(moved)
    assert hashed(Path("renamed.bin"), "renamed.py:with_inputs") == first
    (moved / "renamed.py").write_text(NET.replace("relu()", "tanh()"), encoding="utf-8")
    assert hashed(Path("renamed.bin"), "renamed.py:with_inputs") != first


def test_architecture_is_asked_for_when_a_file_holds_weights(tmp_path: Path, net: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        opened(tmp_path / "net.pth")
    assert caught.value.code == "VLX0107"
    assert "--arch" in caught.value.hint


def test_input_is_refused_when_the_model_has_its_own(tmp_path: Path, net: Path) -> None:
    save(factory_from_text(f"{net}:make").module.eval(), tmp_path / "m.pt", inputs=torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "m.pt", input=("image=1x3x16x16",))
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--input")


@pytest.mark.parametrize("arch", [None, ARCH])
@pytest.mark.parametrize(
    ("kind", "code"), [("missing", "VLX0101"), ("folder", "VLX0102"), ("empty", "VLX0103"), ("text", "VLX0104")]
)
def test_model_is_refused_when_it_is_none(tmp_path: Path, kind: str, code: str, arch: str | None) -> None:
    path = tmp_path / "model.pt"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "no model\n" * 9, encoding="utf-8")
    with pytest.raises(ModelFileError) as caught:
        opened(path, arch=arch)
    assert caught.value.code == code


def test_code_is_not_run_when_a_whole_module_was_pickled(tmp_path: Path) -> None:
    class Opener:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    path = stored(tmp_path, {"state_dict": Opener()})
    for arch in (None, ARCH):
        with pytest.raises(ModelFileError) as caught:
            opened(path, arch=arch)
        assert caught.value.code == "VLX0108"
    assert not (tmp_path / "ran").exists()


def test_inputs_are_made_when_described() -> None:
    found = input_specs(["image=2x3x8x8", "ids=1,6:int64", "mask=4:bool"])
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.items()} == {
        "image": ((2, 3, 8, 8), torch.float32),
        "ids": ((1, 6), torch.int64),
        "mask": ((4,), torch.bool),
    }
    assert torch.equal(found["image"], input_specs(["image=2x3x8x8"])["image"])


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (["image"], "NAME=SHAPE"),
        (["=1x3"], "NAME=SHAPE"),
        (["image="], "NAME=SHAPE"),
        (["image=1x0x3"], "NAME=SHAPE"),
        (["image=1x-3"], "NAME=SHAPE"),
        (["image=1x3.5"], "NAME=SHAPE"),
        (["image=1x²"], "NAME=SHAPE"),
        (["ids=1x3:int46"], "did you mean 'int64'?"),
        (["a=1", "a=2"], "given twice"),
    ],
)
def test_input_is_refused_when_it_is_not_understood(texts: list[str], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        input_specs(texts)
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--input")
    assert part in caught.value.message
