"""Which engines this user compiled on this machine. Deserialising any other one is running a stranger's code.

TensorRT's engines hold kernels and a format that the runtime does not check. The ledger is a file of SHA-256 digests in
the cache's folder, mode 0600; an engine is let through by its content, never by its name or by what a bundle says. No
torch, and no native library: a refusal comes before anything parses the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from pathlib import Path

from vlexport.core.cache import OFF, Cache
from vlexport.core.errors import BundleError, CapabilityError

LEDGER_FILE = "engines.sha256"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_LEDGER_BYTES = 16 << 20
_MODE = 0o600


def remember_engine(engine: bytes) -> bool:
    """Write down an engine that was compiled here; returns whether it could be.

    Where there is no folder to trust, nothing is written, and the engine stays unknown.
    """
    try:
        folder = _folder()
        if folder is None:
            return False
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(folder / LEDGER_FILE, flags, _MODE)
        try:
            if _distrust(os.fstat(handle)):
                return False
            os.write(handle, f"{hashlib.sha256(engine).hexdigest()}\n".encode())
        finally:
            os.close(handle)
    except (OSError, BundleError):
        return False
    return True


def known_engine(file: Path, *, allow_code: bool = False) -> bytes:
    """The content of an engine that may be deserialised: the bytes that were checked, not a file that may change.

    Args:
        file: The engine.
        allow_code: The user's consent, given on the command line, to run an engine from elsewhere.

    Raises:
        CapabilityError: VLX0511 when this user did not compile it here, or it cannot be read.
    """
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("it is no file")
            engine = stream.read()
    except OSError as error:
        raise CapabilityError(
            "VLX0511", f"the engine cannot be read: {error.strerror or error}", where=file.name,
            hint="see `vlexport verify` for whether the bundle is intact",
        ) from error  # fmt: skip
    if not allow_code and hashlib.sha256(engine).hexdigest() not in _known():
        raise CapabilityError(
            "VLX0511", "the engine was not compiled here by this user, and an engine is code", where=file.name,
            hint="compile it here from the ONNX file beside it",
        )  # fmt: skip
    return engine


def _folder() -> Path | None:
    """The cache's folder; None where the cache is off. Raises VLX0607 for one that others may write to."""
    return None if os.environ.get("VLEXPORT_CACHE") == OFF else Cache().folder


def _known() -> frozenset[str]:
    """Digests of the ledger; none when it cannot be trusted."""
    with contextlib.suppress(OSError, BundleError):
        folder = _folder()
        if folder is None:
            return frozenset()
        handle = os.open(folder / LEDGER_FILE, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "r", encoding="ascii", errors="replace") as stream:
            if not _distrust(os.fstat(handle)):
                return frozenset(filter(_DIGEST.fullmatch, stream.read(_MAX_LEDGER_BYTES).splitlines()))
    return frozenset()


def _distrust(found: os.stat_result) -> bool:
    """Whether anybody else may have written to the ledger."""
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    private = os.name != "posix" or not found.st_mode & 0o077
    return not (stat.S_ISREG(found.st_mode) and mine and private)
