"""Which code runs: digests of source files and of what is installed, for keys of the cache. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_INSTALLED = (".dist-info", ".egg-info")


@lru_cache(maxsize=32)
def code_digest(package: str) -> str | None:
    """SHA-256 over the names and contents of a package's Python files.

    Args:
        package: Dotted name of a package or module.

    Returns:
        The digest, or None for code that lies in no file that can be found, or is run as a script.
    """
    if package == "__main__":
        return None
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    whole = hashlib.sha256()
    found = False
    for root, file in _python_files(spec.submodule_search_locations, spec.origin):
        whole.update(f"{file.relative_to(root).as_posix()}\0".encode())
        whole.update(hashlib.sha256(file.read_bytes()).digest())
        found = True
    return whole.hexdigest() if found else None


@lru_cache(maxsize=1)
def installed_digest() -> str:
    """SHA-256 over the names and versions of all installed packages, as their folders of metadata are called."""
    folders = [Path(place or ".") for place in sys.path]
    names = {entry.name for place in folders if place.is_dir() for entry in os.scandir(place)}
    kept = sorted(name for name in names if name.endswith(_INSTALLED))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def _python_files(folders: list[str] | None, origin: str | None) -> Iterator[tuple[Path, Path]]:
    """(root, file), in an order that is the same everywhere."""
    for folder in sorted(folders or ()):
        root = Path(folder)
        yield from ((root, file) for file in sorted(root.rglob("*.py")))
    if folders is None and origin is not None and origin.endswith(".py"):
        yield Path(origin).parent, Path(origin)
