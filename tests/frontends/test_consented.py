"""Files that are code open with ``--allow-code`` alone; exported programs of others pass the guard, or need it too."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.pickle_mutator import Bomb
from vlexport.cli.main import main
from vlexport.core.config import BuildConfig, config_from
from vlexport.core.errors import CaptureError, ModelFileError, UsageError, VlexportError
from vlexport.frontends.archive_zip import read_members, write_members
from vlexport.frontends.capture import capture
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.source import open_source

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, image):
        y = self.head(self.conv(image).relu().mean((2, 3)))
        return {"scores": y, "share": y.softmax(-1)}
"""
INPUT = ("image=1x3x8x8",)
OLDEST_MINOR = 2


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network of a module in the current directory, which nothing else can import."""
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(NET, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import own_net  # type: ignore[import-not-found]

    torch.manual_seed(0)
    yield own_net.Net().eval()
    sys.modules.pop("own_net", None)


def opened(model: str | Path, **options: Any) -> Any:
    return open_source(BuildConfig(model=str(model), **options))


def refused(model: str | Path, code: str, **options: Any) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        opened(model, **options)
    assert caught.value.code == code, caught.value.message
    return caught.value


def assert_computes(source: Any, module: Any, names: tuple[str, ...], batch: int = 3) -> None:
    image = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = module(image)
    found = source.run({"image": image.numpy()})
    assert tuple(found) == names
    for name, each in zip(names, wanted.values() if isinstance(wanted, dict) else [wanted], strict=True):
        np.testing.assert_allclose(found[name], each.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: {"epoch": 1, "model": net}], ids=["alone", "as an entry"]
)
def test_pickled_module_opens_only_with_consent(net: Any, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(wrap(net), "net.pt")
    sys.modules.pop("own_net")
    error = refused("net.pt", "VLX0108", input=INPUT)
    assert "own_net.Net" in error.message
    assert "--allow-code" in error.hint
    assert "own_net" not in sys.modules, "not even its module is imported"
    assert "--input" in refused("net.pt", "VLX0703", allow_code=True).where
    source = opened("net.pt", input=INPUT, allow_code=True)
    assert_computes(source, net, ("scores", "share"))
    assert any("own code was run" in note for note in source.notes)
    Path("own_net.py").unlink()
    sys.modules.pop("own_net")
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(Path.cwd())])
    assert "No module named 'own_net'" in refused("net.pt", "VLX0108", input=INPUT, allow_code=True).message


def test_weights_want_an_architecture_when_code_is_allowed(net: Any) -> None:
    torch.save(net.state_dict(), "weights.pt")
    refused("weights.pt", "VLX0107", input=INPUT, allow_code=True)


def test_canary_runs_only_with_consent(tmp_path: Path) -> None:
    torch.save({"model": Bomb(tmp_path / "canary")}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "VLX0108")
    assert not (tmp_path / "canary").exists()
    refused(tmp_path / "evil.pt", "VLX0108", allow_code=True)
    assert (tmp_path / "canary").exists(), "consent is what it says"


def test_consent_is_not_taken_from_a_recipe_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("allow_code = true\n", encoding="utf-8")
    with pytest.raises(UsageError, match="may not consent"):
        config_from({"model": "m.pt"}, recipe=recipe)
    for name in ("ALLOW_CODE", "VLEXPORT_ALLOW_CODE", "VLEXPORT_BUILD_ALLOW_CODE"):
        monkeypatch.setenv(name, "1")
    torch.save({"model": Bomb(tmp_path / "canary")}, tmp_path / "evil.pt")
    assert main(["build", str(tmp_path / "evil.pt"), "-o", str(tmp_path / "made")]) == 1
    assert not (tmp_path / "canary").exists()
    assert "allow_code" not in BuildConfig(model="m.pt", allow_code=True).recipe()


def test_recipe_may_name_code_only_with_consent_and_outside_of_a_bundle(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for arch in ("net.py:make", "package.module:make"):
        recipe.write_text(f'arch = "{arch}"\n', encoding="utf-8")
        with pytest.raises(UsageError, match="may not name code"):
            config_from({"model": "m.pt"}, recipe=recipe)
        assert config_from({"model": "m.pt", "allow_code": True}, recipe=recipe).arch == arch
    (tmp_path / "bundle.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="may not name code"):
        config_from({"model": "m.pt", "allow_code": True}, recipe=recipe)
    recipe.write_text('arch = "transformers:vit"\n', encoding="utf-8")
    assert config_from({"model": "m.pt"}, recipe=recipe).arch == "transformers:vit"
    assert "transformers" not in BuildConfig(model="m.pt", arch="transformers:vit").recipe(), "it names a place"


class Chooses(nn.Module):
    """Scripted, it keeps its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        y = self.conv(image).mean((2, 3))
        if y.shape[1] > 1:
            y = y * 2
        return y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["traced", "scripted"])
def test_torchscript_is_converted_only_with_consent(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    net, path = Chooses().eval(), tmp_path / "net.pt"
    made = torch.jit.script(net) if how == "scripted" else torch.jit.trace(net, torch.ones(1, 3, 8, 8))
    torch.jit.save(made, path)
    assert "--allow-code" in refused(path, "VLX0108", input=INPUT).hint
    asked = refused(path, "VLX0703", allow_code=True)
    assert "they are called image" in asked.message
    refused(path, "VLX0703", allow_code=True, input=("picture=1x3x8x8",))
    source = opened(path, allow_code=True, input=INPUT)
    assert source.program.signature.inputs[0].shape == ("batch", 3, 8, 8)
    assert_computes(source, net, ("output",))
    failed = refused(path, "VLX0108", allow_code=True, input=("image=1x4x8x8",))
    assert "cannot be opened even with its code" in failed.message


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(x) * scale, "sum": x.sum(-1)}


