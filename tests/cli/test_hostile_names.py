"""Every command on bundles, photos and models with hostile names: nothing is obeyed in any form of output."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlexport
from tests.cli.test_compare import rewritten
from tests.cli.test_formats import COMMAND, assert_junit
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import NearMissRecord

NAME = "[red]<script> \x1b]0;t\x07\u202e\u2066@all #1 a|b\n::warning::c\n##[error]d"
"""As a folder, a file, a label, a place in a graph; without a slash, so that a file system takes it."""
END = "</script></code><img src=x onerror=alert(1)>"
MARKUP = ("<img src=x onerror=alert(1)>", "[red]x[bold]", "\x1b[31mred\x1b[0m\x07\u202e")
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


def test_names_are_inert_in_terminal_and_report_when_labels_and_files_are_hostile(
    cli: Any, here: Path, make: Any, model_file: Path
) -> None:
    class Swapped(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {MARKUP[0]: image.mean(dim=(2, 3)) * self.scale, MARKUP[2]: image.amax(dim=(1, 2, 3))}

    for name, scale in (("a", 1.0), ("b", -1.0)):
        vlexport.save(
            Swapped(scale).eval(), f"{name}.pt", inputs=torch.rand(1, 3, 8, 8),
            preprocess="resize=8,crop=8,scale=1/255", labels=MARKUP,
        )  # fmt: skip
        code, _, err = cli("build", f"{name}.pt", "-o", f"{name}.bundle", "--no-profile")
        assert code == 0, err
    for label, colour in zip(MARKUP, range(3), strict=True):
        for file in MARKUP:
            make.photo(Path("photos") / label / f"{file}.png", colour)
    runs = [
        cli("validate", "a.bundle", "--data", "photos", "--reference", "b.bundle"),
        cli("run", "a.bundle", f"photos/{MARKUP[2]}/{MARKUP[0]}.png"),
        cli("verify", f"nowhere {MARKUP[2]}\nerror VLX0000: forged"),
    ]
    assert [code for code, _, _ in runs] == [0, 0, 1], runs
    shown = "".join(out + err for _, out, err in runs)
    assert not {c for c in shown if (ord(c) < 32 and c != "\n") or c == "\u202e"}
    assert "\\x1b[31mred" in shown  # shown in a way that nothing obeys
    assert "[red]x[bold]" in shown  # and markup is text
    assert "\nerror VLX0000" not in shown
    page = Path("a.bundle/measured/local-2/report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<img" not in page


def test_interface_survives_when_a_file_name_is_no_unicode(
    cli: Any, bundle: Path, other_bundle: Path, make: Any
) -> None:
    name = os.fsencode("photos/red/") + b"a\xff.png"
    make.photo(Path("photos/red/a.png"), 0).rename(os.fsdecode(name))
    code, out, err = cli("validate", "bundle", "--data", "photos", "--reference", "other")
    assert code == 0, err
    assert "differs: red/a" in out


def test_progress_reads_markup_as_text_when_a_stage_has_a_hostile_name(capfd: pytest.CaptureFixture[str]) -> None:
    from vlexport.cli.console import RichReporter

    with RichReporter().steps(MARKUP[1] + MARKUP[2], 2) as advance:
        advance()
    with RichReporter().stage(MARKUP[1] + MARKUP[2]):
        pass
    assert "\x07" not in capfd.readouterr().err
