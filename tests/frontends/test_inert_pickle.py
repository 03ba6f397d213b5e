"""Pickles that nobody trusts give tensors, containers and numbers, and run nothing, whatever is in them."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pickle_mutator import CANARY_MODULE, DATA, Bomb, hostile_parts, members_of, mutated, saved, zipped
from vlexport.core.errors import ModelFileError
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.inert_checkpoint import InertCheckpoint, read_inert
from vlexport.frontends.inert_pickle import InertUnpickler
from vlexport.frontends.inert_values import InertError, Storage, StoredTensor, Stub

WEIGHTS = {"conv.weight": torch.arange(8.0).reshape(2, 4), "conv.bias": torch.ones(2)}
VALUES: dict[str, Any] = {
    "transposed": torch.arange(12.0).reshape(3, 4).t()[1:],
    "parameter": torch.nn.Parameter(torch.arange(4.0)),
    "bfloat16": torch.ones(3).bfloat16(),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
}
"""Tensors in every form that ``torch.save`` has one for."""


def opened(folder: Path, data: bytes) -> InertCheckpoint:
    (folder / "file.pt").write_bytes(data)
    return read_inert(folder / "file.pt")


def weight_of(folder: Path, data: bytes) -> torch.Tensor:
    found = opened(folder, data)
    return found.tensor(found.content["conv.weight"])


def loaded(data: bytes) -> Any:
    return InertUnpickler().load(io.BytesIO(data))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that must not appear; importing the canary's module makes it too."""
    path = tmp_path / "canary"
    (tmp_path / f"{CANARY_MODULE}.py").write_text(f"def make(): pass\nopen({str(path)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch_when_read_without_it(tmp_path: Path, protocol: int, legacy: bool) -> None:
    found = opened(tmp_path, saved(VALUES, protocol=protocol, legacy=legacy))
    for name, wanted in VALUES.items():
        made = found.tensor(found.content[name])
        assert (made.dtype, made.shape, made.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), name
        assert made.clone().untyped_storage().tolist() == wanted.detach().clone().untyped_storage().tolist(), name
    assert found.asked == ()


def test_containers_and_numbers_survive_when_read(tmp_path: Path) -> None:
    content = {
        "list": [1, 2.5, None, True, "α"],
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, b=2),
        "counter": collections.Counter("aab"),
        "set": {1, 2},
        "bytes": b"abc",
        "no bytes": b"",
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "number": np.float64(3.5),
        "long": 2**70,
    }
    for protocol in (2, 4):
        found = opened(tmp_path, saved(content, protocol=protocol))
        assert found.content == {**content, "default": {"b": 2}, "counter": {"a": 2, "b": 1}}
        assert found.asked == ()


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_numbers_survive_when_read(tmp_path: Path, protocol: int) -> None:
    arrays = [np.arange(6.0).reshape(2, 3).T, np.array([1, 2], ">i4"), np.zeros((0, 3)), np.array(["a"], dtype=object)]
    found = opened(tmp_path, saved(arrays, protocol=protocol))
    for wanted, made in zip(arrays[:3], found.content[:3], strict=True):
        np.testing.assert_array_equal(found.tensor(made).numpy(), wanted)
    with pytest.raises(InertError):
        found.tensor(found.content[3])


def test_tied_tensors_stay_tied_when_read(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    found = opened(tmp_path, saved({"a": whole, "b": whole[2:]}))
    a, b = (found.tensor(found.content[key]) for key in "ab")
    a[2] = 9
    assert b[0] == 9


def test_storages_are_not_read_when_nobody_asks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tmp_path, saved({"model": WEIGHTS, "optimizer": {"m": torch.zeros(1000)}}))
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda count, **more: sizes.append(count) or empty(count, **more))
    found.tensor(found.content["model"]["conv.bias"])
    assert sizes == [8]


