"""Names that came from a model or a data set, made harmless: no terminal, page or log obeys anything in them."""

from __future__ import annotations

import unicodedata

_OBEYED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories: control, format (bidirectional marks), surrogates, private use, line and paragraph separators."""


def inert(text: str) -> str:
    """``text`` without anything a terminal would obey: control and format characters become ``\\xNN``."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in _OBEYED else f"\\x{ord(c):02x}" for c in text)


def one_line(text: str) -> str:
    """:func:`inert`, line breaks too."""
    return inert(text).replace("\n", "\\x0a")
