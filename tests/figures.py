"""Places of a page that hold what was recorded: ``<!-- figures: NAME -->`` to ``<!-- end of figures -->``."""

from __future__ import annotations

import os
import re
from pathlib import Path


def place(name: str) -> re.Pattern[str]:
    """The place of that name; its second group is what it holds."""
    return re.compile(rf"(<!-- figures: {name} -->\n)(.*?)(\n<!-- end of figures -->)", re.DOTALL)


def require_figures(page: Path, name: str, made: str) -> None:
    """A page holds what the record gives. ``UPDATE_GOLDEN=1`` writes it there instead.

    Args:
        page: Markdown file.
        name: Of the place.
        made: The table as the record gives it.
    """
    text = page.read_text(encoding="utf-8")
    found = place(name).search(text)
    assert found is not None, f"no place for {name} in {page.name}"
    if os.environ.get("UPDATE_GOLDEN"):
        page.write_text(text[: found.start(2)] + made + text[found.end(2) :], encoding="utf-8")
        return
    assert found.group(2) == made
