"""Peers: other toolchains, each in a virtual environment of its own that is made here, spoken to in JSON.

A peer is a script of ``tests/benchmarks/peer_scripts`` and the requirements beside it (``NAME.py``, ``NAME.txt``, exact
versions). Its environment lies under a scratch folder and is made once for those requirements, by pip with whatever
index pip is configured for. Nothing of this project, nor of its environment, can be imported there. What cannot be
installed, dies, or takes too long raises :class:`PeerError` with the last line it said: a benchmark records that line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from vlexport.core.huge_pages import with_huge_pages

SCRIPTS = Path(__file__).resolve().parent / "peer_scripts"
SHARED = ("child.py", "onnx_session.py")
BORROWING = ("vlexport_openvino",)
"""Environments of vlexport with another runtime: behind their own packages they see those of this interpreter."""
"""What scripts import from beside them."""
INSTALL_SECONDS = 1500.0
ANSWER_SECONDS = 1200.0
_CLOSE_SECONDS = 10.0
_LAST_LINE = 300
"""Characters of it that are kept."""


_FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/'\":]+/)+")


class PeerError(Exception):
    """A peer could not be installed, died, or took too long; the message is one line without paths."""


@dataclass(frozen=True)
class Environment:
    """Where a peer runs.

    Attributes:
        name: Of the script and of its requirements.
        scripts: Folder of both.
    """

    name: str
    scripts: Path = SCRIPTS

    @property
    def script(self) -> Path:
        """What answers."""
        return self.scripts / f"{self.name}.py"

    @property
    def requirements(self) -> Path:
        """One exact version a line; where there are none, the interpreter that runs the benchmark serves."""
        return self.scripts / f"{self.name}.txt"

    def digest(self) -> str:
        """Of all that decides what this peer does."""
        files = (self.script, *(self.scripts / each for each in SHARED), self.requirements)
        return hashlib.sha256(b"\0".join(f.read_bytes() for f in files if f.is_file())).hexdigest()


def installed(
    environment: Environment, scratch: Path, *, timeout_s: float = INSTALL_SECONDS, retry: bool = False
) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there.

    Args:
        environment: The peer's.
        scratch: Folder of all environments.
        timeout_s: Seconds for pip.
        retry: Try again what could not be installed before; otherwise that is said from memory.

    Raises:
        PeerError: It cannot be installed.
    """
    if not environment.requirements.is_file():
        return Path(sys.executable)
    folder = scratch / environment.name
    python, state = folder / "bin/python", scratch / f"{environment.name}.json"
    key = hashlib.sha256(environment.requirements.read_bytes() + sys.version.encode()).hexdigest()
    known = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    if known.get("key") == key and not (known["failed"] and retry):
        if known["failed"]:
            raise PeerError(known["failed"])
        return python
    scratch.mkdir(parents=True, exist_ok=True)
    failed = _install(environment, folder, timeout_s)
    state.write_text(json.dumps({"key": key, "failed": failed}) + "\n", encoding="utf-8")
    if failed:
        raise PeerError(failed)
    return python


