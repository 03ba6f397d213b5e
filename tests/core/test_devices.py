"""What this machine is, without saying whose it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlexport.core import devices
from vlexport.core.devices import available_cores, this_machine

X86 = """processor\t: 0
model name\t: Imagined CPU @ 2.00GHz
flags\t\t: fpu sse4_2 avx2 avx512_vnni

processor\t: 1
model name\t: Imagined CPU, the slow core
flags\t\t: fpu sse4_2
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is read instead of Linux's description of the processor."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "Path", lambda _: file)
    this_machine.cache_clear()
    yield file
    this_machine.cache_clear()


def test_machine_is_described_when_asked() -> None:
    found = this_machine()
    assert found.cpu
    assert found.cores == available_cores() >= 1
    assert found.python.count(".") >= 1
    assert found is this_machine()


def test_machine_names_no_host_user_or_path_when_described() -> None:
    text = this_machine().model_dump_json()
    for secret in (socket.gethostname(), str(Path.home()), os.getcwd()):
        assert secret not in text


def test_first_processor_counts_when_there_are_several(cpuinfo: Path) -> None:
    cpuinfo.write_text(X86)
    found = this_machine()
    assert found.cpu == "Imagined CPU @ 2.00GHz"
    assert found.instruction_set == ("sse4_2", "avx2", "avx512_vnni")


def test_features_are_read_when_the_processor_is_an_arm(cpuinfo: Path) -> None:
    cpuinfo.write_text(ARM)
    found = this_machine()
    assert found.instruction_set == ("asimd", "asimddp", "i8mm")
    assert found.cpu


@pytest.mark.parametrize("content", [None, "", "nonsense\n:::\n", "\udcff"])
def test_machine_is_described_when_linux_says_nothing(cpuinfo: Path, content: str | None) -> None:
    if content is not None:
        cpuinfo.write_bytes(content.encode(errors="surrogateescape"))
    found = this_machine()
    assert found.instruction_set == ()
    assert found.cpu


def test_cores_are_those_allowed_when_the_process_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5}, raising=False)
    assert available_cores() == 3


def test_cores_are_at_least_one_when_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1
