"""The cache: what was kept once is found again, by anybody, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlexport.core.cache import ENTRY_FILE, Cache, default_folder, open_cache
from vlexport.core.errors import BundleError
from vlexport.core.progress import Silent

KEY = {"what": "weights", "source": "ab" * 32, "version": 1}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "c")


def keep(cache: Cache, text: str, key: Any = KEY) -> bool:
    """Keep one file ``sub/file.bin`` with this text."""
    folder = cache.folder.parent / "made"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub" / "file.bin").write_text(text)
    return cache.keep(key, folder, {"said": text})


def take(cache: Cache, key: Any = KEY) -> str | None:
    """The text that was kept, or None; where nothing is taken, nothing is left."""
    folder = cache.folder.parent / "taken"
    about = cache.take(key, folder)
    rest = [p.name for p in cache.folder.parent.iterdir() if p.name.startswith(".")]
    assert rest == []
    if about is None:
        assert not folder.exists()
        return None
    text = (folder / "sub" / "file.bin").read_text()
    assert about == {"said": text}
    (folder / "sub" / "file.bin").unlink()
    (folder / "sub").rmdir()
    folder.rmdir()
    return text


def entry(cache: Cache) -> Path:
    return cache.entries()[0][0]


def test_entry_is_found_again_when_it_was_kept(cache: Cache) -> None:
    assert take(cache) is None
    assert keep(cache, "one")
    assert not keep(cache, "two")
    assert take(cache) == "one"
    assert take(cache, {**KEY, "version": 2}) is None
    assert take(Cache(cache.folder), dict(reversed(KEY.items()))) == "one"


def test_copy_is_the_users_own_when_it_is_edited(cache: Cache, tmp_path: Path) -> None:
    keep(cache, "one")
    (tmp_path / "made/sub/file.bin").write_text("edited after it was kept")
    cache.take(KEY, tmp_path / "b")
    kept = entry(cache) / "sub/file.bin"
    assert kept.stat().st_ino != (tmp_path / "b/sub/file.bin").stat().st_ino
    (tmp_path / "b/sub/file.bin").write_text("edited after it was taken")
    assert take(cache) == "one"


def test_nothing_is_touched_when_the_place_is_taken(cache: Cache, tmp_path: Path) -> None:
    keep(cache, "one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").write_text("mine")
    assert cache.take(KEY, tmp_path / "b") is None
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    assert cache.take(KEY, tmp_path / "empty") is not None


DAMAGE = {
    "flipped byte": lambda folder: (folder / "sub/file.bin").write_text("ome"),
    "missing file": lambda folder: (folder / "sub/file.bin").unlink(),
    "added file": lambda folder: (folder / "more").write_text("x"),
    "no index": lambda folder: (folder / ENTRY_FILE).unlink(),
    "truncated index": lambda folder: os.truncate(folder / ENTRY_FILE, 40),
    "altered index": lambda folder: (folder / ENTRY_FILE).write_text(
        (folder / ENTRY_FILE).read_text().replace("one", "ome")
    ),
    "junk index": lambda folder: (folder / ENTRY_FILE).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_entry_is_missed_and_made_anew_when_it_is_damaged(damage: str, cache: Cache) -> None:
    keep(cache, "one")
    DAMAGE[damage](entry(cache))
    assert take(cache) is None
    assert keep(cache, "two")
    assert take(cache) == "two"
    assert [p.name for p in cache.folder.iterdir()] == [entry(cache).name]


def test_nothing_is_left_when_keeping_fails(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlexport.core.cache._seal", full)
    with pytest.raises(OSError, match="No space"):
        keep(cache, "one")
    assert list(cache.folder.iterdir()) == []


# -- size --------------------------------------------------------------------------------------------------------------


def test_oldest_entries_go_when_the_cap_is_exceeded(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", cap_bytes=9000)
    for number in range(3):
        keep(cache, "x" * 1000, {"n": number})
        past = time.time() - 100 + number
        os.utime(cache.entries()[-1][0], (past, past))
    assert take(cache, {"n": 0}) is not None  # read just now: the oldest is number 1
    keep(cache, "x" * 1000, {"n": 3})
    assert [take(cache, {"n": number}) is not None for number in range(4)] == [True, False, True, True]


def test_one_entry_stays_when_it_alone_exceeds_the_cap(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", cap_bytes=10)
    keep(cache, "x" * 1000)
    assert take(cache) is not None


def test_only_entries_go_when_the_folder_holds_other_things(tmp_path: Path) -> None:
    """Somebody may name the folder of their project, or their home."""
    (tmp_path / "c/.git").mkdir(parents=True, mode=0o700)
    (tmp_path / "c/photos").mkdir()
    (tmp_path / "c/photos/one.png").write_text("x" * 5000)
    (tmp_path / "c").chmod(0o700)
    cache = Cache(tmp_path / "c", cap_bytes=10)
    keep(cache, "x" * 1000)
    keep(cache, "x" * 1000, {"n": 1})
    assert len(cache.entries()) == 1
    assert cache.clear() >= 1000
    assert cache.entries() == []
    assert (tmp_path / "c/photos/one.png").is_file()
    assert sorted(p.name for p in cache.folder.iterdir()) == [".git", "photos"]


# -- whose folder ------------------------------------------------------------------------------------------------------


def test_folder_is_private_when_it_is_made(cache: Cache) -> None:
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_folder_follows_the_environment_when_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("VLEXPORT_CACHE")
    assert default_folder().name == "vlexport"


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def refused(folder: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by its name, and a build goes on without, which it is told."""
    with pytest.raises(BundleError) as caught:
        Cache(folder)
    assert (caught.value.code, "VLEXPORT_CACHE" in caught.value.hint) == ("VLX0607", True)
    assert said in caught.value.message
    monkeypatch.setenv("VLEXPORT_CACHE", str(folder))
    listener = Listener()
    assert open_cache(listener) is None
    assert len(listener.notes) == 1
    assert said in listener.notes[0]