@pytest.mark.parametrize("number", range(len(hostile_parts(Path("x")))))
def test_nothing_runs_when_a_pickle_calls(canary: Path, number: int) -> None:
    part = hostile_parts(canary)[number]
    data = pickle.PROTO + b"\x04" + pickle.EMPTY_LIST + part + pickle.APPEND + pickle.STOP
    assert isinstance(loaded(data)[0], Stub)
    assert not canary.exists()
    try:
        pickle.loads(data)
    except Exception:
        assert number >= 5, "these two only fail under Python's own"
    assert canary.exists() or number >= 5, "the part must be hostile, or the test shows nothing"
    sys.modules.pop(CANARY_MODULE, None)


@pytest.mark.parametrize("legacy", [False, True])
def test_honest_weights_come_out_when_a_reducer_lies_beside_them(tmp_path: Path, canary: Path, legacy: bool) -> None:
    """Beside the weights, among them, and in place of another entry."""
    content = {
        "args": argparse.Namespace(lr=1.0, names=["a"]),
        "evil": Bomb(canary),
        "model": {**WEIGHTS, "evil": Bomb(canary)},
        "student": Bomb(canary),
    }
    (tmp_path / "w.pth").write_bytes(saved(content, legacy=legacy))
    found = read_weights(tmp_path / "w.pth")
    assert not canary.exists()
    assert {name: each.tolist() for name, each in found.tensors.items()} == {
        name: each.tolist() for name, each in WEIGHTS.items()
    }
    assert any("asks for code, which was not run" in n and "builtins.exec" in n.replace("__builtin__", "builtins")
               for n in found.notes)  # fmt: skip
    assert any("left out of the weights, being no tensors: 'evil'" in n for n in found.notes)
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert canary.exists(), "the reducer must be hostile, or the test shows nothing"


def test_settings_of_a_package_do_no_harm_when_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OmegaConf's are stored: objects that refer to each other, with a state and metadata."""
    module = types.ModuleType("omegaconf.dictconfig")
    kind = type("DictConfig", (), {"__module__": module.__name__})
    module.DictConfig = kind  # type: ignore[attr-defined]
    settings, inner = kind(), kind()
    settings.__dict__ = {"_content": {"lr": 0.1, "model": inner}, "_parent": None}
    inner.__dict__ = {"_content": [1, 2], "_parent": settings}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, module.__name__, module)
        (tmp_path / "w.pth").write_bytes(saved({"cfg": settings, "state_dict": WEIGHTS}))
    found = read_weights(tmp_path / "w.pth")
    assert found.tensors.keys() == WEIGHTS.keys()
    assert "omegaconf.dictconfig" not in sys.modules


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mutated_pickles_run_nothing_when_read(canary: Path) -> None:
    """3,000 pickles: each gives a value, or is refused; what tensors come out lie inside their storage."""
    content = {"args": argparse.Namespace(a=1), "model": WEIGHTS, "arr": np.arange(3), "evil": Bomb(canary)}
    outcomes = collections.Counter[str]()
    for data in mutated(members_of(saved(content))[DATA], count=3000, seed=0, canary=canary):
        try:
            found = InertUnpickler(lambda _: Storage("0", torch.float32, 32)).load(io.BytesIO(data))
        except InertError:
            outcomes["refused"] += 1
            continue
        outcomes["opened"] += 1
        weights = found.get("model") if isinstance(found, dict) else None
        for each in weights.values() if isinstance(weights, dict) else ():
            if isinstance(each, StoredTensor):
                torch.zeros(8).as_strided(each.shape, each.stride, each.offset)
                outcomes["tensors"] += 1
    assert not canary.exists()
    assert CANARY_MODULE not in sys.modules
    assert outcomes["opened"] > 600, outcomes
    assert outcomes["refused"] > 600, outcomes
    assert outcomes["tensors"] > 600, outcomes


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mutated_checkpoints_give_weights_or_an_error_of_ours_when_read(tmp_path: Path, canary: Path) -> None:
    """The whole way, torch's own reader first, in both formats."""
    content = {"model": WEIGHTS, "evil": Bomb(canary)}
    whole, legacy = members_of(saved(content)), saved(content, legacy=True)
    path, codes = tmp_path / "w.pth", collections.Counter[str]()
    files = [zipped({**whole, DATA: data}) for data in mutated(whole[DATA], count=250, seed=1, canary=canary)]
    for file in (*files, *mutated(legacy, count=250, seed=2, canary=canary)):
        path.write_bytes(file)
        try:
            read_weights(path)
            codes["read"] += 1
        except ModelFileError as error:
            codes[error.code] += 1
    assert not canary.exists()
    assert set(codes) <= {"read", "VLX0103", "VLX0104", "VLX0105", "VLX0108", "VLX0113"}
    assert codes["read"] > 30


