"""A content-addressed cache on disk, safe with concurrent writers. No torch.

An entry is a folder of files under the SHA-256 of its key: everything that decides its content (inputs, options, tool
and code versions), never a path or a time. It is written to a temporary sibling and renamed, so that a reader sees all
of it or nothing; of two writers the first wins and the second's work is dropped. Files are copied out and their hashes
checked on the way: nobody else gets the cache's own files, and a damaged entry counts as a miss and is written anew.
The least recently used entries go when the cache grows over its cap.

The folder is ``$VLEXPORT_CACHE``, or the platform's cache folder, with mode 0700; one that others own or may write to
is refused, because its hashes lie beside its files. ``VLEXPORT_CACHE=off`` does without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from vlexport.core.bundle import file_record
from vlexport.core.errors import BundleError
from vlexport.core.progress import Reporter

ENTRY_FILE = ".entry.json"
DEFAULT_CAP_BYTES = 10 << 30
OFF = "off"
"""Value of ``VLEXPORT_CACHE`` that switches the cache off; a folder of that name is ``./off``."""
JOURNAL = re.compile(r"search-[0-9a-f]{64}\.jsonl(\.\d+)?")
"""File name of a search's journal, and of one that is being written."""
_TEMPORARY = ".vlexport-"
_ENTRY = re.compile(r"[0-9a-f]{64}")
_STALE_SECONDS = 24 * 3600
"""Age at which half an entry counts as left by a process that was killed."""
_CHUNK = 1 << 20


