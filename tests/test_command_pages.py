"""A page for every command: its options are made from the command line, its examples parse, its exit codes exist.

``UPDATE_GOLDEN=1 python -m pytest tests/test_command_pages.py`` writes the tables of options anew.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vlexport.cli.main import app
from vlexport.core import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "commands"
GROUP: Any = typer.main.get_command(app)
NAMES = sorted(GROUP.commands)
BEGIN, END = "<!-- options -->\n", "<!-- /options -->\n"
EXITS = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def options(name: str) -> str:
    """The table of a command's arguments and options, from the command line itself."""
    lines = ["", "## Options", "", "| option | what |", "|---|---|"]
    for parameter in GROUP.commands[name].params:
        if parameter.param_type_name == "argument":
            shown = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            shown = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
        lines.append(f"| {shown} | {(parameter.help or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_page_tells_options_and_exit_codes(name: str) -> None:
    page = PAGES / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    head = text.partition(BEGIN)[0].rstrip("\n")
    wanted = f"{head}\n\n{BEGIN}{options(name)}{END}"
    if os.environ.get("UPDATE_GOLDEN"):
        page.write_text(wanted, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == wanted, "UPDATE_GOLDEN=1 writes the table of options anew"
    assert text.startswith(f"# vlexport {name}\n")
    pitfalls, _, exits = head.partition("## Pitfalls")[2].partition("## Exit codes")
    assert len(re.findall(r"^- ", pitfalls, re.MULTILINE)) > 0
    listed = [int(number) for number in re.findall(r"^\| (\d+) \|", exits, re.MULTILINE)]
    assert listed == sorted(set(listed))
    assert {0} < set(listed) <= EXITS


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_a_page_parse(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "vlexport"
        GROUP.commands[words[1]].make_context(words[1], words[2:])


def test_every_flag_that_a_page_names_exists() -> None:
    known = {"--help", "--version", "--body-file", "--record"}  # gh's and our benchmarks'
    known |= {opt for each in GROUP.commands.values() for p in each.params for opt in (*p.opts, *p.secondary_opts)}
    for page in sorted(PAGES.glob("*.md")):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
        assert named <= known, page.name


def test_every_command_is_listed_and_every_link_leads_somewhere() -> None:
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.md" for name in NAMES} <= set(re.findall(r"\((\w+\.md)\)", text))
    for page in (*PAGES.glob("*.md"), *(ROOT / "docs" / "howto").glob("*.md"), ROOT / "docs" / "how_it_works.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links {link}"
