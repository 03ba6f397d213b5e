"""Names that came from a model or a data set, made harmless: no terminal, page or log obeys anything in them."""

from __future__ import annotations

import re
import unicodedata

_OBEYED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories: control, format (bidirectional marks), surrogates, private use, line and paragraph separators."""
_COMMAND = re.compile(r"(?m)^(\s*):(?=:)|(#)#(?=\w*\[)")
"""What GitHub's and Azure's runners obey in a log: ``::warning::`` at a line's start, ``##[error]`` anywhere."""


def inert(text: str) -> str:
    """``text`` without anything a terminal or a CI system would obey: such characters become ``\\xNN``."""
    plain = "".join(c if c == "\n" or unicodedata.category(c) not in _OBEYED else f"\\x{ord(c):02x}" for c in text)
    return _COMMAND.sub(lambda found: f"{found[1]}\\x3a" if found[2] is None else "#\\x23", plain)


def one_line(text: str) -> str:
    """:func:`inert`, line breaks too."""
    return inert(text).replace("\n", "\\x0a")
