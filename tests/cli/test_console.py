"""Names from files are text on a terminal: nothing in them is obeyed, and none begins a line that looks like ours."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlexport.cli.console import PlainReporter, RichReporter, error_lines, inert, one_line
from vlexport.core.errors import InputError

FORGED = "error VLX0000: forged"
HOSTILE = (
    f"a\n{FORGED}", f"a\r\n{FORGED}", f"a\r{FORGED}", f"a\u2028{FORGED}", f"a\u2029{FORGED}", f"a\x85{FORGED}",
    f"a\x0b{FORGED}", f"a\x0c{FORGED}", "\x1b[2J\x1b[31mred", "\x9b31mred", "\x1b]8;;http://x\x07link", "a\x08\x08b",
    "\u202egnp.exe\u202c",
    "\u2066x\u2069", "\u200b\ufeff", "<img src=x onerror=alert(1)>", "[red]x[/red]", "[/]", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_name_begins_no_line_and_moves_no_cursor_when_it_is_hostile(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error = InputError("VLX0203", f"{name} is no photo", where=name, hint=f"remove {name}")
    shown = "\n".join(error_lines(error))
    reporter = PlainReporter()
    reporter.note(f"skipped {name}")
    with reporter.steps(name, 2) as advance:
        advance()
    with RichReporter().steps(name, 1) as advance:
        advance()
    with RichReporter().stage(name):
        pass
    said = shown + "\n" + capfd.readouterr().err
    assert not any(line.startswith(FORGED) for line in said.splitlines())
    assert not {c for c in shown if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text())
def test_text_is_kept_when_it_is_harmless_and_is_one_line_when_it_must_be(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    if text.isascii() and text.isprintable():
        assert inert(text) == text
