"""Model files, photos and settings that are small and want to become large, or lie about what they hold."""

from __future__ import annotations

import io
import json
import resource
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn

import vlexport
from vlexport.core.config import config_from
from vlexport.core.errors import VlexportError
from vlexport.core.photo_samples import PHOTO_FORMATS, read_photo
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.core.samples import open_data
from vlexport.frontends.archive import check_archive
from vlexport.frontends.archive_zip import read_members, write_members
from vlexport.frontends.checkpoint import read_weights
from vlexport.stages.run import LoadedBundle

STEPS = preprocess_from_spec("resize=8,crop=8,scale=1/255")


def code_of(open_it: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(VlexportError) as caught:
        open_it(*arguments, **options)
    return caught.value.code


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Archives of torch.save and vlexport.save


def repacked(path: Path, method: int, *, repeat: bool = False) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(each.filename, archive.read(each)) for each in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)


def test_checkpoint_is_refused_when_its_members_are_compressed(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1 << 20)}, file)
    assert read_weights(file).tensors["a"].shape == (1 << 20,)
    repacked(file, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 20_000
    before = peak_bytes()
    assert code_of(read_weights, file) == "VLX0105"
    assert peak_bytes() - before < 2 << 20


def test_checkpoint_is_refused_when_its_members_overlap(tmp_path: Path) -> None:
    """The directory names one member's bytes a thousand times."""
    file, content = tmp_path / "weights.pt", bytes(1 << 16)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        first = archive.infolist()[0]
        for number in range(1000):
            again = zipfile.ZipInfo(f"a/data/{number}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = len(content)
            archive.filelist.append(again)
    assert code_of(read_weights, file) == "VLX0105"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    vlexport.save(nn.Sequential(nn.Linear(4, 2)).eval(), path, inputs=torch.zeros(1, 4))
    return {name: bytes(content) for name, content in read_members(path.read_bytes()).items()}


def strided(members: dict[str, bytes], sizes: list[int]) -> bytes:
    name = "data/weights/model_weights_config.json"
    config = json.loads(members[name])
    meta = next(iter(config["config"].values()))["tensor_meta"]
    meta["sizes"] = [{"as_int": size} for size in sizes]
    meta["strides"] = [{"as_int": 0} for _ in sizes]
    return write_members({**members, name: json.dumps(config).encode()})


def test_archive_is_refused_when_strides_of_zero_make_a_weight_huge(members: dict[str, bytes]) -> None:
    for sizes in ([1 << 40], [1 << 25], [1 << 20, 1 << 20]):
        assert code_of(check_archive, strided(members, sizes)) == "VLX0106"
    check_archive(strided(members, [1 << 20]))  # an expanded buffer of 4 MiB is nothing unusual


# Safetensors: the header is the attacker's


def tensors(header: str | bytes, content: bytes = bytes(16)) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + content


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": tensors(json.dumps({"a": entry([2], 0, 8), "b": entry([3], 4, 16)})),
    "hole": tensors(json.dumps({"a": entry([1], 0, 4), "b": entry([1], 12, 16)})),
    "beyond": tensors(json.dumps({"a": entry([400], 0, 1600)})),
    "negative": tensors(json.dumps({"a": entry([4], -16, 0)})),
    "negative-shape": tensors(json.dumps({"a": entry([-4], 0, 16)})),
    "overflow": tensors(json.dumps({"a": entry([2**62, 4], 0, 16)})),
    "wrong-size": tensors(json.dumps({"a": entry([4], 0, 16, "F64")})),
    "wrong-dtype": tensors(json.dumps({"a": entry([4], 0, 16, "OBJ")})),
    "half-bytes": tensors(json.dumps({"a": entry([4], 0, 16, "F4")})),
    "backwards": tensors(json.dumps({"a": entry([4], 16, 0)})),
    "rest": tensors(json.dumps({"a": entry([1], 0, 4)})),
    "duplicate": tensors(f'{{"a":{json.dumps(entry([4], 0, 16))},"a":{json.dumps(entry([2, 2], 0, 16))}}}'),
    "huge-header": (1 << 62).to_bytes(8, "little") + b"{}" + bytes(64),
    "all-header": (66).to_bytes(8, "little") + b"{" + bytes(64),
    "deep": tensors("[" * 100_000),
    "deep-metadata": tensors('{"__metadata__":' + "[" * 100_000),
    "nan": tensors('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "list": tensors("[1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_are_refused_when_the_header_lies(name: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(HEADERS[name])
    assert code_of(read_weights, file) in ("VLX0104", "VLX0105")


def test_safetensors_are_read_when_they_are_good(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(safetensors_bytes({"a": torch.arange(4.0), "b": torch.zeros(0, 2)}))
    found = read_weights(file).tensors
    assert torch.equal(found["a"], torch.arange(4.0))
    assert found["b"].shape == (0, 2)


# Photos


def png(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    about = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


PHOTOS = {
    "bomb": png(60_000, 60_000),
    "widest": png(2**31 - 1, 1),
    "no-height": png(9, 0),
    "truncated": png(900, 900),
    "strange-mode": png(9, 9, depth=7),
    "text": b"no photo",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\n%%EOF\n",
    "icon": b"\x00\x00\x01\x00\x01\x00\x01\x01\x00\x00\x01\x00\x18\x000\x00\x00\x00\x16\x00\x00\x00" + bytes(48),
    "xbm": b"#define w_width 8\n#define w_height 1\nstatic char w_bits[] = {\n0x00};\n",
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photo_is_refused_with_little_memory_when_it_is_hostile(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(PHOTOS[name])
    before = peak_bytes()
    assert code_of(read_photo, file, "a.png", STEPS) == "VLX0203"
    assert peak_bytes() - before < 64 << 20


def test_ghostscript_is_not_asked_when_a_photo_is_postscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    ran: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: ran.append("gs") or Image.new("RGB", (9, 9)).im)
    file = tmp_path / "a.png"
    file.write_bytes(PHOTOS["eps"])
    Image.open(file).load()
    assert ran == ["gs"], "plain pillow runs it: the canary works"
    assert code_of(read_photo, file, "a.png", STEPS) == "VLX0203"
    main = SimpleNamespace(preprocess={"image": STEPS}, artifact=SimpleNamespace(needed_with=lambda name: (name,)))
    assert code_of(LoadedBundle.prepare, SimpleNamespace(bundle=SimpleNamespace(main=main)), file) == "VLX0203"
    assert ran == ["gs"]


@pytest.mark.parametrize("kind", PHOTO_FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photo_is_read_when_its_format_is_on_the_list(kind: str, mode: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new(mode, (9, 12), 100).save(file, kind)
    assert read_photo(file, "a.png", STEPS).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "I;16", "I", "CMYK"])
def test_photo_is_read_when_its_mode_is_rare(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    Image.new(mode, (9, 12)).save(file)
    assert np.isfinite(read_photo(file, "a.tif", STEPS)).all()


def test_exif_is_never_followed_when_it_is_damaged(tmp_path: Path) -> None:
    made = io.BytesIO()
    Image.new("RGB", (9, 9)).save(made, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 600)
    file = tmp_path / "a.jpg"
    file.write_bytes(made.getvalue())
    assert read_photo(file, "a.jpg", STEPS).shape == (3, 8, 8)


# Data and recipes


def test_npz_says_what_it_is_when_it_is_a_bomb(tmp_path: Path) -> None:
    from vlexport.core.artifact import TensorSpec

    file = tmp_path / "x.npz"
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    spec = TensorSpec(name="image", dtype="float32", shape=("batch", 4))
    assert code_of(open_data, str(file), inputs=(spec,), preprocess={}) == "VLX0203"


RECIPES = {
    "deep": "seed = " + "[" * 100_000,
    "deep-table": "[" + ".".join(["a"] * 5000) + "]",
    "digits": "seed = " + "9" * 5000,
    "range": "seed = 1e400",
    "nan": "max_drop = nan",
    "no-text": b"\xff\xfe",
    "allow-code": "allow_code = true",
    "metric": 'metric = ["m.py:f"]',
    "arch": 'arch = "m.py:f"',
    "module": 'arch = "os:system"',
    "data": 'data = "d.py:f"',
    "output": 'output = "/etc/x"',
    "dump": 'dump = "/etc"',
    "force": "force = true",
    "nested-option": "[options]\na = {b = {}}\n[options.c]\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_refused_when_it_asks_for_what_only_the_command_line_may(name: str, tmp_path: Path) -> None:
    file, content = tmp_path / "r.toml", RECIPES[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = ""
    try:
        config = config_from({"model": "m.pt"}, recipe=file)
    except VlexportError as error:
        found = error.code
    if name == "nested-option":  # a text like any other; the option does not exist, and that is said later
        assert found == ""
        assert all(isinstance(value, str) for value in config.options.values())
    else:
        assert found in ("VLX0703", "VLX0705")


def test_environment_gives_no_consent_when_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLEXPORT_ALLOW_CODE", "ALLOW_CODE", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    for name in ("vlexport.toml", ".vlexport.toml", "pyproject.toml"):
        Path(name).write_text("[tool.vlexport]\nallow_code = true\nallow-code = true\n")
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    assert code_of(read_weights, tmp_path / "m.pt") == "VLX0108"
