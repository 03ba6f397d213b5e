"""A value that pydantic refuses, in words: what may be chosen, and the nearest of it. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlexport.core.errors import nearest

_ALTERNATIVES = re.compile(r"\^\(([\w-]+(?:\|[\w-]+)+)\)\$")
"""A pattern that is a list of words."""


def wrong_value(error: Mapping[str, Any]) -> str:
    """What is wrong with a value.

    Args:
        error: One of ``ValidationError.errors()``.
    """
    given, known = error.get("input"), _choices(error)
    if not known or not isinstance(given, str):
        return str(error["msg"]).removeprefix("Value error, ").lower()
    return f"no value is called '{given}'{nearest(given, known)}; it is one of {', '.join(known)}"


def _choices(error: Mapping[str, Any]) -> list[str]:
    """Words that were to be chosen from; none where it is not about a choice."""
    about = error.get("ctx", {})
    if error["type"] == "literal_error":
        return re.findall(r"'([^']*)'", str(about.get("expected", "")))
    if error["type"] == "string_pattern_mismatch":
        found = _ALTERNATIVES.fullmatch(str(about.get("pattern", "")))
        return found[1].split("|") if found else []
    return []
