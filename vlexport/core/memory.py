"""How much memory this process may still take. No torch."""

from __future__ import annotations

import os
from pathlib import Path

_GROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Linux, control groups of version 2 and 1: the limit of a container and what it has taken."""


def available_memory_bytes() -> int | None:
    """Bytes that can still be had without swapping, also inside a container; None where this system does not tell."""
    found = [each for each in (_of_the_machine(), *map(_of_a_group, _GROUP_LIMITS)) if each is not None]
    return min(found, default=None)


def _of_the_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _of_a_group(files: tuple[str, str]) -> int | None:
    try:
        limit, used = (int(Path(file).read_text(encoding="ascii")) for file in files)
    except (OSError, ValueError):  # there is no group, or its limit is the word max
        return None
    return max(limit - used, 0)