@pytest.fixture(scope="module")
def exported() -> bytes:
    """What ``torch.export.save`` writes for a network with a dynamic batch."""
    torch.manual_seed(0)
    batch = Dim("batch", min=1, max=64)
    example = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1))
    program = torch.export.export(Two().eval(), example, dynamic_shapes={"x": {0: batch}, "scale": None})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def edited(exported: bytes, edit: Any) -> bytes:
    members = {name: bytes(content) for name, content in read_members(exported).items()}
    program = json.loads(members["models/model.json"])
    edit(program)
    return write_members({**members, "models/model.json": json.dumps(program).encode()})


def test_exported_program_of_others_passes_the_guard_when_it_is_clean(tmp_path: Path, exported: bytes) -> None:
    path = tmp_path / "own.pt2"
    path.write_bytes(exported)
    source = opened(path)
    signature = source.program.signature
    assert {spec.name: spec.shape for spec in signature.inputs} == {"x": ("batch", 4), "scale": (1,)}
    assert [spec.name for spec in signature.outputs] == ["scores", "sum"]
    assert (signature.dims["batch"].min, signature.dims["batch"].max) == (1, 64)
    assert source.notes == ()
    module = torch.export.load(io.BytesIO(exported)).module()
    x, scale = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)), torch.full((1,), 2.0)
    found = source.run({"x": x.numpy(), "scale": scale.numpy()})
    with torch.no_grad():
        wanted = module(x, scale)
    for name, each in wanted.items():
        np.testing.assert_allclose(found[name], each.numpy(), rtol=1e-5, atol=1e-6)
    chosen = opened(path, outputs=("sum",))
    assert [spec.name for spec in chosen.program.signature.inputs] == ["x"]
    with pytest.raises(UsageError, match="did you mean 'scores'"):
        opened(path, outputs=("score",))
    with pytest.raises(UsageError, match="given twice"):
        opened(path, outputs=("sum", "sum"))


def test_exported_program_runs_its_pickles_only_with_consent(tmp_path: Path, exported: bytes) -> None:
    buffer = io.BytesIO()
    torch.save(((Bomb(tmp_path / "canary"),), {}), buffer)
    members = {**read_members(exported), "data/sample_inputs/model.pt": buffer.getvalue()}
    path = tmp_path / "own.pt2"
    path.write_bytes(write_members(members))
    error = refused(path, "VLX0106")
    assert "--allow-code" in error.hint
    assert not (tmp_path / "canary").exists()
    with pytest.raises(VlexportError):  # its example is no tensor, so it is no use even then
        opened(path, allow_code=True)
    assert (tmp_path / "canary").exists(), "consent is what it says"


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"graph_module": {"graph": 3}}', b"[" * 100_000])
def test_exported_program_is_damaged_when_its_graph_is_none(tmp_path: Path, exported: bytes, content: bytes) -> None:
    path = tmp_path / "own.pt2"
    path.write_bytes(write_members({**read_members(exported), "models/model.json": content}))
    refused(path, "VLX0105")


def test_older_format_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/serialized_exported_program.json", "{}")
    error = refused(path, "VLX0112")
    assert "older format" in error.message


@pytest.mark.parametrize("minor", range(OLDEST_MINOR, 20, 6))
def test_file_of_an_earlier_torch_opens_when_its_schema_is_of_the_same_kind(
    tmp_path: Path, exported: bytes, minor: int
) -> None:
    """The version fields of a saved archive are edited, and newer optional keys taken out: no such torch is here."""

    def older(program: Any) -> None:
        program["schema_version"]["minor"] = minor
        program["torch_version"] = "2.11.0"
        for key in ("guards_code",):
            program.pop(key, None)

    path = tmp_path / "own.pt2"
    path.write_bytes(edited(exported, older))
    assert [spec.name for spec in opened(path).program.signature.outputs] == ["scores", "sum"]


@pytest.mark.parametrize(("major", "code"), [(7, "VLX0106"), (9, "VLX0111")])
def test_file_is_refused_in_words_when_its_schema_is_of_another_kind(
    tmp_path: Path, exported: bytes, major: int, code: str
) -> None:
    path = tmp_path / "own.pt2"
    path.write_bytes(edited(exported, lambda program: program["schema_version"].update(major=major)))
    assert f"schema {major}" in refused(path, code).message


class Fakes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)


def test_quantized_model_is_refused_in_words_when_captured() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Fakes().eval(), torch.randn(1, 4))
    assert caught.value.code == "VLX0307"
    assert "fake_quantize" in caught.value.message


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights_are_refused_in_words_when_read(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CaptureError) as caught:
        capture(packed.eval(), torch.randn(1, 4))
    assert (caught.value.code, "LinearPackedParams" in caught.value.message) == ("VLX0307", True)
    for content in (
        {"w": tensor, "b": torch.ones(2)},
        {"w": tensor, "evil": Bomb(tmp_path / "c")},
        packed.state_dict(),
    ):
        torch.save(content, tmp_path / "q.pt")
        with pytest.raises(ModelFileError) as refusal:
            read_weights(tmp_path / "q.pt")
        assert refusal.value.code == "VLX0113"