LONG = b"X" + struct.pack("<I", 60_000) + b"a" * 60_000 + b"q\x00"

BOMBS: dict[str, tuple[bytes, str]] = {
    "key of nested tuples": (b"\x80\x02}" + b")" + b"\x85" * 50_000 + b"K\x01s.", "a key is a"),
    "key that doubles": (b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.", "a key is a"),
    "key of many bits": (b"\x80\x02}\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b"K\x01s.", "64 bits"),
    "list as key": (b"\x80\x02}]K\x01s.", "a key is a list"),
    "text longer than the file": (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc.", "damaged"),
    "bytes longer than the file": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", "damaged"),
    "frame longer than the file": (b"\x80\x04\x95" + struct.pack("<Q", 2**60), "damaged"),
    "decimal of many digits": (b"L" + b"9" * 100_000 + b"L\n.", "damaged"),
    "memo that was never put": (b"\x80\x02h\x07.", "damaged"),
    "mark that was never set": (b"\x80\x02t.", "damaged"),
    "empty stack": (b"\x80\x02.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "persistent id": (b"\x80\x02K\x01Q.", "not there"),
    "buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "call of a number": (b"\x80\x02K\x01)R.", "calls a int"),
    "name that is no text": (b"\x80\x04K\x01K\x02\x93.", "no text"),
    "tuple from too little": (b"\x80\x02K\x01\x87.", "more than it gave"),
    "key without value": (b"\x80\x02}(K\x01u.", "no value"),
    "long name that is asked for again": (
        b"\x80\x04" + LONG + LONG + b"q\x01](" + b"h\x00h\x01\x93" * 99 + b"e.",
        "far more",
    ),
    "text that is encoded again": (
        b"\x80\x02c_codecs\nencode\nq\x01" + LONG + b"X\x06\0\0\0latin1\x86q\x02](" + b"h\x01h\x02R" * 99 + b"e.",
        "far more",
    ),
    "list that is copied again": (
        b"\x80\x02c__builtin__\nset\nq\x01](" + b"K\x01" * 60_000 + b"e\x85q\x02](" + b"h\x01h\x02R" * 99 + b"e.",
        "far more",
    ),
    "bytes that fill arrays again": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\n\x85q\x02"
        b"(K\x01M\x60\xea\x85cnumpy\ndtype\nX\x02\0\0\0u1\x85R\x89B\x60\xea\0\0" + bytes(60_000) + b"tq\x03"
        b"](" + b"h\x01h\x02Rh\x03b" * 99 + b"e.",
        "far more",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_is_refused_when_it_is_a_bomb(name: str) -> None:
    data, part = BOMBS[name]
    with pytest.raises(InertError) as caught:
        loaded(data)
    assert part in str(caught.value)


def test_bomb_is_refused_before_torch_reads_it_when_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, part = BOMBS["text that is encoded again"]
    file = tmp_path / "bomb.pt"
    file.write_bytes(zipped({DATA: data, "version": b"3\n", "byteorder": b"little"}))
    assert len(torch.load(file, weights_only=True)) == 99
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ModelFileError, match=part):
        read_weights(file)


@pytest.mark.parametrize("steps", [b"]" * 60_000 + b"a" * 59_999, b")" + b"\x85" * 60_000], ids=["lists", "tuples"])
def test_deep_containers_are_no_danger_when_nobody_hashes_them(steps: bytes) -> None:
    assert isinstance(loaded(b"\x80\x02" + steps + b"."), list | tuple)


def test_pickle_is_refused_when_it_is_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InertError, match="longer than"):
        InertUnpickler().load(io.BytesIO(pickle.dumps(bytes(2000))), limit=1000)
    monkeypatch.setattr("vlexport.frontends.inert_pickle.MAX_OPCODES", 100)
    with pytest.raises(InertError, match="more steps"):
        loaded(pickle.dumps(list(range(1000))))


CONTAINERS: dict[str, tuple[Any, str]] = {
    "compressed": (lambda m: zipped(m, method=zipfile.ZIP_DEFLATED), "compressed"),
    "bomb": (lambda m: zipped({**m, "data/9": bytes(10_000_000)}, method=zipfile.ZIP_DEFLATED), "compressed"),
    "no storage": (lambda m: zipped({k: v for k, v in m.items() if k != "data/0"}), "does not hold the 32 bytes"),
    "short storage": (lambda m: zipped({**m, "data/0": b"abc"}), "does not hold the 32 bytes"),
    "no pickle": (lambda m: zipped({k: v for k, v in m.items() if k != DATA}), "no data.pkl"),
    "other in front": (lambda m: b"PK\x03\x04" + bytes(99) + zipped(m), "bytes precede it"),
    "other byte order": (lambda m: zipped({**m, "byteorder": b"big"}), "highest byte first"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_file_is_refused_when_its_container_is_wrong(tmp_path: Path, name: str) -> None:
    make, part = CONTAINERS[name]
    with pytest.raises(InertError) as caught:
        weight_of(tmp_path, make(members_of(saved(WEIGHTS))))
    assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_file_is_refused_when_a_member_occurs_twice(tmp_path: Path) -> None:
    data = io.BytesIO(saved(WEIGHTS))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(InertError, match="same name"):
        opened(tmp_path, data.getvalue())


def tensor_pickle(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """``data.pkl`` of a tensor with these numbers over a storage of four floats."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    parts = b"".join(pickle.dumps(each, protocol=2)[2:-1] for each in (offset, size, stride))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + parts + b"\x89Nt" + b"R."


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (0, (2**39, 2**39), (0, 0)), (0, (2, 2), (1,))],
)
def test_tensor_is_refused_when_it_reaches_beyond_its_storage(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    members = {DATA: tensor_pickle(offset, size, stride), "data/0": bytes(16), "version": b"3\n"}
    with pytest.raises(InertError):
        opened(tmp_path, zipped(members))
    fine = opened(tmp_path, zipped({**members, DATA: tensor_pickle(0, (2, 2), (2, 1))}))
    assert fine.tensor(fine.content).shape == (2, 2)


def test_storage_is_refused_when_a_second_name_for_it_says_that_it_is_larger(tmp_path: Path) -> None:
    honest = tensor_pickle(0, (4,), (1,))
    larger = tensor_pickle(0, (9,), (1,)).replace(b"K\x04tQ", b"K\x09tQ")
    data = b"\x80\x02" + honest[2:-1] + larger[2:-1] + b"\x86."
    found = opened(tmp_path, zipped({DATA: data, "data/0": bytes(16), "version": b"3\n"}))
    assert found.tensor(found.content[0]).shape == (4,)
    with pytest.raises(InertError, match="of two sizes"):
        found.tensor(found.content[1])


def test_legacy_file_is_refused_when_it_ends_inside_a_tensor(tmp_path: Path) -> None:
    data = saved(WEIGHTS, legacy=True)
    with pytest.raises(InertError, match="ends before"):
        opened(tmp_path, data[:-4])
