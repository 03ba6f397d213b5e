"""Sessions in a child process: a runtime that aborts takes down a child, not the build.

The child opens one session from an entry point ``module:function(folder, artifact, threads) -> Session``. C++ runtimes
print to file descriptor 1, so it moves its own channel away from it first. Timing loops run inside the child: no figure
contains this channel.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, cast

from vlexport.core.artifact import Array, Artifact, Session, Timing
from vlexport.core.child import CLOSE_SECONDS, Child, receive, require_plain, send
from vlexport.core.errors import CODES, CapabilityError, VlexportError
from vlexport.core.pipeline import artifact_from, open_artifact

_waiting: ContextVar[list[Child] | None] = ContextVar("waiting", default=None)


@contextlib.contextmanager
def reused_children(entry: str = "") -> Iterator[None]:
    """Within, sessions that are opened one after the other share a process, where they say that they may.

    Args:
        entry: Of the sessions to come: a process for them starts right away and imports their runtime meanwhile.
    """
    waiting = [Child(_home_of(entry), _module_of(entry))] if entry else []
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
        for child in waiting:
            child.close()


class IsolatedSession(Session):
    """A session that lives in a child process.

    Args:
        entry: ``module:function`` that opens the session in the child.
        folder: Folder that holds the artifact.
        artifact: What to open.
        threads: Threads for the runtime; 0 leaves it to the runtime.
        timeout_s: Seconds that one answer of the child may take, opening included; None waits for ever. A child that
            takes longer is killed.
        reuse: Within :func:`reused_children`, in a process that has served others. Loading times and memory are not
            the artifact's own then.

    Attributes:
        load_ms: Milliseconds of the first opening in this fresh process, the runtime being imported already.
        cold_load_ms: The same with the import of the runtime.

    Raises:
        CapabilityError: VLX0505 when the runtime refuses the artifact, VLX0506 when the child dies or takes too long.
    """

    def __init__(
        self,
        entry: str,
        folder: Path,
        artifact: Artifact,
        *,
        threads: int = 0,
        timeout_s: float | None = None,
        reuse: bool = False,
    ) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        self._timeout_s = timeout_s
        self._waiting = _waiting.get() if reuse else None
        home = _home_of(entry)
        fitting = next((each for each in self._waiting or () if each.home == home), None)
        if self._waiting is not None and fitting is not None:
            self._waiting.remove(fitting)
        self._child: Child | None = fitting or Child(home)
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
        require_plain(inputs)
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
        require_plain(inputs)
        reply, _ = self._ask({"do": "time", "warmup": warmup, "runs": runs}, inputs)
        return [float(v) for v in reply["times_ms"]]

    def operator_times(self, inputs: Mapping[str, Array], *, runs: int) -> dict[str, tuple[int, float]]:
        """What the runtime's profiler says of the artifact, in the child; empty where times mean nothing."""
        if self.timing != "real":
            return {}
        require_plain(inputs)
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
        """End the child, or leave it to the next session."""
        child, self._child = self._child, None
        if child is None or child.closed:
            return
        if self._waiting is None or _waiting.get() is not self._waiting:  # nobody will end it later
            child.close()
            return
        try:
            child.ask({"do": "close"}, timeout_s=CLOSE_SECONDS)
        except VlexportError:
            child.close()
        else:
            self._waiting.append(child)

    def _ask(
        self, header: dict[str, Any], arrays: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        if self._child is None:
            raise CapabilityError("VLX0506", "the session is closed")
        try:
            return self._child.ask(header, arrays, timeout_s=self._timeout_s)
        finally:
            if self._child.closed:
                self._child = None


def _module_of(entry: str) -> str:
    return entry.partition(":")[0]


def _home_of(entry: str) -> str:
    """The folder from which this process would import a plugin's session: the child must find it there too."""
    spec = importlib.util.find_spec(_module_of(entry).partition(".")[0])
    if spec is None:
        return ""
    places = list(spec.submodule_search_locations or ())
    found = Path(places[0]).parent if places else Path(spec.origin).parent if spec.has_location and spec.origin else ""
    return str(found)


def serve() -> None:
    """The child's loop: one session at a time, one request at a time, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    channel_in = os.fdopen(os.dup(0), "rb")
    channel_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if len(sys.argv) > 1 and sys.argv[1]:
        with contextlib.suppress(ImportError):  # what opens a session says so again
            importlib.import_module(sys.argv[1])
    session: Session | None = None
    opener: Callable[[], Session] | None = None
    while True:
        try:
            request, arrays = receive(channel_in)
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
            elif session is not None and request["do"] == "close":
                session.close()
                session = opener = None
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
        send(channel_out, reply, found)
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
