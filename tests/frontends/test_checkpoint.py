"""Checkpoints are told apart by content, and read without running what they hold."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from vlexport.core.errors import ModelFileError, VlexportError
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.fit_weights import fit_state_dict
from vlexport.frontends.model_file import kind_of

WEIGHTS = {"conv.weight": torch.arange(8.0).reshape(2, 4), "conv.bias": torch.ones(2)}


class Custom:
    """Pickles by reference to this module."""


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def read_state_dict(path: Path, weights_key: str | None = None) -> dict[str, torch.Tensor]:
    return read_weights(path, weights_key=weights_key).tensors


def error_of(path: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        read_state_dict(path)
    assert caught.value.where == str(path)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "weights"])
def test_state_dict_reads_when_saved_by_torch(tmp_path: Path, name: str, legacy: bool) -> None:
    path = tmp_path / name
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=not legacy)
    assert kind_of(path) == "checkpoint"
    assert equal(read_state_dict(path), WEIGHTS)


def test_state_dict_reads_when_file_is_safetensors_of_any_name(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.bin"
    safetensors.save_file(WEIGHTS, path)
    assert kind_of(path) == "safetensors"
    assert equal(read_state_dict(path), WEIGHTS)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "ema", "teacher", "student"])
def test_state_dict_is_found_when_nested_in_training_checkpoint(tmp_path: Path, key: str) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: WEIGHTS}, path)
    assert equal(read_state_dict(path), WEIGHTS)


def test_first_entry_that_holds_tensors_is_chosen_when_several_could(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    other = {key: value + 1 for key, value in WEIGHTS.items()}
    torch.save({"student": other, "model": {"name": "vit"}, "ema": WEIGHTS}, path)
    assert equal(read_state_dict(path), WEIGHTS)
    assert equal(read_state_dict(path, weights_key="student"), other)


def test_error_names_nearest_entry_when_weights_key_is_misspelt(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"generator": WEIGHTS}, path)
    with pytest.raises(ModelFileError) as caught:
        read_state_dict(path, weights_key="generatr")
    assert caught.value.code == "VLX0104"
    assert "did you mean 'generator'" in caught.value.message


@pytest.mark.parametrize(("content", "code"), [(None, "VLX0101"), ("folder", "VLX0102"), (b"", "VLX0103")])
def test_error_has_its_code_when_file_is_missing_folder_or_empty(
    tmp_path: Path, content: bytes | str | None, code: str
) -> None:
    path = tmp_path / "weights.pt"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert error_of(path).code == code


@pytest.mark.parametrize(
    "content", [b"hello, world", b"<!DOCTYPE html><html>", b"version https://git-lfs\n", b"\0" * 99]
)
def test_error_is_unknown_format_when_file_is_junk(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert kind_of(path) == "unknown"
    assert error_of(path).code == "VLX0104"


def test_error_is_unknown_format_when_checkpoint_holds_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3}, path)
    error = error_of(path)
    assert error.code == "VLX0104"
    assert "'epoch'" in error.message


def test_error_is_damaged_when_zip_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-200])
    assert error_of(path).code == "VLX0105"


def test_error_names_the_global_when_checkpoint_is_a_pickled_module(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    error = error_of(path)
    assert error.code == "VLX0108"
    assert "torch.nn.modules.linear.Linear" in error.message
    assert "state_dict" in error.hint


def test_weights_come_out_when_the_checkpoint_holds_a_foreign_class(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": WEIGHTS, "args": Custom()}, path)
    found = read_weights(path)
    assert equal(found.tensors, WEIGHTS)
    assert any("which was not run" in note and "Custom" in note for note in found.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_error_is_code_when_file_is_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert kind_of(path) == "torchscript"
    assert error_of(path).code == "VLX0108"


def test_no_other_error_escapes_when_bytes_are_flipped_or_cut(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "weights.pt"
    for legacy in (False, True):
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for trial in range(150):
            data = bytearray(whole)
            if trial % 3:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                del data[rng.randrange(1, len(data)) :]
            path.write_bytes(bytes(data))
            try:
                read_state_dict(path)
            except VlexportError as error:
                assert error.code in {"VLX0104", "VLX0105", "VLX0108"}  # noqa: PT017 - the loop is the property


@pytest.mark.parametrize(
    "prefixes",
    [(), ("module.",), ("_orig_mod.",), ("module.", "_orig_mod."), ("_orig_mod.", "module.", "backbone.")],
)
def test_prefixes_are_stripped_when_that_makes_all_keys_match(prefixes: tuple[str, ...]) -> None:
    stored = {"".join(prefixes) + key: value for key, value in WEIGHTS.items()}
    fitted, notes = fit_state_dict(stored, WEIGHTS)
    assert equal(fitted, WEIGHTS)
    assert len(notes) == len(prefixes)
    assert all(prefix in note for prefix, note in zip(prefixes, notes, strict=True))


def test_prefix_stays_when_the_model_itself_has_it() -> None:
    stored = {f"backbone.{key}": value for key, value in WEIGHTS.items()}
    fitted, notes = fit_state_dict(stored, stored)
    assert equal(fitted, stored)
    assert notes == ()


def test_error_lists_keys_and_nearest_when_they_differ() -> None:
    stored = {"conv.weights": WEIGHTS["conv.weight"], "conv.bias": WEIGHTS["conv.bias"]}
    with pytest.raises(ModelFileError) as caught:
        fit_state_dict(stored, WEIGHTS)
    assert caught.value.code == "VLX0109"
    assert "1 missing: 'conv.weight' (nearest to the first in the file: 'conv.weights')" in caught.value.message
    assert "1 unexpected: 'conv.weights'" in caught.value.message


def test_error_names_both_shapes_when_one_differs() -> None:
    with pytest.raises(ModelFileError) as caught:
        fit_state_dict({**WEIGHTS, "conv.bias": torch.ones(3)}, WEIGHTS)
    assert caught.value.code == "VLX0109"
    assert "'conv.bias' is (3,), not (2,)" in caught.value.message


def test_shapes_are_not_compared_when_only_keys_are_given() -> None:
    fitted, _ = fit_state_dict(WEIGHTS, ["conv.weight", "conv.bias"])
    assert equal(fitted, WEIGHTS)
