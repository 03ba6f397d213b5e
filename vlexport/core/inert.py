"""Names that came from a model or a data set, made harmless: nothing in them is obeyed by a terminal, a page or a log."""

from __future__ import annotations

import unicodedata

_OBEYED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories: control, format (bidirectional marks), surrogates, private use, line and paragraph separators."""
_MARKDOWN = frozenset("\\`*_{}[]()<>#+-.!|~@:&$^=")
"""What Markdown, GitHub's mentions, references, links, emoji and tables give a meaning."""


def inert(text: str) -> str:
    """``text`` without anything a terminal would obey: control and format characters become ``\\xNN``."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in _OBEYED else f"\\x{ord(c):02x}" for c in text)


def one_line(text: str) -> str:
    """:func:`inert`, line breaks too."""
    return inert(text).replace("\n", "\\x0a")


def markdown_text(text: str) -> str:
    """:func:`one_line`, for the middle of a Markdown line: every character that could mean something is escaped.

    ``@`` and ``#`` become entities, so that a comment on GitHub mentions nobody and refers to no issue.
    """
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "#": "&#35;", "|": "&#124;", "`": "&#96;"}
    return "".join(entities.get(c, f"\\{c}" if c in _MARKDOWN else c) for c in one_line(text))
