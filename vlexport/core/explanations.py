"""What an error code means: its cause, an example, what to do. ``vlexport explain VLX0503`` shows it. No torch."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib import resources

from vlexport.core.artifact import Frozen
from vlexport.core.errors import CODES, UsageError, nearest

_CODE = re.compile(r"(?i)vlx\s*-?\s*(\d{1,6})")


class Explanation(Frozen):
    """One code.

    Attributes:
        code: ``VLX0503``.
        kind: The kind of problem, as in docs/errors.md.
        cause: Why it comes about.
        example: What leads to it.
        fix: What to do.
    """

    code: str
    kind: str
    cause: str
    example: str
    fix: str


@lru_cache(maxsize=1)
def explanations() -> dict[str, Explanation]:
    """Code → what it means, for every code."""
    text = resources.files("vlexport.core").joinpath("explanations.json").read_text(encoding="utf-8")
    found = json.loads(text)
    return {code: Explanation(code=code, kind=CODES[code], **each) for code, each in found.items() if code in CODES}


def code_in(text: str) -> str:
    """The code that a text is meant to be (``vlx503`` is ``VLX0503``), or an empty string."""
    match = _CODE.fullmatch(text.strip())
    return f"VLX{int(match[1]):04}" if match else text.upper() * text.upper().startswith("VLX")


def explanation(code: str) -> Explanation:
    """What a code means.

    Raises:
        UsageError: VLX0703 for a code that does not exist, with the nearest one.
    """
    if code not in CODES:
        raise UsageError(
            "VLX0703", f"no error has the code '{code}'{nearest(code, CODES)}", where="explain",
            hint="docs/errors.md lists them all",
        )  # fmt: skip
    return explanations()[code]


def explanation_lines(found: Explanation) -> list[str]:
    """Lines for the terminal."""
    return [
        f"{found.code}   {found.kind}",
        f"Cause     {found.cause}",
        f"Example   {found.example}",
        f"Do        {found.fix}",
    ]
