"""Where a training checkpoint keeps its weights: the entries that are state dicts, among epochs and optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlexport.frontends.inert_values import StoredArray, StoredTensor, Stub, is_quantized_name

WEIGHT_KEYS = ("model", "state_dict", "model_ema", "ema", "teacher", "student")
"""Where training checkpoints keep weights, in the order in which they are preferred."""

Weight = Tensor | StoredTensor | StoredArray
_DEPTH = 3
_MOST_ENTRIES = 1000
_QUANTIZED_TYPES = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


@dataclass(frozen=True)
class Entry:
    """A state dict in a checkpoint.

    Attributes:
        path: Dotted keys that lead to it; empty for the checkpoint itself.
        weights: Its tensors by name.
        left_out: Names of values in it that are no tensors.
        quantized: The name of a quantized value in it, or an empty string.
    """

    path: str
    weights: Mapping[str, Weight]
    left_out: tuple[str, ...]
    quantized: str


def entry_at(content: Any, path: str) -> Entry | None:
    """The state dict at a dotted path; None where there is none. A key may hold dots itself."""
    found = content
    if path:
        found = next((value for value in _values_at(content, path) if _is_state_dict(value)), None)
    return _entry(path, found) if _is_state_dict(found) else None


def entries_of(content: Any) -> list[Entry]:
    """The checkpoint itself if it is a state dict, else those under :data:`WEIGHT_KEYS`, in their order."""
    whole = entry_at(content, "")
    if whole is not None:
        return [whole]
    found = (entry_at(content, key) for key in WEIGHT_KEYS)
    return [entry for entry in found if entry is not None]


def paths_in(content: Any) -> list[str]:
    """Dotted paths of all state dicts, however they are called, down to a few levels."""
    found: list[str] = []
    pending: list[tuple[str, Any, int]] = [("", content, 0)]
    seen = 0
    while pending and seen < _MOST_ENTRIES:
        path, value, depth = pending.pop(0)
        seen += 1
        if path and _is_state_dict(value):
            found.append(path)
        elif isinstance(value, Mapping) and depth < _DEPTH:
            inner = [(key, each) for key, each in value.items() if isinstance(key, str)]
            pending += [(f"{path}.{key}" if path else key, each, depth + 1) for key, each in inner]
    return found


def stub_in(content: Any) -> str:
    """What stands where weights would be, if that is an object that was not made."""
    places = [content, *(content.get(key) for key in WEIGHT_KEYS)] if isinstance(content, Mapping) else [content]
    return next((value.name for value in places if isinstance(value, Stub)), "")


def _values_at(content: Any, path: str) -> Iterator[Any]:
    if not isinstance(content, Mapping):
        return
    if path in content:
        yield content[path]
    position = path.find(".")
    while position >= 0:
        if path[:position] in content:
            yield from _values_at(content[path[:position]], path[position + 1 :])
        position = path.find(".", position + 1)


def _is_state_dict(value: Any) -> bool:
    """Tensors by name; beside them may lie what was not made, and what quantized modules store."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    weights = [each for each in value.values() if isinstance(each, Weight)]
    rest = [each for each in value.values() if not isinstance(each, Weight)]
    if all(isinstance(each, Stub | torch.dtype | tuple | bytes | None) for each in rest):
        return bool(weights) or any(_quantized(each) for each in rest)
    return False


def _entry(path: str, found: Mapping[str, Any]) -> Entry:
    weights = {key: each for key, each in found.items() if isinstance(each, Weight)}
    left_out = tuple(key for key in found if key not in weights)
    quantized = next((key for key, each in found.items() if _quantized(each)), "")
    return Entry(path, weights, left_out, quantized)


def _quantized(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(not isinstance(each, tuple) and _quantized(each) for each in value)
    if isinstance(value, Tensor):
        return value.is_quantized
    if isinstance(value, torch.dtype):
        return value in _QUANTIZED_TYPES
    return isinstance(value, Stub) and is_quantized_name(value.name)
