"""A disk that fills up at any moment of a build: one message, no half bundle, a whole cache, and then it works."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tamper import outcome_of
from vlexport.core.cache import Cache, _intact
from vlexport.stages import write_bundle
from vlexport.stages.replace_folder import exchanged, working_sibling

BUILD = ("build", "model.pt", "-o", "made", "--no-profile")


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The system refuses files that grow beyond a size, as a full disk does, to native code as to Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_build_leaves_nothing_when_no_file_may_grow(cli: Any, here: Path) -> None:
    with largest_file(1200):
        cli.refused(1, "VLX0607", *BUILD)
    cache = Path(os.environ["VLEXPORT_CACHE"])
    assert not cache.is_dir() or all(_intact(entry) for entry, _ in Cache(cache).entries())
    code, _, err = cli(*BUILD)
    assert code == 0, err
    assert outcome_of(here / "made") == 0


@pytest.mark.parametrize("moment", ["golden", "bundle"])
def test_build_leaves_nothing_when_the_disk_is_full(
    moment: str, cli: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = {"golden": "write_npz", "bundle": "recorded_files"}[moment]
    with monkeypatch.context() as patched:
        patched.setattr(write_bundle, name, full)
        err = cli.refused(1, "VLX0607", *BUILD, said="No space left on device")
    assert "make room" in err


def test_replacing_keeps_the_old_bundle_when_the_disk_is_full(
    cli: Any, here: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_bundle, "_flush", full)
    cli.refused(1, "VLX0607", "build", "model.pt", "-o", "bundle", "--no-profile", "--force")
    assert outcome_of(bundle) == 0


# Taking another folder's place


def test_folders_change_places_in_one_step_when_the_system_can(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    if not exchanged(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange two folders")
    assert [(tmp_path / name / "who").read_text() for name in ("a", "b")] == ["b", "a"]
    assert not exchanged(tmp_path / "a", tmp_path / "absent")
    assert (tmp_path / "a" / "who").read_text() == "b"


def test_sibling_of_a_killed_build_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    output = tmp_path / "made"
    left, other = tmp_path / ".made.abcd1234", tmp_path / ".mine.abcd1234"
    link, file = tmp_path / ".made.linked00", tmp_path / ".made.file0000"
    for folder in (left, other):
        (folder / "artifact").mkdir(parents=True)
    link.symlink_to(other, target_is_directory=True)
    file.write_text("mine")
    with working_sibling(output) as living:
        assert not left.exists()
        assert (other / "artifact").is_dir()
        assert link.is_symlink()
        assert file.is_file()
        with working_sibling(output):
            assert living.is_dir()
