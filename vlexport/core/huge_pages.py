"""Memory in huge pages for the processes that run a model: fewer walks of page tables, and the same time each time.

A product reads megabytes of weights, and in pages of 4 KiB each of them costs a look into the page tables, which a
virtual machine pays twice. Linux gives pages of 2 MiB (transparent huge pages) always, never, or where a program asks
for them; glibc asks for them in ``malloc`` where ``GLIBC_TUNABLES`` says so when the process starts. Without them it
also matters *where* a process got its memory: two processes with the same file then differ.

Source: the Linux kernel's admin-guide/mm/transhuge; the GNU C library's manual, Memory Allocation Tunables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
REQUEST = f"{TUNABLE}=1"
"""What :data:`VARIABLE` holds to ask for them."""
ASKED_FOR = "huge, asked for"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)
"""The glibc that knows the tunable; an older one ignores it."""


def with_huge_pages(surroundings: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a process that is to run a model: these, and the request unless they have their own."""
    given = surroundings.get(VARIABLE, "")
    if not _can_be_asked_for() or TUNABLE in given:
        return dict(surroundings)
    return {**surroundings, VARIABLE: f"{given}:{REQUEST}" if given else REQUEST}


def memory_pages(surroundings: Mapping[str, str] | None = None) -> str:
    """Pages of such a process: ``huge``, ``huge, asked for``, ``small``, or empty where this system does not tell."""
    if (mode := _mode()) == "always":
        return "huge"
    if not mode:
        return ""
    asked = with_huge_pages(os.environ if surroundings is None else surroundings).get(VARIABLE, "")
    return ASKED_FOR if _can_be_asked_for() and f"{TUNABLE}=0" not in asked else "small"


def _can_be_asked_for() -> bool:
    return _mode() == "madvise" and _glibc() >= _SINCE


def _mode() -> str:
    """The word in brackets of ``always [madvise] never``."""
    try:
        return _SYSTEM.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _glibc() -> tuple[int, ...]:
    try:
        return tuple(map(int, (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1].split(".")))
    except (AttributeError, ValueError, OSError, IndexError):  # another system, or another C library
        return ()
