"""``vlexport cache`` shows what is kept and empties it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlexport.core.cache import JOURNAL, Cache
from vlexport.stages.search import journal_name


@pytest.fixture
def filled(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made/file.bin").write_bytes(bytes(2_000_000))
    Cache().keep({"n": 1}, tmp_path / "made", {})
    return own_cache


def test_folder_entries_and_size_are_shown_when_asked_for(cli: Any, filled: Path) -> None:
    code, out, _ = cli("cache")
    assert code == 0
    assert out.startswith(f"{filled}: 1 entry, 2.0 MB of at most ")
    found = json.loads(cli("cache", "--json")[1])
    assert (found["ok"], found["folder"], found["entries"], found["off"]) == (True, str(filled), 1, False)
    assert 2_000_000 < found["size_bytes"] < found["cap_bytes"]


def test_nothing_is_left_when_cleared(cli: Any, filled: Path) -> None:
    code, out, _ = cli("cache", "--clear")
    assert code == 0
    assert out.splitlines()[0] == "2.0 MB freed"
    assert ": 0 entries, 0 B of" in out
    assert list(filled.iterdir()) == []
    assert json.loads(cli("cache", "--clear", "--json")[1])["freed_bytes"] == 0


def test_journals_of_searches_go_when_cleared_and_nothing_else_does(cli: Any, filled: Path) -> None:
    journal = filled / f"search-{'0' * 64}.jsonl"
    journal.write_text("{}\n" * 500_000)
    (filled / "search-notes.jsonl").write_text("mine")
    (filled / f"search-{'1' * 64}.jsonl").symlink_to(filled / "search-notes.jsonl")
    assert cli("cache")[1].rstrip().endswith("; 1 search to go on with (--resume)")
    assert json.loads(cli("cache", "--json")[1])["searches"] == 1
    assert cli("cache", "--clear")[1].splitlines()[0] == "3.5 MB freed"
    assert not journal.exists()
    assert (filled / "search-notes.jsonl").read_text() == "mine"


def test_journal_has_the_name_that_is_looked_for() -> None:
    assert JOURNAL.fullmatch(journal_name({"n": 1}))


def test_it_is_said_when_the_cache_is_off(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLEXPORT_CACHE", "off")
    assert cli("cache")[:2] == (0, "the cache is off: VLEXPORT_CACHE=off\n")
    assert json.loads(cli("cache", "--json")[1])["off"] is True


def test_folder_of_others_is_refused_when_shown_or_cleared(cli: Any, filled: Path, monkeypatch: Any) -> None:
    filled.chmod(0o777)
    for arguments in (["cache"], ["cache", "--clear"]):
        cli.refused(1, "VLX0607", *arguments, said="others may write to the cache folder")
    filled.chmod(0o700)
    assert len(Cache().entries()) == 1
