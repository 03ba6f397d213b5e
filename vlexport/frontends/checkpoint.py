"""Weights from checkpoints, without running code that a checkpoint may hold.

``torch.load(weights_only=True)`` comes first; a file that asks for more is read by
:mod:`vlexport.frontends.inert_checkpoint`, which gives tensors and leaves the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlexport.core.errors import ModelFileError, nearest
from vlexport.frontends.checkpoint_entries import (
    WEIGHT_KEYS,
    Entry,
    entries_of,
    entry_at,
    paths_in,
    stub_in,
)
from vlexport.frontends.compat import LOAD_ERRORS
from vlexport.frontends.fit_weights import best_fit, listed
from vlexport.frontends.inert_checkpoint import InertCheckpoint, read_inert
from vlexport.frontends.inert_values import InertError
from vlexport.frontends.model_file import kind_of
from vlexport.frontends.safetensors_file import read_safetensors, shards_of


@dataclass(frozen=True)
class Weights:
    """Tensors by name, as they were stored, and what the user should know about where they came from."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_weights(path: Path, *, weights_key: str | None = None, expected: Iterable[str] = ()) -> Weights:
    """The weights in a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, or in the shards that an index names.

    Formats are told apart by content.

    Args:
        path: The checkpoint.
        weights_key: Dotted path of the entry of a training checkpoint that holds the weights; by default the entry
            under one of :data:`WEIGHT_KEYS` that fits ``expected`` best, the first of equals.
        expected: Names that the model expects.

    Raises:
        ModelFileError: VLX0101 missing, VLX0102 directory, VLX0103 empty, VLX0104 no checkpoint, VLX0105 damaged,
            VLX0108 it needs code to be read, VLX0113 it is quantized.
    """
    kind = kind_of(path)
    if kind == "shards":
        tensors: dict[str, Tensor] = {}
        notes: dict[str, None] = {}
        for shard, names in shards_of(path).items():
            if kind_of(shard) == "shards":
                raise _damaged(shard, "a shard is an index itself")
            part = read_weights(shard)
            if lost := sorted(names - part.tensors.keys()):
                raise _damaged(shard, f"the index promises '{lost[0]}', which the shard does not hold")
            tensors |= {name: part.tensors[name] for name in part.tensors if name in names}
            notes |= dict.fromkeys(part.notes)
        return Weights(tensors, tuple(notes))
    if kind == "safetensors":
        try:
            return Weights(read_safetensors(path))
        except ValueError as error:
            raise _damaged(path, error) from error
    if kind == "torchscript":
        raise ModelFileError(
            "VLX0108",
            "the file is a TorchScript program, which is code",
            where=str(path),
            hint="save the model's state_dict, or the model with vlexport.save",
        )
    if kind != "checkpoint":
        what = "of no known format" if kind == "unknown" else "an exported program, not a checkpoint of weights"
        raise ModelFileError(
            "VLX0104", f"the file is {what}", where=str(path), hint="name a .pt, .pth, .bin or .safetensors checkpoint"
        )
    return _chosen(_opened(path), path, weights_key, list(expected))


def _opened(path: Path) -> InertCheckpoint:
    """By torch's reader where it can, once ours has seen that no part grows far beyond the bytes that it takes."""
    try:
        scanned = read_inert(path)
    except InertError as error:
        raise _damaged(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that this reader may not know: then ours reads on
            content = torch.load(path, weights_only=True, map_location="cpu")
    except LOAD_ERRORS:
        return scanned
    return InertCheckpoint(content, (), _read_already)


def _read_already(_: Any) -> Tensor:
    raise InertError("a storage was not read")


def _damaged(path: Path, error: Exception | str) -> ModelFileError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelFileError(
        "VLX0105",
        f"the checkpoint is truncated or damaged: {reason}",
        where=str(path),
        hint="copy or download the file again",
    )


def _chosen(opened: InertCheckpoint, path: Path, weights_key: str | None, expected: list[str]) -> Weights:
    if weights_key is not None:
        named = entry_at(opened.content, weights_key)
        entries = [] if named is None else [named]
    else:
        entries = entries_of(opened.content)
    if not entries:
        raise _no_weights(opened, path, weights_key)
    entry = min(entries, key=lambda each: best_fit(each.weights, expected).misses) if expected else entries[0]
    _require_float(entry, path)
    try:
        tensors = {name: opened.tensor(each) for name, each in entry.weights.items()}
    except InertError as error:
        raise _damaged(path, error) from error
    return Weights(tensors, _notes(entry, entries, opened.asked))


def _require_float(entry: Entry, path: Path) -> None:
    if entry.quantized:
        raise ModelFileError(
            "VLX0113",
            f"the checkpoint is quantized already: '{entry.quantized}' is no plain tensor",
            where=str(path),
            hint="give the checkpoint from before quantization, and choose a precision with --precision",
        )


def _notes(entry: Entry, entries: list[Entry], asked: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    if entry.path:
        others = [each.path for each in entries if each is not entry]
        also = f"; there are also {listed(others)} (--weights-key)" if others else ""
        notes.append(f"the weights are the checkpoint's entry '{entry.path}'{also}")
    if entry.left_out:
        notes.append(f"left out of the weights, being no tensors: {listed(entry.left_out)}")
    if asked:
        notes.append(f"the checkpoint asks for code, which was not run: {listed(asked)}")
    return tuple(notes)


def _no_weights(opened: InertCheckpoint, path: Path, weights_key: str | None) -> ModelFileError:
    content = opened.content
    if found := stub_in(content):
        return ModelFileError(
            "VLX0108",
            f"the file holds pickled code in place of weights: it asks for '{found}'",
            where=str(path),
            hint="save model.state_dict() instead of the model, or the model with vlexport.save; "
            "--allow-code runs a file that you trust",
        )
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
    paths = paths_in(content)
    holds = f"a dictionary of {listed(sorted(keys))}" if keys else f"a {type(content).__name__}"
    wanted = (
        f"'{weights_key}'{nearest(weights_key, paths or keys)}" if weights_key else "any of " + ", ".join(WEIGHT_KEYS)
    )
    there = f"it holds state dicts under {listed(paths)}: " if paths else ""
    return ModelFileError(
        "VLX0104",
        f"the checkpoint holds no state dict under {wanted}: it is {holds}",
        where=str(path),
        hint=f"{there}name the entry that holds the weights with --weights-key",
    )
