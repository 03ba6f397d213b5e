"""Stored weights under the names that a model expects: which prefixes to strip, and whether names and shapes agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vlexport.core.errors import ModelFileError, nearest

PREFIXES = ("module.", "_orig_mod.", "backbone.")
"""What wrappers put in front of every key; stripped only where that makes all keys match."""

_PREFIX_DEPTH = 3
_SHOWN = 4


@dataclass(frozen=True)
class Fit:
    """How stored keys meet expected ones.

    Attributes:
        names: Stored key → its name in the model.
        prefixes: What was stripped, from the outside in.
        left_out: Stored keys beside the prefix, which the model has no place for.
        misses: Keys that only one side has.
    """

    names: dict[str, str]
    prefixes: tuple[str, ...]
    left_out: tuple[str, ...]
    misses: int


def best_fit(stored: Iterable[str], expected: Iterable[str]) -> Fit:
    """The stripping with the fewest misses.

    A training checkpoint may keep a head beside ``backbone.``: where the keys below a prefix are exactly those that the
    model expects, what lies beside it is left out.
    """
    keys, wanted = list(stored), set(expected)
    found = Fit({key: key for key in keys}, (), (), len(set(keys) ^ wanted))
    for length in range(1, _PREFIX_DEPTH + 1):
        for prefixes in itertools.product(PREFIXES, repeat=length):
            for fit in (_stripped(keys, prefixes, wanted), _inside(keys, prefixes, wanted)):
                if fit is not None and fit.misses < found.misses:
                    found = fit
    return found


def _stripped(keys: list[str], prefixes: tuple[str, ...], wanted: set[str]) -> Fit | None:
    """Prefixes taken off where they are, or None where one is nowhere or two keys would become one."""
    names = {key: key for key in keys}
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names.values()):
            return None
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    made = set(names.values())
    return Fit(names, prefixes, (), len(made ^ wanted)) if len(made) == len(keys) else None


def _inside(keys: list[str], prefixes: tuple[str, ...], wanted: set[str]) -> Fit | None:
    """The keys below the joined prefix alone, if they are all that the model expects."""
    joined = "".join(prefixes)
    names = {key: key.removeprefix(joined) for key in keys if key.startswith(joined)}
    if set(names.values()) != wanted:
        return None
    return Fit(names, prefixes, tuple(key for key in keys if key not in names), 0)


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
    wanted = list(dict.fromkeys(expected))
    fit = best_fit(state, wanted)
    renamed = {name: state[key] for key, name in fit.names.items()}
    if problems := _key_problems(renamed, wanted):
        raise ModelFileError(
            "VLX0109",
            "the weights do not fit the architecture: " + "; ".join(problems),
            hint="check --arch and its arguments, or choose another entry with --weights-key",
        )
    if isinstance(expected, Mapping):
        _require_shapes(renamed, expected)
    notes = [f"stripped the prefix '{prefix}' from the checkpoint's keys" for prefix in fit.prefixes]
    if fit.left_out:
        beside = f"{len(fit.left_out)} of the checkpoint's keys lie beside '{''.join(fit.prefixes)}'"
        notes.append(f"{beside} and were left out: {listed(fit.left_out)}")
    return renamed, tuple(notes)


def _key_problems(state: Mapping[str, Tensor], wanted: list[str]) -> list[str]:
    known = set(wanted)
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in known]
    problems = []
    if missing:
        near = nearest(missing[0], unexpected).removeprefix("; did you mean ")
        hint = f" (nearest to the first in the file: {near.removesuffix('?')})" if near else ""
        problems.append(f"{len(missing)} missing: {listed(missing)}{hint}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
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


def listed(names: Iterable[str]) -> str:
    """The first names in quotes, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in every[:_SHOWN]) + more
