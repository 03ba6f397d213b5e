"""``.npz`` files: equal to numpy's reader where they are good, refused before memory is taken where they are not."""

from __future__ import annotations

import io
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlexport.core import npz
from vlexport.core.npz import read_npz

GOOD = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.array(3, np.int64),
    "none": np.zeros((0, 4), np.int32),
    "texts": np.array(["a", "ünï"]),
    "truths": np.array([True, False]),
}


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1")


def made(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_of_numpy_when_the_file_is_good(save: object, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **GOOD)  # type: ignore[operator]
    found, names = read_npz(tmp_path / "x.npz", [*GOOD, "absent"])
    assert names == tuple(GOOD)
    assert list(found) == list(GOOD)
    for name, array in GOOD.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
HOSTILE = {
    "objects": (npy(np.array([{}], object)), "neither numbers nor texts"),
    "huge-shape": (header(HEADER.format("'<f4'", "(1000000000000,)")), "claims 4000000000000 bytes"),
    "huge-item": (header(HEADER.format("'<U9999999'", "(576,)")), "claims"),
    "negative": (header(HEADER.format("'<f4'", "(-1,)")), "shape"),
    "overflowing": (header(HEADER.format("'<f4'", "(99999999999999999999,)")), "claims"),
    "no-bytes": (header(HEADER.format("'<U0'", "(1000000000000,)")), "claims"),
    "truth-for-size": (header(HEADER.format("'<f4'", "(True,)")) + bytes(4), "shape"),
    "records": (header(HEADER.format("'f4,f4'", "(1,)")) + bytes(8), "neither numbers nor texts"),
    "times": (header(HEADER.format("'<m8[s]'", "(1,)")) + bytes(8), "neither numbers nor texts"),
    "code": (header(HEADER.format("__import__('os')", "(1,)")) + bytes(4), ""),
    "nested": (header("(" * 9000), ""),
    "long-header": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(64), "header has"),
    "no-array": (b"\x80\x04N.", "no array of numpy"),
    "short": (npy(np.ones(8))[:-1], "claims"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_array_is_refused_when_its_header_lies(name: str, tmp_path: Path) -> None:
    content, said = HOSTILE[name]
    file = made(tmp_path / "x.npz", ("x.npy", content))
    with pytest.raises(ValueError) as caught:
        read_npz(file, ["x"])
    assert said in str(caught.value)


def test_file_is_refused_before_it_is_unpacked_when_it_is_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "FREE_BYTES", 1 << 20)
    content = npy(np.zeros(1 << 24, np.uint8))
    file = made(tmp_path / "x.npz", ("x.npy", content), method=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="far more than it holds"):
        read_npz(file, ["x"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB
    assert read_npz(file, ["y"]) == ({}, ("x",))  # what nobody asks for is not unpacked


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_file_is_refused_when_an_array_is_there_twice_or_packed_strangely(tmp_path: Path) -> None:
    one, other = npy(np.ones(2)), npy(np.zeros(2))
    with pytest.raises(ValueError, match="twice"):
        read_npz(made(tmp_path / "a.npz", ("x.npy", one), ("x.npy", other)), ["x"])
    with pytest.raises(ValueError, match="numpy never does"):
        read_npz(made(tmp_path / "b.npz", ("x.npy", one), method=zipfile.ZIP_LZMA), ["x"])
    content = made(tmp_path / "c.npz", ("x.npy", one)).read_bytes()
    (tmp_path / "c.npz").write_bytes(content.replace(one[-8:], bytes(8), 1))
    with pytest.raises(ValueError, match="CRC"):
        read_npz(tmp_path / "c.npz", ["x"])