class Cache:
    """A cache folder.

    Args:
        folder: Default: ``$VLEXPORT_CACHE`` or the platform's.
        cap_bytes: Size above which the least recently used entries go.

    Raises:
        BundleError: VLX0607 when the folder cannot be made, or others own it or may write to it.
    """

    def __init__(self, folder: Path | None = None, *, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        self.folder = folder or default_folder()
        self.cap_bytes = cap_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found, named = self.folder.stat(), self.folder.lstat()
        except OSError as error:
            raise BundleError(
                "VLX0607", f"the cache folder cannot be made: {error.strerror}", where=str(self.folder),
                hint="set VLEXPORT_CACHE to a folder that can be written, or to off",
            ) from error  # fmt: skip
        distrust = _distrust(found, named)
        if distrust:
            raise BundleError("VLX0607", distrust[0], where=str(self.folder), hint=distrust[1])

    def take(self, key: Mapping[str, Any], into: Path) -> dict[str, Any] | None:
        """Copy the files of an entry out of the cache.

        Args:
            key: What decides the content, as JSON.
            into: A folder that is empty or not there yet, and stays so when there is no whole entry.

        Returns:
            What was kept beside the files, or None when there is no entry or it is damaged.
        """
        place = self._place(key)
        scratch = into.with_name(f".{into.name}.{os.getpid()}")
        try:
            index = _index(place)
            if set(index["files"]) != set(_files(place)):
                return None
            scratch.mkdir(parents=True)
            for name, record in index["files"].items():
                if _copied(place / name, scratch / name) != record["sha256"]:
                    return None
            os.rename(scratch, into)
        except (OSError, ValueError):  # also when another process removes the entry meanwhile
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.utime(place)
        about: dict[str, Any] = index["about"]
        return about

    def keep(self, key: Mapping[str, Any], folder: Path, about: Mapping[str, Any]) -> bool:
        """Keep a copy of a folder's files under a key; a whole entry that stands there stays, a damaged one goes.

        Args:
            key: What decides the content, as JSON.
            folder: Its files are copied.
            about: What else to keep, as JSON.

        Returns:
            Whether the entry is new.

        Raises:
            OSError: When it cannot be written; then nothing is left of it.
        """
        place = self._place(key)
        scratch = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
        try:
            for name in _files(folder):
                _copied(folder / name, scratch / name)
            _seal(scratch, key, about)
            new = self._place_whole(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.trim()
        return new

    def entries(self) -> list[tuple[Path, int]]:
        """Entries with their bytes, the least recently used first."""
        found = [(p, _bytes(p)) for p in self._inside() if _ENTRY.fullmatch(p.name)]
        return sorted(found, key=lambda item: (_used(item[0]), item[0].name))

    def trim(self) -> int:
        """Remove what killed processes left, and the least recently used entries above the cap; returns how many."""
        now = time.time()
        left = [p for p in self._inside() if p.name.startswith(_TEMPORARY) and now - _used(p) > _STALE_SECONDS]
        for place in left:
            shutil.rmtree(place, ignore_errors=True)
        entries = self.entries()
        total = sum(size for _, size in entries)
        gone = len(left)
        for place, size in entries[:-1]:
            if total <= self.cap_bytes:
                break
            _remove(place)
            total -= size
            gone += 1
        return gone

    def journals(self) -> list[Path]:
        """Journals of searches that did not come to their end, or are under way."""
        return sorted(p for p in self.folder.iterdir() if JOURNAL.fullmatch(p.name) and not p.is_symlink())

    def clear(self) -> int:
        """Remove every entry, the journals of searches, and nothing else; returns the bytes that were freed."""
        freed = 0
        for journal in self.journals():
            with contextlib.suppress(OSError):
                size = journal.stat().st_size
                journal.unlink()
                freed += size
        for place in self._inside():
            freed += _bytes(place)
            _remove(place)
        return freed

    def _inside(self) -> list[Path]:
        """What is the cache's own: the folder may be one that holds other things."""
        found = [p for p in self.folder.iterdir() if _ENTRY.fullmatch(p.name) or p.name.startswith(_TEMPORARY)]
        return [p for p in found if p.is_dir() and not p.is_symlink()]

    def _place(self, key: Mapping[str, Any]) -> Path:
        return self.folder / hashlib.sha256(_canonical(key).encode()).hexdigest()

    def _place_whole(self, scratch: Path, place: Path) -> bool:
        """Rename an entry to its place, unless a whole one stands there."""
        for last in (False, True):
            if place.is_dir() and not _intact(place):
                _remove(place)
            try:
                os.rename(scratch, place)
            except OSError:  # a folder that is not empty stands there
                if place.is_dir() and _intact(place):
                    return False
                if last:
                    raise
            else:
                return True
        return False


def open_cache(reporter: Reporter) -> Cache | None:
    """The user's cache, or None where it is off; one that cannot be used is none either, and said."""
    if os.environ.get("VLEXPORT_CACHE") == OFF:
        return None
    try:
        return Cache()
    except BundleError as error:
        reporter.note(f"the cache is not used: {error.message} ({error.where}); {error.hint}")
        return None


def default_folder() -> Path:
    """``$VLEXPORT_CACHE``, or the platform's cache folder for vlexport."""
    given = os.environ.get("VLEXPORT_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("vlexport"))


def _distrust(found: os.stat_result, named: os.stat_result) -> tuple[str, str] | None:
    """Why the folder's entries may be somebody else's, and what to do; None when they cannot.

    ``named`` is the same, of the link where the folder is one.
    """
    elsewhere = "set VLEXPORT_CACHE to a folder of your own, or to off"
    if not stat.S_ISDIR(found.st_mode):
        return "the cache folder is no folder", elsewhere
    if hasattr(os, "geteuid") and {found.st_uid, named.st_uid} != {os.geteuid()}:
        return "the cache folder belongs to another user", elsewhere
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to the cache folder", f"chmod 700 it, or {elsewhere}"
    return None


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _files(folder: Path) -> Iterator[str]:
    """Files below a folder, without the index; a link is none, for its content may change."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and name != ENTRY_FILE:
            yield name


def _seal(folder: Path, key: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    files = {name: file_record(folder / name).model_dump() for name in _files(folder)}
    index = _canonical({"key": key, "about": about, "files": files})
    text = json.dumps({"index": index, "sha256": hashlib.sha256(index.encode()).hexdigest()})
    (folder / ENTRY_FILE).write_text(text, encoding="utf-8")


def _index(folder: Path) -> dict[str, Any]:
    """What an entry says of itself.

    Raises:
        OSError, ValueError: When it does not, or does not fit its own hash.
    """
    try:
        sealed = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8"))
        if hashlib.sha256(sealed["index"].encode()).hexdigest() != sealed["sha256"]:
            raise ValueError("the index is damaged")
        index: dict[str, Any] = json.loads(sealed["index"])
        if not {"files", "about"} <= set(index):
            raise ValueError("the index is damaged")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("the index is damaged") from error
    return index


def _intact(folder: Path) -> bool:
    try:
        files = _index(folder)["files"]
        return set(_files(folder)) == set(files) and all(
            file_record(folder / name).model_dump() == record for name, record in files.items()
        )
    except (OSError, ValueError):
        return False


def _copied(source: Path, to: Path) -> str:
    """Copy a file's content; returns the SHA-256 of what was read."""
    to.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reading, to.open("xb") as writing:
        while chunk := reading.read(_CHUNK):
            digest.update(chunk)
            writing.write(chunk)
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    """Rename first, so that no reader meets half an entry."""
    grave = folder.with_name(f"{_TEMPORARY}{os.getpid()}-{folder.name}")
    with contextlib.suppress(OSError):
        os.rename(folder, grave)
        shutil.rmtree(grave, ignore_errors=True)


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()
