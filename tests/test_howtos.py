"""The how-tos are followed command by command, each in an empty folder, in this process: they must end as they say."""

from __future__ import annotations

import re
import runpy
import shlex
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


@pytest.mark.parametrize("page", PAGES)
def test_howto_comes_to_its_end_when_followed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
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
                runpy.run_path(words[1], run_name="__main__")
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
