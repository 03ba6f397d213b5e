"""State dicts from checkpoints, without running code that a checkpoint may hold."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlexport.core.errors import ModelFileError, nearest
from vlexport.frontends.compat import LOAD_ERRORS
from vlexport.frontends.model_file import kind_of

WEIGHT_KEYS = ("model", "state_dict", "model_ema", "ema", "teacher", "student")
"""Where training checkpoints keep weights; the first that holds a state dict is taken."""

PREFIXES = ("module.", "_orig_mod.", "backbone.")
"""What wrappers put in front of every key; stripped only where that makes all keys match."""

_REFUSED_GLOBAL = re.compile(r"Unsupported (?:global|class)\w*:?\s+(?:GLOBAL\s+)?([\w.]+)")
_REFUSALS = ("Unsupported", "unrecognized", "Can only", "Trying to")
_PREFIX_DEPTH = 3
_SHOWN = 4


def read_state_dict(path: Path, *, weights_key: str | None = None) -> dict[str, Tensor]:
    """The weights in a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, told apart by content.

    Args:
        path: The checkpoint.
        weights_key: The entry of a training checkpoint that holds the weights; by default the first of
            :data:`WEIGHT_KEYS` that holds a state dict.

    Raises:
        ModelFileError: VLX0101 missing, VLX0102 directory, VLX0103 empty, VLX0104 no checkpoint, VLX0105 damaged,
            VLX0108 it needs code to be read.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        return _read_safetensors(path)
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
    return _weights_in(_unpickled(path), path, weights_key)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).rpartition("WeightsUnpickler error:")[2]
        if not any(word in reason for word in _REFUSALS):
            raise _damaged(path, error) from error
        found = _REFUSED_GLOBAL.search(reason)
        raise ModelFileError(
            "VLX0108",
            f"the file holds pickled code: it asks for '{found.group(1)}'"
            if found
            else "the file holds pickled objects that are neither tensors nor plain containers",
            where=str(path),
            hint="save model.state_dict() instead of the model, or the model with vlexport.save",
        ) from error
    except LOAD_ERRORS as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelFileError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelFileError(
        "VLX0105",
        f"the checkpoint is truncated or damaged: {reason}",
        where=str(path),
        hint="copy or download the file again",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ModelFileError(
            "VLX0104",
            "the file is a safetensors checkpoint, and the package safetensors is not installed",
            where=str(path),
            hint="pip install safetensors",
        ) from error
    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )


def _weights_in(content: Any, path: Path, weights_key: str | None) -> dict[str, Tensor]:
    if weights_key is None and _is_state_dict(content):
        return dict(content)
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, Mapping) else []
    for key in WEIGHT_KEYS if weights_key is None else (weights_key,):
        if key in keys and _is_state_dict(content[key]):
            return dict(content[key])
    holds = f"a dictionary of {_listed(sorted(keys))}" if keys else f"a {type(content).__name__}"
    wanted = f"'{weights_key}'{nearest(weights_key, keys)}" if weights_key else "any of " + ", ".join(WEIGHT_KEYS)
    raise ModelFileError(
        "VLX0104",
        f"the checkpoint holds no state dict under {wanted}: it is {holds}",
        where=str(path),
        hint="name the entry that holds the weights with --weights-key",
    )


def fit_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor] | Iterable[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict under the keys that a model expects, and notes for the user about what was stripped.

    Args:
        state: The weights as they were stored.
        expected: The model's own ``state_dict()``, or its keys alone (then shapes are not compared).

    Raises:
        ModelFileError: VLX0109, no prefix makes the keys match, or a shape differs.
    """
    wanted = dict.fromkeys(expected)
    best: tuple[int, dict[str, Tensor], tuple[str, ...]] | None = None
    for length in range(_PREFIX_DEPTH + 1):
        for prefixes in itertools.product(PREFIXES, repeat=length):
            renamed = _stripped(state, prefixes)
            if renamed is None:
                continue
            misses = len(renamed.keys() ^ wanted.keys())
            if best is None or misses < best[0]:
                best = (misses, renamed, prefixes)
    _, renamed, prefixes = best if best is not None else (0, dict(state), ())
    if problems := _key_problems(renamed, list(wanted)):
        raise ModelFileError(
            "VLX0109",
            "the weights do not fit the architecture: " + "; ".join(problems),
            hint="check --arch and its arguments, or choose another entry with --weights-key",
        )
    if isinstance(expected, Mapping):
        _require_shapes(renamed, expected)
    return renamed, tuple(f"stripped the prefix '{prefix}' from the checkpoint's keys" for prefix in prefixes)


def _stripped(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The state with the prefixes taken off, or None where one is not there or two keys would become one."""
    renamed = dict(state)
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in renamed):
            return None
        shorter = {key.removeprefix(prefix): value for key, value in renamed.items()}
        if len(shorter) != len(renamed):
            return None
        renamed = shorter
    return renamed


def _key_problems(state: Mapping[str, Tensor], wanted: list[str]) -> list[str]:
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in set(wanted)]
    problems = []
    if missing:
        near = nearest(missing[0], unexpected).removeprefix("; did you mean ")
        hint = f" (nearest to the first in the file: {near.removesuffix('?')})" if near else ""
        problems.append(f"{len(missing)} missing: {_listed(missing)}{hint}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    return problems


def _require_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [
        f"'{key}' is {tuple(state[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if state[key].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ModelFileError(
            "VLX0109",
            f"the weights do not fit the architecture: {', '.join(wrong[:_SHOWN])}{more}",
            hint="check --arch and its arguments, the number of classes and the image size among them",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more