def test_folder_is_refused_when_it_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "c", "cannot be made", monkeypatch)
    refused(tmp_path / "file", "cannot be made", monkeypatch)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_is_refused_when_others_may_write_to_it(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(mode)
    refused(tmp_path / "c", "others may write", monkeypatch)


def test_folder_is_refused_when_it_belongs_to_another_user(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, "one")
    owner = cache.folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(cache.folder, "another user", monkeypatch)


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_folder_is_used_when_only_its_owner_may_write(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(mode)
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "c"))
    found = open_cache(Silent())
    assert found is not None
    assert found.folder == tmp_path / "c"


def test_nothing_is_made_when_the_cache_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLEXPORT_CACHE", "off")
    listener = Listener()
    assert open_cache(listener) is None
    assert (listener.notes, list(tmp_path.iterdir())) == ([], [])


# -- several processes -------------------------------------------------------------------------------------------------

_RACER = """
import sys, time
from pathlib import Path
from vlexport.core.cache import Cache
cache, own, start = Cache(Path(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3])
(own / "made").mkdir(parents=True)
whole = [bytes([number]) * 20000 for number in range(20)]
for number, content in enumerate(whole):
    (own / "made" / f"{number}.bin").write_bytes(content)
time.sleep(max(0.0, start - time.time()))
for round_number in range(10):
    key = {"round": round_number}
    new = cache.keep(key, own / "made", {"round": round_number})
    assert cache.take(key, own / str(round_number)) == {"round": round_number}
    assert [(own / str(round_number) / f"{n}.bin").read_bytes() for n in range(20)] == whole
    print("new" if new else "kept")
"""


def test_entries_stay_whole_when_two_processes_keep_the_same(tmp_path: Path) -> None:
    start = str(time.time() + 1.5)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(tmp_path / "c"), str(tmp_path / name), start],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name in ("a", "b")
    ]
    said = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], said
    first, second = (out.split() for out, _ in said)
    assert all({a, b} == {"new", "kept"} for a, b in zip(first, second, strict=True))
    cache = Cache(tmp_path / "c")
    assert len(cache.entries()) == 10
    assert sorted(p.name for p in cache.folder.iterdir()) == sorted(p.name for p, _ in cache.entries())


_VICTIM = """
import sys, time
from pathlib import Path
import vlexport.core.cache as module
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)
module._seal = slow
module.Cache(Path(sys.argv[1])).keep({"n": 1}, Path(sys.argv[2]), {})
"""


def test_half_an_entry_is_never_read_and_goes_when_its_writer_was_killed(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half/file.bin").write_text("half")
    arguments = [sys.executable, "-c", _VICTIM, str(cache.folder), str(tmp_path / "half")]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "writing\n"
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(timeout=30) == -signal.SIGKILL
    left = list(cache.folder.iterdir())
    assert [p.name for p in left[0].iterdir()] == ["file.bin"]
    assert (cache.take({"n": 1}, tmp_path / "taken"), cache.entries()) == (None, [])
    assert keep(cache, "whole", {"n": 1})
    assert take(cache, {"n": 1}) == "whole"
    assert left[0].is_dir(), "it may belong to a process that is at work"
    os.utime(left[0], (time.time() - 2 * 86400,) * 2)
    assert cache.trim() == 1
    assert [p.name for p in cache.folder.iterdir()] == [entry(cache).name]


def test_key_is_kept_in_words_when_an_entry_is_looked_at(cache: Cache) -> None:
    keep(cache, "one")
    index = json.loads(json.loads((entry(cache) / ENTRY_FILE).read_text())["index"])
    assert index["key"] == KEY


def test_link_in_an_entry_is_not_followed_when_it_was_planted(cache: Cache, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    (content / "a.bin").write_bytes(b"content")
    cache.keep({"what": "linked"}, content, {})
    place = cache.entries()[-1][0]
    (place / "a.bin").rename(tmp_path / "away")
    (place / "a.bin").symlink_to(tmp_path / "away")
    assert cache.take({"what": "linked"}, tmp_path / "taken") is None
    assert not (tmp_path / "taken").exists()
    assert cache.keep({"what": "linked"}, content, {}), "it is made anew"
    assert cache.take({"what": "linked"}, tmp_path / "taken") == {}


@pytest.mark.skipif(not hasattr(os, "lchown") or os.geteuid() != 0, reason="only root may give a link away")
def test_folder_is_refused_when_the_link_to_it_is_another_users(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    Cache(link)
    os.lchown(link, 65534, 65534)
    with pytest.raises(BundleError) as caught:
        Cache(link)
    assert (caught.value.code, "another user" in caught.value.message) == ("VLX0607", True)
