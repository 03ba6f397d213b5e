"""What a target made of a Program is made once: found again while nothing that decides it has changed.

The key holds the Program with all that an artifact shows of it, the target and its options, and everything that runs:
vlexport's source, that of a plugin's package, all installed packages, interpreter and processor. A hit is the same
bytes and the same records; the golden check of a build runs on it as on any artifact.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import vlexport
from vlexport.core.artifact import Artifact, Frozen
from vlexport.core.bundle_schema import PassRecord
from vlexport.core.cache import Cache
from vlexport.core.code_identity import code_digest, installed_digest
from vlexport.core.devices import this_machine
from vlexport.core.progress import Reporter, Silent
from vlexport.ir.identity import program_identity
from vlexport.ir.program import Program
from vlexport.ir.text import tensor_digest
from vlexport.passes.base import Pass
from vlexport.passes.probes import Probe
from vlexport.targets.base import Brief, Target

_OWN = "vlexport"
_TAKING_PART = ("core", "ir", "frontends", "calibration", "passes", "targets", "stages")


class Made(Frozen):
    """What lowering gave beside the files: the artifact's description, and one record per lowered pass."""

    artifact: Artifact
    records: tuple[PassRecord, ...] = ()


def made_once(
    cache: Cache | None,
    key: Mapping[str, Any] | None,
    folder: Path,
    make: Callable[[], Made],
    *,
    what: str,
    reporter: Reporter | None = None,
) -> Made:
    """What ``make`` writes into ``folder``, from the cache where it is known.

    Args:
        cache: None makes it in any case.
        key: From :func:`lowering_key`; None for what cannot be identified.
        folder: Empty or not there yet; the cache is left alone where it is not.
        make: Writes into ``folder``.
        what: For messages (``artifact``).
        reporter: Told of a hit, and of an entry that could not be written.
    """
    reporter = reporter or Silent()
    if cache is None or key is None or (folder.is_dir() and any(folder.iterdir())):
        return make()
    about = cache.take(key, folder)
    if about is not None:
        reporter.note(f"the {what} is from the cache")
        return Made.model_validate(about)
    made = make()
    try:
        cache.keep(key, folder, made.model_dump(mode="json"))
    except OSError as error:
        reporter.note(f"the {what} could not be kept in the cache: {error.strerror or error}")
    return made


def lowering_key(
    what: str,
    target: Target,
    program: Program,
    brief: Brief | None = None,
    *,
    passes: Sequence[Pass[Any]] = (),
    probes: Sequence[Probe] | None = None,
) -> dict[str, Any] | None:
    """Everything that decides what a target makes of a Program.

    Args:
        what: Which of the target's ways.
        target: Its class and tools count; it has no state.
        program: What is lowered.
        brief: What lowering depends on beside the Program; None where it depends on nothing.
        passes: Lowered passes.
        probes: Their gate's inputs, which its figures depend on; None where the gate is off.

    Returns:
        JSON values, or None when a pass is more than its class and options, or its code is in no file.
    """
    if any(set(vars(each)) != {"options"} for each in passes):
        return None
    code = dict(_code([type(target), *map(type, passes)]))
    if None in code.values():
        return None
    seen = None if probes is None or not passes else [_probe_key(probe) for probe in probes]
    return {
        "what": what,
        "target": _class_key(type(target)),
        "program": program_identity(program),
        "brief": _brief_key(brief) if brief is not None else None,
        "passes": [[_class_key(type(each)), each.options.model_dump(mode="json")] for each in passes],
        "probes": seen,
        "threads": torch.get_num_threads(),
        "vlexport": vlexport.__version__,
        "code": code,
        "tools": {**target.tools(), "torch build": torch.__version__},
        "installed": installed_digest(),
        "machine": [platform.python_version(), platform.machine(), *this_machine().instruction_set],
    }


def _brief_key(brief: Brief) -> dict[str, Any]:
    return {
        "options": brief.options.model_dump(mode="json"),
        "device": brief.device.model_dump(mode="json"),
        "precision": brief.precision,
        "threads": brief.threads,
        "name": brief.name,
        "labels": list(brief.labels),
        "preprocess": {name: each.model_dump(mode="json") for name, each in brief.preprocess.items()},
        "fallback": program_identity(brief.fallback) if brief.fallback is not None else None,
    }


def _class_key(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _code(kinds: Sequence[type]) -> Iterator[tuple[str, str | None]]:
    """Package → digest of its source: our own, and those that the classes come from."""
    for part in _TAKING_PART:
        yield part, code_digest(f"{_OWN}.{part}")
    for top in sorted({kind.__module__.partition(".")[0] for kind in kinds} - {_OWN}):
        yield top, code_digest(top)


def _probe_key(probe: Probe) -> list[Any]:
    return [probe.name, [tensor_digest(value) for value in probe.values], list(probe.undecided)]
