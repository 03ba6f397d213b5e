"""A child process of a zoo: what aborts, takes too long or takes too much memory costs its rows and not the run."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_alone(words: Sequence[str], place: Path, *, timeout_s: float, memory_bytes: int | None = None) -> str:
    """Run ``python WORDS…`` at the root, and end whatever it started.

    Args:
        words: Arguments of the interpreter.
        place: Its folder for temporary files.
        timeout_s: After that it is killed.
        memory_bytes: Address space it may have; None sets no limit.

    Returns:
        How it ended, in one line.
    """

    def limit() -> None:
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    child = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "VLEXPORT_CACHE": "off", "TMPDIR": str(place)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    try:
        _, said = child.communicate(timeout=timeout_s)
        return f"exit status {child.returncode}: {(said.strip().splitlines() or [''])[-1]}"[:400]
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its own children, too
        child.wait()
