"""Sessions ask for memory in huge pages where the system gives them to who asks, and say so."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlexport.core import huge_pages
from vlexport.core.bundle_schema import Machine
from vlexport.core.huge_pages import ASKED_FOR, memory_pages, with_huge_pages
from vlexport.report.figures import pages_phrase

REQUEST = "glibc.malloc.hugetlb=1"


def system(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str, glibc: tuple[int, ...] = (2, 36)) -> None:
    file = folder / "enabled"
    if mode:
        file.write_text(" ".join(f"[{m}]" if m == mode else m for m in ("always", "madvise", "never")) + "\n")
    monkeypatch.setattr(huge_pages, "_SYSTEM", file)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: glibc)


@pytest.mark.parametrize(
    ("mode", "glibc", "given", "expected", "pages"),
    [
        ("madvise", (2, 36), {}, {"GLIBC_TUNABLES": REQUEST}, ASKED_FOR),
        ("madvise", (2, 36), {"GLIBC_TUNABLES": ""}, {"GLIBC_TUNABLES": REQUEST}, ASKED_FOR),
        ("madvise", (2, 36), {"GLIBC_TUNABLES": "glibc.malloc.check=3"},
         {"GLIBC_TUNABLES": f"glibc.malloc.check=3:{REQUEST}"}, ASKED_FOR),
        ("madvise", (2, 36), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
         {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "small"),
        ("madvise", (2, 36), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"},
         {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"}, ASKED_FOR),
        ("madvise", (2, 31), {}, {}, "small"),
        ("madvise", (), {}, {}, "small"),
        ("always", (2, 36), {}, {}, "huge"),
        ("never", (2, 36), {}, {}, "small"),
        ("", (2, 36), {}, {}, ""),
    ],
)  # fmt: skip
def test_asked_for_where_that_does_something_and_never_over_the_users_own_wish(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, glibc: tuple[int, ...],
    given: dict[str, str], expected: dict[str, str], pages: str,
) -> None:  # fmt: skip
    system(monkeypatch, tmp_path, mode, glibc)
    around = {"HOME": "/somewhere", **given}
    assert with_huge_pages(around) == {**around, **expected}
    assert memory_pages(around) == pages
    assert around == {"HOME": "/somewhere", **given}, "what was given is not changed"


def test_a_process_started_so_has_its_large_arrays_in_huge_pages() -> None:
    if memory_pages({}) != ASKED_FOR:
        pytest.skip("this system gives huge pages always or never, does not tell, or its glibc cannot ask")
    held = _advised(with_huge_pages({}))
    assert held >= 60, f"{held} of 64 MiB may be huge"
    assert _advised({}) < 4, "without the request they are not"


def _advised(surroundings: dict[str, str]) -> int:
    """MiB of a fresh process with an array of 64 that the kernel was asked to keep in huge pages (``hg`` in smaps)."""
    code = "x = bytearray(64 << 20); print(open('/proc/self/smaps').read())"
    said = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True)
    sizes = re.findall(r"^Size:\s+(\d+) kB(?:\n(?!VmFlags).*)*\nVmFlags:(.*)$", said.stdout, re.MULTILINE)
    return sum(int(kib) for kib, flags in sizes if "hg" in flags.split()) // 1024


def test_glibc_is_read_where_there_is_one() -> None:
    assert huge_pages._glibc() >= (2, 0) or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def test_only_figures_that_hang_on_a_request_say_so() -> None:
    def machine(pages: str) -> Machine:
        return Machine(
            cpu="a processor", instruction_set=(), cores=2, system="Linux", python="3.11", memory_pages=pages
        )

    assert f"GLIBC_TUNABLES={REQUEST}" in pages_phrase(machine(ASKED_FOR))
    assert [pages_phrase(machine(pages)) for pages in ("", "huge", "small")] == [""] * 3
