"""A child process that answers requests, one at a time.

It is started with ``subprocess`` (a user's ten-line script has no ``__main__`` guard, which ``multiprocessing`` needs).
Frames on its pipes are a JSON header and raw array bytes, never pickle. What it answers with is
:func:`vlexport.core.isolate.serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vlexport.core.artifact import Array
from vlexport.core.errors import CapabilityError, InputError, VlexportError
from vlexport.core.huge_pages import with_huge_pages

_LENGTH = struct.Struct("<Q")
_STDERR_TAIL = 2000
CLOSE_SECONDS = 5.0
"""What an ending may take before the process is killed."""
_SERVE = "import sys; sys.path[:] = filter(None, sys.path); from vlexport.core.isolate import serve; serve()"
"""Without the working directory on its path: a `json.py` that lies beside a bundle must not run."""


class Child:
    """A process and the channel to it.

    Args:
        home: A further folder that it imports from; empty for none.
        imports: A module that it imports before it is asked for anything; empty for none.

    Attributes:
        home: As given.
        pid: Of the process.
    """

    def __init__(self, home: str = "", imports: str = "") -> None:
        self.home = home
        self._expired = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(Path(__file__).resolve().parents[2])
        environment = with_huge_pages(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""), home)))
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-c", _SERVE, imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )
        self.pid = self._process.pid

    @property
    def closed(self) -> bool:
        """Whether it has ended, or was ended."""
        return self._process is None

    def ask(
        self, header: dict[str, Any], arrays: Mapping[str, Array] | None = None, *, timeout_s: float | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """One request and its answer.

        Args:
            header: What to do.
            arrays: Sent behind it.
            timeout_s: Seconds after which the child is killed; None waits for ever.

        Raises:
            CapabilityError: VLX0506 when the child dies or takes too long; what it answers with in place of a result.
        """
        if self._process is None:
            raise CapabilityError("VLX0506", "the session is closed")
        try:
            with self._deadline(self._process, timeout_s):
                send(cast("IO[bytes]", self._process.stdin), header, arrays or {})
                reply, found = receive(cast("IO[bytes]", self._process.stdout))
        except (OSError, EOFError) as error:
            raise self._died(timeout_s) from error
        except BaseException:
            self._process.kill()
            self.close()
            raise
        if "error" in reply:
            raise _rebuilt(reply["error"])
        return reply, found

    def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            cast("IO[bytes]", process.stdin).close()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        cast("IO[bytes]", process.stdout).close()
        self._stderr.close()

    @contextlib.contextmanager
    def _deadline(self, process: subprocess.Popen[bytes], timeout_s: float | None) -> Iterator[None]:
        """Kills the child when time is up, which ends whatever the parent waits for: reading as well as writing."""
        if timeout_s is None:
            yield
            return

        def expire() -> None:
            self._expired = True
            process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _died(self, timeout_s: float | None) -> CapabilityError:
        process = self._process
        assert process is not None
        try:
            code = process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its channel and goes on
            process.kill()
            code = process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace")[-_STDERR_TAIL:].strip()
        self.close()
        if self._expired:
            return CapabilityError(
                "VLX0506", f"the runtime's process gave no answer within {timeout_s:g} s and was killed",
                hint="give it more time, or try another version of the runtime",
            )  # fmt: skip
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = tail.splitlines()[-1] if tail else "it printed nothing"
        return CapabilityError(
            "VLX0506", f"the runtime's process ended unexpectedly ({reason}): {last}",
            hint="the artifact may trigger a bug of the runtime; try another version of it",
        )  # fmt: skip


def require_plain(arrays: Mapping[str, Array]) -> None:
    """Refuse Python objects, which have no bytes to send; nothing that a runtime takes holds them.

    Raises:
        InputError: VLX0507.
    """
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise InputError("VLX0507", f"input {name}: it is an array of Python objects", where=name)


def send(pipe: IO[bytes], header: dict[str, Any], arrays: Mapping[str, Array]) -> None:
    """One frame."""
    dense = {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in arrays.items()}
    about = [{"name": n, "dtype": a.dtype.str, "shape": a.shape, "bytes": a.nbytes} for n, a in dense.items()]
    payload = json.dumps({**header, "arrays": about}).encode()
    pipe.write(_LENGTH.pack(len(payload)))
    pipe.write(payload)
    for array in dense.values():
        pipe.write(array.tobytes())
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next frame: header and arrays."""
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
