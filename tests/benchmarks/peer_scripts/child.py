"""What every peer's script does: answer one JSON request a line until its input ends. Needs numpy alone.

A request names what to do, and files; a reply holds figures. Arrays travel in ``.npz`` files, an input of ``N`` samples
as ``(N, ...)``; as many samples are run at once as ``model.json`` says. Standard output is taken away from the peer
before it is imported, since compilers print. Whatever goes wrong ends the process with its traceback: the other side
reports the last line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]
Build = Callable[[str, Path, Path], None]
"""``(recipe, source, output)``: make the artifact of a recipe in the empty folder ``output``. ``source`` holds
``plain.onnx``, ``model.pt`` (``torch.export``), ``calibration.npz`` and ``model.json``."""
Open = Callable[[str, Path, int], Run]
"""``(recipe, folder, threads)``: open what ``Build`` made; the answer runs one batch and gives its first output."""


def serve(build: Build, open_session: Open, packages: Sequence[str]) -> None:
    """Answer until the input ends.

    Args:
        build: Makes an artifact.
        open_session: Opens one. Both import the peer themselves, so that opening can be timed with it.
        packages: Whose versions are told.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = _Session(open_session)
    answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "build": lambda request: _built(build, request),
        "open": session.open,
        "reload": session.reload,
        "run": session.run,
        "time": session.time,
        "memory": lambda _: {"peak_bytes": _peak_bytes()},
        "versions": lambda _: {"versions": {name: importlib.metadata.version(name) for name in packages}},
    }
    for line in sys.stdin:
        request = json.loads(line)
        channel.write(json.dumps(answers[request["do"]](request)) + "\n")
        channel.flush()


def calibration(source: Path, limit: int | None = None) -> list[Arrays]:
    """Calibration samples in batches, each ``{input: (batch, ...)}``; at most ``limit`` batches."""
    return batches(source / "calibration.npz")[:limit]


def batches(file: Path) -> list[Arrays]:
    """An archive of a model's folder in batches, each ``{input: (batch, ...)}``."""
    size = json.loads((file.parent / "model.json").read_text(encoding="utf-8")).get("batch", 1)
    arrays = arrays_of(file)
    count = len(next(iter(arrays.values())))
    return [{name: value[i : i + size] for name, value in arrays.items()} for i in range(0, count, size)]


def arrays_of(file: Path) -> Arrays:
    """All of an archive."""
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def has_vnni() -> bool:
    """Whether this processor multiplies 8-bit integers without saturating; Linux."""
    return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


class _Session:
    def __init__(self, open_session: Open) -> None:
        self._open = open_session
        self._how: tuple[str, Path, int] | None = None
        self._run: Run | None = None

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Twice, so that the second shows what opening costs without the import."""
        self._how = (request["recipe"], Path(request["folder"]), request["threads"])
        started = time.perf_counter()
        self._run = self._open(*self._how)
        return {"cold_load_ms": (time.perf_counter() - started) * 1e3}

    def reload(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._how is not None
        started = time.perf_counter()
        self._open(*self._how)
        return {"load_ms": (time.perf_counter() - started) * 1e3}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._run is not None
        outputs = np.concatenate([np.asarray(self._run(batch)) for batch in batches(Path(request["inputs"]))])
        np.savez(request["outputs"], output=outputs)
        return {"samples": len(outputs)}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._run is not None
        inputs = arrays_of(Path(request["inputs"]))
        for _ in range(request["warmup"]):
            self._run(inputs)
        times = []
        for _ in range(request["runs"]):
            started = time.perf_counter()
            self._run(inputs)
            times.append((time.perf_counter() - started) * 1e3)
        return {"times_ms": times}


def _built(build: Build, request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    build(request["recipe"], Path(request["source"]), Path(request["output"]))
    return {"seconds": time.perf_counter() - started, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int | None:
    """Most resident bytes of this process so far (``VmHWM``); None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
