"""Sessions in a child process: a runtime that aborts takes down a child, not the build.

The child is started with ``subprocess`` (a user's ten-line script has no ``__main__`` guard, which ``multiprocessing``
needs) and opens one session from an entry point ``module:function(folder, artifact, threads) -> Session``. Frames on
its pipes are a JSON header and raw array bytes, never pickle. C++ runtimes print to file descriptor 1, so the child
moves its own channel away from it first. Timing loops run inside the child: no figure contains this channel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vlexport.core.artifact import Array, Artifact, Session, Timing
from vlexport.core.errors import CODES, CapabilityError, InputError, VlexportError
from vlexport.core.huge_pages import with_huge_pages
from vlexport.core.pipeline import artifact_from, open_artifact

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
        timeout_s: Seconds that one answer of the child may take, opening included; None waits for ever. A child that
            takes longer is killed.

    Attributes:
        load_ms: Milliseconds of the first opening in this fresh process, the runtime being imported already.
        cold_load_ms: The same with the import of the runtime.

    Raises:
        CapabilityError: VLX0505 when the runtime refuses the artifact, VLX0506 when the child dies or takes too long.
    """

    def __init__(
        self, entry: str, folder: Path, artifact: Artifact, *, threads: int = 0, timeout_s: float | None = None
    ) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        self._timeout_s = timeout_s
        self._expired = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(Path(__file__).resolve().parents[2])
        environment = with_huge_pages(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (root, os.environ.get("PYTHONPATH", ""), _home_of(entry)))
        )
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
        self.cold_load_ms = float(reply["cold_load_ms"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once in the child."""
        _require_plain(inputs)
        _, arrays = self._ask({"do": "run"}, inputs)
        return arrays

    def time_ms(self, inputs: Mapping[str, Array], *, warmup: int, runs: int) -> list[float]:
        """Milliseconds of ``runs`` runs, measured inside the child after ``warmup`` runs.

        Raises:
            CapabilityError: VLX0803 when the session's timing is not real.
        """
        if self.timing != "real":
            raise CapabilityError(
                "VLX0803", f"this session's timing is {self.timing}: not measured here",
                hint="numbers are right, times would mean nothing; measure where the target's own runtime runs",
            )  # fmt: skip
        _require_plain(inputs)
        reply, _ = self._ask({"do": "time", "warmup": warmup, "runs": runs}, inputs)
        return [float(v) for v in reply["times_ms"]]

    def operator_times(self, inputs: Mapping[str, Array], *, runs: int) -> dict[str, tuple[int, float]]:
        """What the runtime's profiler says of the artifact, in the child; empty where times mean nothing."""
        if self.timing != "real":
            return {}
        _require_plain(inputs)
        reply, _ = self._ask({"do": "operators", "runs": runs}, inputs)
        return {name: (int(count), float(ms)) for name, (count, ms) in reply["operators"].items()}

    def reload_ms(self) -> float:
        """Milliseconds of opening the artifact a second time, beside the first, in the same and now warm process."""
        reply, _ = self._ask({"do": "reload"})
        return float(reply["load_ms"])

    def peak_memory_bytes(self) -> int | None:
        """The most memory that the child has held at once since it started, its interpreter included.

        Resident pages as Linux counts them (``VmHWM``); None on other systems.
        """
        reply, _ = self._ask({"do": "memory"})
        return cast("int | None", reply["peak_bytes"])

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
            with self._deadline(self._child):
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

    @contextlib.contextmanager
    def _deadline(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        """Kills the child when time is up, which ends whatever the parent waits for: reading as well as writing."""
        if self._timeout_s is None:
            yield
            return

        def expire() -> None:
            self._expired = True
            child.kill()

        timer = threading.Timer(self._timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

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
        if self._expired:
            return CapabilityError(
                "VLX0506", f"the runtime's process gave no answer within {self._timeout_s:g} s and was killed",
                hint="give it more time, or try another version of the runtime",
            )  # fmt: skip
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = tail.splitlines()[-1] if tail else "it printed nothing"
        return CapabilityError(
            "VLX0506", f"the runtime's process ended unexpectedly ({reason}): {last}",
            hint="the artifact may trigger a bug of the runtime; try another version of it",
        )  # fmt: skip


def _require_plain(arrays: Mapping[str, Array]) -> None:
    """Python objects have no bytes to send; nothing that a runtime takes holds them."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise InputError("VLX0507", f"input {name}: it is an array of Python objects", where=name)


def _home_of(entry: str) -> str:
    """The folder from which this process would import a plugin's session: the child must find it there too."""
    spec = importlib.util.find_spec(entry.partition(":")[0].partition(".")[0])
    if spec is None:
        return ""
    places = list(spec.submodule_search_locations or ())
    found = Path(places[0]).parent if places else Path(spec.origin).parent if spec.has_location and spec.origin else ""
    return str(found)


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
    opener: Callable[[], Session] | None = None
    while True:
        try:
            request, arrays = _receive(channel_in)
        except EOFError:
            break
        try:
            found: dict[str, Array] = {}
            reply: dict[str, Any] = {}
            if request["do"] == "open":
                started = time.perf_counter()
                opener = _opener(request)
                session, load_ms = _opened(opener)
                cold = (time.perf_counter() - started) * 1e3
                reply = {"timing": session.timing, "load_ms": load_ms, "cold_load_ms": cold}
            elif request["do"] == "memory":
                reply = {"peak_bytes": _peak_memory_bytes()}
            elif opener is not None and request["do"] == "reload":
                again, load_ms = _opened(opener)
                again.close()
                reply = {"load_ms": load_ms}
            elif session is not None and request["do"] == "run":
                found = session.run(arrays)
            elif session is not None and request["do"] == "operators":
                reply = {"operators": session.operator_times(arrays, runs=request["runs"])}
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


def _opener(request: dict[str, Any]) -> Callable[[], Session]:
    """What opens the session; the runtime is imported on the way."""
    module, _, function = request["entry"].partition(":")
    found = getattr(importlib.import_module(module), function)
    artifact = artifact_from(request["artifact"])
    return partial(open_artifact, found, Path(request["folder"]), artifact, request["threads"])


def _opened(opener: Callable[[], Session]) -> tuple[Session, float]:
    started = time.perf_counter()
    session = opener()
    return session, (time.perf_counter() - started) * 1e3


def _peak_memory_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
    return int(found[1]) * 1024 if found else None


def _timed(session: Session, inputs: Mapping[str, Array], warmup: int, runs: int) -> list[float]:
    for _ in range(warmup):
        session.run(inputs)
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        session.run(inputs)
        times.append((time.perf_counter() - started) * 1e3)
    return times
