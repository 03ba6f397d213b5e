"""A folder takes another's place in one step, and what killed builds left beside it goes. No torch.

A build works in a hidden sibling of its output, locked while it lives: the system drops the lock when the process is
killed, so that a later build tells a sibling that nobody works in from one that somebody does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_EXCHANGE = 2
_AT_CWD = -100


@contextlib.contextmanager
def working_sibling(output: Path) -> Iterator[Path]:
    """A new, empty, locked sibling of ``output``; siblings that killed builds left are removed first.

    Raises:
        OSError: It cannot be made.
    """
    for left in _siblings(output):
        with _locked(left) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    with _locked(folder):
        yield folder


def replace_folder(folder: Path, output: Path) -> None:
    """``folder`` becomes ``output``; what stood there is removed.

    On Linux the two change places in one step: a process that is killed leaves the old or the new one. Elsewhere
    the old one is moved away first, and back when the second step fails.
    """
    if not output.exists():
        os.rename(folder, output)
        return
    if exchanged(folder, output):
        if folder.is_symlink():  # what it points to is not the output, and stays
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    os.rename(output, old / "old")
    try:
        os.rename(folder, output)
    except BaseException:
        os.rename(old / "old", output)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchanged(one: Path, other: Path) -> bool:
    """Whether two paths have changed places; False where the system cannot, and then nothing has happened."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # an old C library
        return False
    return bool(call(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0)


def _siblings(output: Path) -> list[Path]:
    """Folders that could be those of builds of this output."""
    pattern = re.compile(re.escape(f".{output.name}.") + r"[a-z0-9_]{8}")
    with contextlib.suppress(OSError):
        found = [each for each in output.parent.iterdir() if pattern.fullmatch(each.name)]
        return [each for each in found if each.is_dir() and not each.is_symlink()]
    return []


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock; whether it could be had. Where there are no locks, it never can."""
    try:
        fcntl = importlib.import_module("fcntl")
        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