def _install(environment: Environment, folder: Path, timeout_s: float) -> str:
    """Make the environment anew; why that failed, or nothing."""
    borrows = environment.name in BORROWING
    wanted = ["-r", str(environment.requirements), *(["--no-deps"] if borrows else [])]
    commands = (
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)],
        [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q", *wanted],
    )
    for command in commands:
        try:
            done = subprocess.run(
                command, env=_surroundings(), capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"not installed within {timeout_s:.0f} s"
        if done.returncode:
            return last_line(done.stderr + done.stdout)
    if borrows:
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    return ""


class Peer:
    """A peer's script in a process of its own; close it, or use it as a context.

    Args:
        environment: Whose script.
        python: The interpreter, from :func:`installed`.
        threads: Told to runtimes that read it from the environment.
        timeout_s: Seconds that one answer may take; a peer that takes longer is killed.
    """

    def __init__(
        self, environment: Environment, python: Path, *, threads: int = 0, timeout_s: float = ANSWER_SECONDS
    ) -> None:
        self._name = environment.name
        self._timeout_s = timeout_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            [str(python), str(environment.script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=_surroundings(threads),
        )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One answer.

        Raises:
            PeerError: The peer died, or took too long.
        """
        with contextlib.suppress(OSError):
            channel = cast("IO[bytes]", self._child.stdin)
            channel.write(json.dumps(request).encode() + b"\n")
            channel.flush()
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise PeerError(f"{self._name} did not answer {request['do']!r} within {self._timeout_s:g} s") from None
        if not line:
            code = self._child.wait()
            self._stderr.seek(0)
            said = last_line(self._stderr.read().decode(errors="replace"))
            raise PeerError(said or f"{self._name} ended with {code} and said nothing")
        return cast("dict[str, Any]", json.loads(line))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            cast("IO[bytes]", self._child.stdin).close()
        try:
            self._child.wait(0 if self._timeout_s < _CLOSE_SECONDS else _CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _read(self) -> None:
        for line in cast("IO[bytes]", self._child.stdout):
            self._lines.put(line)
        self._lines.put(b"")


class PeerSession:
    """An opened artifact of a peer, as ``vlexport profile`` times one.

    Args:
        peer: Its process, which serves nothing else.
        recipe: What the artifact is.
        folder: Where it lies.
        threads: For the runtime.

    Attributes:
        load_ms: Milliseconds of opening it, the runtime having been imported.
        cold_load_ms: The same with the import of the runtime.
    """

    def __init__(self, peer: Peer, recipe: str, folder: Path, *, threads: int) -> None:
        self._peer = peer
        self.cold_load_ms = float(
            peer.ask(do="open", recipe=recipe, folder=str(folder), threads=threads)["cold_load_ms"]
        )
        self.load_ms = self.cold_load_ms

    def run_all(self, inputs: Path) -> np.ndarray:
        """The first output of every sample of an archive, ``(N, ...)``."""
        with tempfile.TemporaryDirectory(prefix="vlexport-peer-") as place:
            outputs = Path(place) / "outputs.npz"
            self._peer.ask(do="run", inputs=str(inputs), outputs=str(outputs))
            with np.load(outputs, allow_pickle=False) as found:
                return cast("np.ndarray", found["output"])

    def time_ms(self, inputs: Mapping[str, np.ndarray], *, warmup: int, runs: int) -> list[float]:
        """Milliseconds of ``runs`` runs of one sample, measured in the peer's process after ``warmup`` runs."""
        with self._written(inputs) as file:
            found = self._peer.ask(do="time", inputs=str(file), warmup=warmup, runs=runs)
        return [float(each) for each in found["times_ms"]]

    def reload_ms(self) -> float:
        """Milliseconds of opening the artifact a second time, in the process that has imported everything."""
        return float(self._peer.ask(do="reload")["load_ms"])

    def peak_memory_bytes(self) -> int | None:
        """The most resident memory of the peer's process since it started."""
        return cast("int | None", self._peer.ask(do="memory")["peak_bytes"])

    @contextlib.contextmanager
    def _written(self, inputs: Mapping[str, np.ndarray]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="vlexport-peer-") as place:
            file = Path(place) / "inputs.npz"
            np.savez(file, **inputs)  # type: ignore[arg-type]
            yield file


def last_line(text: str) -> str:
    """The last line that says something, without the folders of paths; of pip and vlexport, the last error."""
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice]"))
    ]
    errors = [line for line in lines if line.startswith(("ERROR:", "error "))]
    chosen = (errors or lines or [""])[-1]
    return _FOLDERS.sub("", chosen)[:_LAST_LINE]


def _surroundings(threads: int = 0) -> dict[str, str]:
    """The environment variables of a peer: none through which this project's Python or threads would reach it.

    Memory in huge pages is asked for, as for our own sessions.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_", "MKL_", "VIRTUAL"))
    }
    kept |= {"PYTHONNOUSERSITE": "1", "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "false"}
    return with_huge_pages(kept | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
