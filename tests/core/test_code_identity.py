"""Digests of source change with the source, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlexport.core.code_identity import code_digest, installed_digest


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    code_digest.cache_clear()
    installed_digest.cache_clear()


def package(folder: Path, name: str = "made_up_code") -> Path:
    (folder / name / "inner").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    (folder / name / "inner" / "work.py").write_text("x = 1\n")
    return folder / name


def digest(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "made_up_code") -> str | None:
    code_digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return code_digest(name)


def test_digest_is_that_of_content_when_moved_or_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = package(tmp_path / "a"), package(tmp_path / "b")
    os.utime(second / "__init__.py", (0, 0))
    (second / "notes.txt").write_text("no code")
    found = digest(first.parent, monkeypatch)
    assert found is not None
    assert digest(second.parent, monkeypatch) == found
    (second / "inner/work.py").write_text("x = 2\n")
    assert digest(second.parent, monkeypatch) != found


def test_digest_changes_when_a_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path)
    found = digest(tmp_path, monkeypatch)
    (folder / "inner/work.py").rename(folder / "inner/play.py")
    assert digest(tmp_path, monkeypatch) != found


def test_digest_is_none_when_the_code_lies_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest(tmp_path, monkeypatch, "no_such_package") is None
    assert digest(tmp_path, monkeypatch, "__main__") is None
    assert digest(tmp_path, monkeypatch, "builtins") is None


@pytest.mark.parametrize("part", ["core", "passes", "targets"])
def test_digest_holds_linked_folders_when_of_our_own(part: str) -> None:
    """``vlexport/passes`` is a link in a checkout; a walk from the package would not follow it."""
    found = code_digest(f"vlexport.{part}")
    assert found is not None
    script = f"from vlexport.core.code_identity import code_digest; print(code_digest('vlexport.{part}'))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_installed_digest_changes_when_a_package_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = installed_digest()
    (tmp_path / "new_one-1.0.dist-info").mkdir()
    (tmp_path / "new_one").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    installed_digest.cache_clear()
    with_one = installed_digest()
    (tmp_path / "new_one-1.0.dist-info").rename(tmp_path / "new_one-1.1.dist-info")
    installed_digest.cache_clear()
    assert len({before, with_one, installed_digest()}) == 3
