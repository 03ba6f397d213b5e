"""The cache: what was made once is found again, by anybody, whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlexport.core.cache import ENTRY_FILE, Cache, default_folder
from vlexport.core.errors import BundleError

KEY = {"what": "weights", "source": "ab" * 32, "version": 1}


def write(text: str):
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.bin").write_text(text)

    return make


def test_entry_is_found_again_when_it_was_made(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.get(KEY) is None
    made = cache.get_or_make(KEY, write("one"))
    again = cache.get_or_make(KEY, write("two"))
    assert (made.fresh, again.fresh) == (True, False)
    assert again.folder == made.folder
    assert (again.folder / "sub" / "file.bin").read_text() == "one"
    assert Cache(tmp_path / "c").get({**KEY, "version": 2}) is None
    assert Cache(tmp_path / "c").get(dict(reversed(KEY.items()))) == made.folder


def test_folder_is_private_when_it_is_made(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["altered", "missing", "added", "no index", "junk index"])
def test_entry_is_made_anew_when_it_is_damaged(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path / "c")
    folder = cache.get_or_make(KEY, write("one")).folder
    file = folder / "sub" / "file.bin"
    if damage == "altered":
        file.write_text("0ne")
    elif damage == "missing":
        file.unlink()
    elif damage == "added":
        (folder / "more").write_text("x")
    elif damage == "no index":
        (folder / ENTRY_FILE).unlink()
    else:
        (folder / ENTRY_FILE).write_text("{")
    found = cache.get_or_make(KEY, write("two"))
    assert found.fresh
    assert (found.folder / "sub" / "file.bin").read_text() == "two"
    assert [p.name for p in cache.folder.iterdir()] == [found.folder.name]


def test_nothing_is_left_when_making_fails(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_make(KEY, fail)
    assert list(cache.folder.iterdir()) == []


def test_oldest_entries_go_when_the_cap_is_exceeded(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", cap_bytes=4500)
    places = []
    for number in range(3):
        places.append(cache.get_or_make({"n": number}, write("x" * 1000)).folder)
        past = time.time() - 100 + number
        os.utime(places[-1], (past, past))
    assert cache.get({"n": 0}) == places[0]  # read just now: the oldest is number 1
    newest = cache.get_or_make({"n": 3}, write("x" * 1000)).folder
    assert {place for place, _ in cache.entries()} == {places[0], places[2], newest}
    assert cache.get({"n": 1}) is None


def test_one_entry_stays_when_it_alone_exceeds_the_cap(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", cap_bytes=10)
    assert cache.get_or_make(KEY, write("x" * 1000)).folder.is_dir()
    assert cache.get(KEY) is not None


def test_bytes_are_freed_when_the_cache_is_cleared(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    cache.get_or_make(KEY, write("x" * 1000))
    assert cache.clear() >= 1000
    assert cache.entries() == []


def test_folder_follows_the_environment_when_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("VLEXPORT_CACHE")
    assert default_folder().name == "vlexport"


def test_error_says_what_to_set_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError) as caught:
        Cache(tmp_path / "file" / "c")
    assert caught.value.code == "VLX0607"
    assert "VLEXPORT_CACHE" in caught.value.hint


_RACER = """
import sys, time
from pathlib import Path
from vlexport.core.cache import Cache
start = float(sys.argv[2])
cache = Cache(Path(sys.argv[1]))
def make(folder):
    for number in range(20):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * 20000)
time.sleep(max(0.0, start - time.time()))
for round_number in range(10):
    hit = cache.get_or_make({"round": round_number}, make)
    content = b"".join((hit.folder / f"{n}.bin").read_bytes() for n in range(20))
    assert content == b"".join(bytes([n]) * 20000 for n in range(20))
    print("fresh" if hit.fresh else "hit")
"""


def test_entries_stay_whole_when_two_processes_make_the_same(tmp_path: Path) -> None:
    start = str(time.time() + 1.5)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(tmp_path / "c"), start],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for _ in range(2)
    ]
    said = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], said
    first, second = (out.split() for out, _ in said)
    assert all({a, b} == {"fresh", "hit"} for a, b in zip(first, second, strict=True))
    cache = Cache(tmp_path / "c")
    assert len(cache.entries()) == 10
    assert sorted(p.name for p in cache.folder.iterdir()) == sorted(p.name for p, _ in cache.entries())
