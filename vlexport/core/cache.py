"""A content-addressed cache on disk, safe with concurrent writers. No torch.

An entry is a folder of files under the SHA-256 of its key: everything that decides its content (inputs, options, tool
and code versions), never a path or a time. It is written to a temporary sibling and renamed, so that a reader sees all
of it or nothing; of two writers the first wins and the second's work is dropped. Every file's hash is checked on read:
a damaged entry is removed and counts as a miss. The least recently used entries go when the cache grows over its cap.

The folder is ``$VLEXPORT_CACHE``, or the platform's cache folder, with mode 0700.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from vlexport.core.bundle import file_record
from vlexport.core.errors import BundleError

ENTRY_FILE = ".entry.json"
DEFAULT_CAP_BYTES = 10 << 30
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Hit:
    """An entry.

    Attributes:
        folder: Its files; read-only by convention.
        fresh: Whether it was made just now.
    """

    folder: Path
    fresh: bool


class Cache:
    """A cache folder.

    Args:
        folder: Default: ``$VLEXPORT_CACHE`` or the platform's.
        cap_bytes: Size above which the least recently used entries go.

    Raises:
        BundleError: VLX0607 when the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, *, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        self.folder = folder or default_folder()
        self.cap_bytes = cap_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BundleError(
                "VLX0607", f"the cache folder cannot be made: {error.strerror}", where=str(self.folder),
                hint="set VLEXPORT_CACHE to a folder that can be written",
            ) from error  # fmt: skip

    def get(self, key: Mapping[str, Any]) -> Path | None:
        """The files of an entry, their hashes checked, or None. A damaged entry is removed."""
        place = self._place(key)
        if not place.is_dir():
            return None
        if not _intact(place):
            _remove(place)
            return None
        with contextlib.suppress(OSError):
            os.utime(place)
        return place

    def get_or_make(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> Hit:
        """The entry of a key, made by ``make(folder)`` when it is missing or damaged.

        Two makers may run at once; what is kept is the first one's.
        """
        found = self.get(key)
        if found is not None:
            return Hit(found, fresh=False)
        scratch = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
        try:
            make(scratch)
            _seal(scratch, key)
            place = self._place(key)
            try:
                os.rename(scratch, place)
            except OSError:  # another writer was first: a folder that is not empty stands there
                other = self.get(key)
                if other is None:
                    raise
                shutil.rmtree(scratch, ignore_errors=True)
                return Hit(other, fresh=False)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self.trim()
        return Hit(place, fresh=True)

    def entries(self) -> list[tuple[Path, int]]:
        """Entries with their bytes, the least recently used first."""
        found = [(p, _bytes(p)) for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(_TEMPORARY)]
        return sorted(found, key=lambda item: (_used(item[0]), item[0].name))

    def trim(self) -> int:
        """Remove the least recently used entries above the cap; returns how many went."""
        entries = self.entries()
        total = sum(size for _, size in entries)
        gone = 0
        for place, size in entries[:-1]:
            if total <= self.cap_bytes:
                break
            _remove(place)
            total -= size
            gone += 1
        return gone

    def clear(self) -> int:
        """Remove every entry; returns the bytes that were freed."""
        freed = 0
        for place in list(self.folder.iterdir()):
            if place.is_dir():
                freed += _bytes(place)
                _remove(place)
        return freed

    def _place(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()


def default_folder() -> Path:
    """``$VLEXPORT_CACHE``, or the platform's cache folder for vlexport."""
    given = os.environ.get("VLEXPORT_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("vlexport"))


def _seal(folder: Path, key: Mapping[str, Any]) -> None:
    files = {
        p.relative_to(folder).as_posix(): file_record(p).model_dump() for p in sorted(folder.rglob("*")) if p.is_file()
    }
    (folder / ENTRY_FILE).write_text(json.dumps({"key": key, "files": files}, sort_keys=True), encoding="utf-8")


def _intact(folder: Path) -> bool:
    try:
        files = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8"))["files"]
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {ENTRY_FILE}
        return found == set(files) and all(
            file_record(folder / name).model_dump() == record for name, record in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
        return 0.0
