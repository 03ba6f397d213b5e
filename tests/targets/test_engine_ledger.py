"""An engine is let through only when this user compiled it here; whatever else claims it is refused unparsed."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from vlexport.core.errors import VlexportError
from vlexport.targets.tensorrt.engine_ledger import LEDGER_FILE, known_engine, remember_engine

ENGINE = b"ptrt" + bytes(range(256))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    file = tmp_path / "main.engine"
    file.write_bytes(ENGINE)
    return file


def refused(file: Path) -> None:
    with pytest.raises(VlexportError) as caught:
        known_engine(file)
    assert (caught.value.code, caught.value.exit_code) == ("VLX0511", 4)
    assert str(file.parent) not in str(caught.value.as_dict())


def test_engine_is_known_when_it_was_compiled_here(engine: Path, own_cache: Path) -> None:
    refused(engine)
    assert remember_engine(ENGINE)
    assert known_engine(engine) == ENGINE
    assert (own_cache / LEDGER_FILE).stat().st_mode & 0o777 == 0o600
    assert remember_engine(b"another")
    assert known_engine(engine) == ENGINE


def test_engine_is_refused_when_one_byte_differs_or_it_is_planted(engine: Path, tmp_path: Path) -> None:
    assert remember_engine(ENGINE)
    engine.write_bytes(ENGINE[:-1] + b"\x00")
    refused(engine)
    engine.unlink()
    refused(engine)
    engine.symlink_to("/etc/hostname")
    refused(engine)
    engine.unlink()
    os.mkfifo(engine)
    refused(engine)


def test_engine_is_let_through_when_the_user_consents(engine: Path) -> None:
    assert known_engine(engine, allow_code=True) == ENGINE


def test_refusal_loads_no_native_library_when_the_engine_is_unknown(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    with pytest.raises(VlexportError) as caught:
        known_engine(engine)
    assert caught.value.code == "VLX0511"


@pytest.mark.parametrize("plant", ["readable", "writable", "link", "folder", "other-user", "off", "loose-cache"])
def test_ledger_is_not_believed_when_another_may_have_written_it(
    plant: str, engine: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.mkdir(mode=0o700)
    ledger, line = own_cache / LEDGER_FILE, hashlib.sha256(ENGINE).hexdigest() + "\n"
    if plant == "folder":
        ledger.mkdir()
    elif plant == "link":
        (tmp_path / "planted").write_text(line)
        (tmp_path / "planted").chmod(0o600)
        ledger.symlink_to(tmp_path / "planted")
    else:
        ledger.write_text(line)
        ledger.chmod({"readable": 0o644, "writable": 0o666}.get(plant, 0o600))
    if plant == "other-user":
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    elif plant == "off":
        monkeypatch.setenv("VLEXPORT_CACHE", "off")
    elif plant == "loose-cache":
        own_cache.chmod(0o777)
    refused(engine)
    assert not remember_engine(b"more")
    if plant == "link":
        assert (tmp_path / "planted").read_text() == line
