"""Sessions in a child process: a runtime that aborts takes down a child, not the build.

The child is started with ``subprocess`` (a user's ten-line script has no ``__main__`` guard, which ``multiprocessing``
needs) and opens one session from an entry point ``module:function(folder, artifact, threads) -> Session``. Frames on
its pipes are a JSON header and raw array bytes, never pickle. C++ runtimes print to file descriptor 1, so the child
moves its own channel away from it first. Timing loops run inside the child: no figure contains this channel.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vlexport.core.artifact import Array, Artifact, Session, Timing
from vlexport.core.errors import CODES, CapabilityError, InputError, VlexportError

_LENGTH = struct.Struct("<Q")
_STDERR_TAIL = 2000
_CLOSE_SECONDS = 5.0
_CHILD = "import sys; sys.path[:] = filter(None, sys.path); from vlexport.core.isolate import serve; serve()"
"""Without the working directory on its path: a `json.py` that lies beside a bundle must not run."""


class IsolatedSession(Session):
    """A session that lives in a child process.

    Args:
        entry: ``module:function`` that opens the session in the child.
        folder: Folder that holds the artifact.
        artifact: What to open.
        threads: Threads for the runtime; 0 leaves it to the runtime.

    Raises:
        CapabilityError: VLX0505 when the runtime refuses the artifact, VLX0506 when the child dies.
    """

    def __init__(self, entry: str, folder: Path, artifact: Artifact, *, threads: int = 0) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._child: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )
        request = {
            "do": "open",
            "entry": entry,
            "folder": str(folder),
            "artifact": artifact.model_dump(mode="json"),
            "threads": threads,
        }
        try:
            reply, _ = self._ask(request)
        except BaseException:
            self.close()
            raise
        self.timing = cast("Timing", reply["timing"])
        self.load_ms = float(reply["load_ms"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once in the child."""
        _, arrays = self._ask({"do": "run"}, inputs)
        return arrays

    def time_ms(self, inputs: Mapping[str, Array], *, warmup: int, runs: int) -> list[float]:
        """Milliseconds of ``runs`` runs, measured inside the child after ``warmup`` runs.

        Raises:
            CapabilityError: VLX0803 when the session's timing is not real.
        """
        if self.timing != "real":
            raise CapabilityError("VLX0803", f"this session's timing is {self.timing}: not measured here")
        reply, _ = self._ask({"do": "time", "warmup": warmup, "runs": runs}, inputs)
        return [float(v) for v in reply["times_ms"]]

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(OSError):
            cast("IO[bytes]", child.stdin).close()
        try:
            child.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        cast("IO[bytes]", child.stdout).close()
        self._stderr.close()

    def _ask(
        self, header: dict[str, Any], arrays: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        if self._child is None:
            raise CapabilityError("VLX0506", "the session is closed")
        try:
            _send(cast("IO[bytes]", self._child.stdin), header, arrays or {})
            reply, found = _receive(cast("IO[bytes]", self._child.stdout))
        except (OSError, EOFError) as error:
            raise self._died() from error
        except BaseException:
            self._child.kill()
            self.close()
            raise
        if "error" in reply:
            raise _rebuilt(reply["error"])
        return reply, found

    def _died(self) -> CapabilityError:
        child = self._child
        assert child is not None
        try:
            code = child.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its channel and goes on
            child.kill()
            code = child.wait()
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace")[-_STDERR_TAIL:].strip()
        self.close()
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = tail.splitlines()[-1] if tail else "it printed nothing"
        return CapabilityError(
            "VLX0506", f"the runtime's process ended unexpectedly ({reason}): {last}",
            hint="the artifact may trigger a bug of the runtime; try another version of it",
        )  # fmt: skip


def _send(pipe: IO[bytes], header: dict[str, Any], arrays: Mapping[str, Array]) -> None:
    dense = {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in arrays.items()}
    about = [{"name": n, "dtype": a.dtype.str, "shape": a.shape, "bytes": a.nbytes} for n, a in dense.items()]
    payload = json.dumps({**header, "arrays": about}).encode()
    pipe.write(_LENGTH.pack(len(payload)))
    pipe.write(payload)
    for array in dense.values():
        pipe.write(array.tobytes())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    header = json.loads(_exactly(pipe, length))
    arrays = {}
    for about in header.pop("arrays"):
        raw = bytearray(_exactly(pipe, about["bytes"]))
        arrays[about["name"]] = np.frombuffer(raw, np.dtype(about["dtype"])).reshape(about["shape"])
    return header, arrays


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _rebuilt(about: dict[str, Any]) -> VlexportError:
    kind: type[VlexportError] = InputError if about["exit"] == InputError.exit_code else CapabilityError
    return kind(about["code"], about["message"], where=about["where"], hint=about["hint"])


def serve() -> None:
    """The child's loop: one session, one request at a time, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    channel_in = os.fdopen(os.dup(0), "rb")
    channel_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    session: Session | None = None
    while True:
        try:
            request, arrays = _receive(channel_in)
        except EOFError:
            break
        try:
            found: dict[str, Array] = {}
            reply: dict[str, Any] = {}
            if request["do"] == "open":
                module, _, function = request["entry"].partition(":")
                opener = getattr(importlib.import_module(module), function)
                artifact = Artifact.model_validate(request["artifact"])
                started = time.perf_counter()
                session = opener(Path(request["folder"]), artifact, request["threads"])
                reply = {"timing": session.timing, "load_ms": (time.perf_counter() - started) * 1e3}
            elif session is not None and request["do"] == "run":
                found = session.run(arrays)
            elif session is not None:
                reply = {"times_ms": _timed(session, arrays, request["warmup"], request["runs"])}
        except VlexportError as error:
            reply = {"error": {**error.as_dict(), "exit": error.exit_code}}
        except Exception as error:  # runtimes raise their own kinds; the parent names this one
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            reply = {
                "error": {
                    "code": "VLX0505",
                    "message": f"{CODES['VLX0505']}: {text}",
                    "where": "",
                    "hint": "",
                    "exit": 4,
                }
            }
        _send(channel_out, reply, found)
    if session is not None:
        session.close()


def _timed(session: Session, inputs: Mapping[str, Array], warmup: int, runs: int) -> list[float]:
    for _ in range(warmup):
        session.run(inputs)
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        session.run(inputs)
        times.append((time.perf_counter() - started) * 1e3)
    return times
