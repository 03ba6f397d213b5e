"""The how-tos are followed command by command, each in an empty folder, in this process: they must end as they say.

As on a user's machine, pages share the cache of exports; and one text of ``net.py`` gives every page the same files.
"""

from __future__ import annotations

import hashlib
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vlexport.cli.main import app, main

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "howto"
PAGES = {
    "cpu_service.md": ("Gate     top1>=90: pass", "\ngreen 0."),
    "iphone.md": ("nothing is known to stop it", "classLabel_probs", "\n0.png: red 0."),
    "jetson.md": ("No problem found; nothing was written.", "emulated: computed by ONNX Runtime"),
    "ci.md": ("<testsuites>", "::notice title=vlexport verify", "### vlexport validate: passed"),
    "pruning_vit.md": ("freeze-tokens", "same top-1", "Built    jetson.bundle"),
}
"""Page → what its commands must print among all else."""
_BLOCK = re.compile(r"(?:^`([\w.]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(file, language, text) of the fenced blocks; the file where one is named above."""
    for match in _BLOCK.finditer((FOLDER / page).read_text(encoding="utf-8")):
        yield match[1] or "", match[2], match[3]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all pages share: the cache of exports, and what each program wrote."""
    return tmp_path_factory.mktemp("shared")


def run_program(file: Path, known: Path) -> None:
    """Run a program of a page; one that wrote files before, and reads none, is not run again: its files are copied."""
    text = file.read_text(encoding="utf-8")
    place = known / hashlib.sha256(text.encode()).hexdigest()
    if place.is_dir():
        shutil.copytree(place, file.parent, dirs_exist_ok=True)
        return
    before = set(file.parent.iterdir())
    runpy.run_path(str(file), run_name="__main__")
    made = set(file.parent.iterdir()) - before
    if made:
        place.mkdir()
    for each in made:
        (shutil.copytree if each.is_dir() else shutil.copy2)(each, place / each.name)


@pytest.mark.parametrize("page", PAGES)
def test_howto_comes_to_its_end_when_followed(
    page: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLEXPORT_CACHE", str(shared / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("vlexport.stages.doctor.import_failures", lambda modules: {})  # half a minute of imports
    count = 0
    for file, language, text in blocks(page):
        if file:
            Path(file).write_text(text, encoding="utf-8")
        for line in text.splitlines() if language == "bash" else ():
            count += 1
            words = shlex.split(line)
            if words[0] == "python":
                run_program(tmp_path / words[1], shared)
            else:
                assert words[0] == "vlexport", line
                code = main(words[1:])
                assert code == 0, f"{line}\n{capfd.readouterr().err[-2000:]}"
    assert count > 3
    printed = capfd.readouterr().out
    for said in PAGES[page]:
        assert said in printed, f"{said} is nowhere in\n{printed[-3000:]}"


def test_every_page_is_followed_and_listed() -> None:
    assert {page.name for page in FOLDER.glob("*.md")} == {*PAGES, "README.md"}
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+\.md)\)", listed)) == set(PAGES)


def test_lines_for_other_machines_parse_when_they_are_ours() -> None:
    group: Any = typer.main.get_command(app)
    found = 0
    for page in PAGES:
        for _, language, text in blocks(page):
            for line in text.splitlines() if language in ("console", "yaml") else ():
                command = re.search(r"(?:\$|run:) (vlexport .*?)(?: >> .*)?$", line)
                if command:
                    found += 1
                    words = shlex.split(command[1])
                    group.commands[words[1]].make_context(words[1], words[2:])
    assert found >= 6
