"""Foreign text inside Markdown: it stays text, mentions nobody, links nothing. No torch."""

from __future__ import annotations

import html
import re

_MARKS = re.compile(r"([\\`*_{}\[\]()|~])")
_APART = "<!-- -->"
"""Stands for nothing, and keeps a reader's software from making a mention or a link of what it divides."""


def markdown_text(text: str) -> str:
    """``text`` for a table's cell or a paragraph of GitHub's Markdown.

    Args:
        text: Of any origin, without control characters.
    """
    marked = _MARKS.sub(r"\\\1", html.escape(text, quote=False))
    for sign in ("@", "#"):
        marked = marked.replace(sign, sign + _APART)
    marked = marked.replace("://", f":{_APART}//").replace("www.", f"www{_APART}.")
    return re.sub(r"\s*\n\s*", "<br>", marked)
