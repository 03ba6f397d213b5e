"""Every command on bundles, photos and models with hostile names: nothing is obeyed in any form of output."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_compare import rewritten
from tests.cli.test_formats import COMMAND, assert_junit
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import NearMissRecord

NAME = "[red]<script> \x1b]0;t\x07\u202e\u2066@all #1 a|b\n::warning::c\n##[error]d"
"""As a folder, a file, a label, a place in a graph; without a slash, so that a file system takes it."""
END = "</script></code><img src=x onerror=alert(1)>"
OBEYED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


@pytest.fixture
def named(bundle: Path) -> str:
    """A bundle in a folder of a hostile name, whose labels and records are hostile too."""
    folder = bundle.parent / NAME
    shutil.move(bundle, folder)
    found = read_bundle(folder)
    miss = NearMissRecord(pattern=NAME, node=NAME + END, reason=NAME + END)
    first, *others = found.main.passes
    passes = (first.model_copy(update={"near_misses": (miss,)}), *others)
    labels = (NAME + END, "green", "blue")
    main = found.main.model_copy(update={"labels": labels, "passes": passes})
    rewritten(folder, components={"main": main}, tools={**found.tools, NAME: END}, vlexport=NAME)
    return NAME


def assert_inert(text: str, *, commands: bool = False) -> None:
    """No terminal and no runner obeys anything in a text; ``commands`` are ours alone."""
    assert [c for c in text if c != "\n" and unicodedata.category(c) in OBEYED] == []
    assert "##[" not in text
    for line in text.splitlines():
        assert COMMAND.fullmatch(line) if commands else not re.match(r"\s*::", line), line


def test_child_opens_an_artifact_in_a_folder_of_a_hostile_name(named: str, cli: Any) -> None:
    code, out, err = cli("verify", named)
    assert code == 0, err
    assert_inert(out + err)


@pytest.mark.usefixtures("runtime_here")
def test_nothing_is_obeyed_in_what_people_read(named: str, cli: Any, make: Any) -> None:
    photo = make.photo(Path("photos") / "green" / f"{NAME}.png", 1)
    commands: list[tuple[object, ...]] = [
        ("inspect", named), ("explain", named), ("explain", named, "--pass", "canonicalize"), ("verify", named),
        ("compare", named, named), ("run", named, photo), ("validate", named, "--data", "photos"),
        ("validate", named, "--data", "photos", "--reference", named),
        # What is refused names what was typed.
        ("build", NAME), ("build", "x", "--target", NAME), ("build", "x", f"--{NAME}"), ("inspect", NAME + END),
        ("bisect", NAME + END), ("explain", NAME + END), ("explain", named, "--pass", NAME), ("passes", NAME),
        ("targets", NAME), ("schema", NAME), ("doctor", "--need", NAME), ("profile", NAME + END),
        ("verify", NAME + END), ("compare", named, NAME + END),
        ("compare", named, named, "--format", NAME), (NAME,),
    ]  # fmt: skip
    said = ""
    for command in commands:
        _, out, err = cli(*command)
        assert_inert(out)
        assert_inert(err)
        said += out + err
    assert said.count("\\x1b]0;t") >= len(commands), "the names were shown at all"


@pytest.mark.usefixtures("runtime_here")
def test_nothing_is_obeyed_in_what_programs_read(named: str, cli: Any, make: Any) -> None:
    make.photo(Path("photos") / "green" / f"{NAME}.png", 1)
    for command in (("verify", named), ("validate", named, "--data", "photos"), ("verify", NAME + END)):
        _, out, err = cli(*command, "--format", "junit")
        assert_junit(out)
        assert_inert(out + err)
        _, out, err = cli(*command, "--format", "github")
        assert_inert(out, commands=True)
        _, out, err = cli(*command, "--format", "markdown")
        assert_inert(out + err)
        assert not re.search(r"<(?!br>|!-- -->)", out)
        _, out, err = cli(*command, "--json")
        assert out.isascii()
        assert out.count("\n") == 1
        json.loads(out)
        assert_inert(err)
    _, out, _ = cli("compare", named, named, "--format", "markdown")
    assert_inert(out)
    assert not re.search(r"<(?!br>|!-- -->|/?details>|summary>|/summary>)", out)
    page = (Path(named) / "measured" / "local-2" / "report.html").read_text(encoding="utf-8")
    assert_inert(page)
    assert not re.search(r"<script|<img|onerror=(?!alert\(1\)&gt;)", page)


def test_json_and_another_format_are_refused_together(bundle: Path, cli: Any) -> None:
    err = cli.refused(2, "VLX0703", "compare", "bundle", "bundle", "--format", "markdown")
    assert "--json and --format markdown" in err
