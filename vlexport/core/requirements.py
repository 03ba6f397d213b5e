"""What an installed distribution asks for, and whether what is installed fits. No torch, no packaging.

Only the part of PEP 508 that our own metadata uses is read: names, extras, ``python_version`` and bounds of release
numbers. Anything else is left out, and never said to be wrong.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LINE = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?$")
_BOUND = re.compile(r"\s*(<=|>=|==|!=|<|>|~=)\s*([\w.*+!-]+)\s*")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")
_PYTHON = re.compile(r"python_version\s*(<=|>=|==|!=|<|>)\s*['\"]([\d.]+)['\"]")


@dataclass(frozen=True)
class Requirement:
    """One line of a distribution's metadata.

    Attributes:
        name: Of the distribution that is asked for.
        bounds: As written, ``>=2.11,<2.14``; empty where any version does.
        extra: The extra that asks for it; empty where everybody does.
        installed: Version of what is installed; empty where nothing is.
    """

    name: str
    bounds: str
    extra: str
    installed: str

    @property
    def fits(self) -> bool:
        """Whether the installed version lies within the bounds; a bound that is not understood excludes nothing."""
        found = (_BOUND.fullmatch(each) for each in self.bounds.split(",") if each.strip())
        return all(_holds(self.installed, each[1], each[2]) for each in found if each is not None)


def requirements_of(distribution: str) -> tuple[Requirement, ...]:
    """All that it asks for on this Python; nothing where it is not installed."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(_read(lines, distribution))


def installed_version(name: str) -> str:
    """Version of a distribution, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(lines: Iterable[str], itself: str) -> Iterator[Requirement]:
    here = ".".join(map(str, sys.version_info[:2]))
    for line in lines:
        match = _LINE.match(line)
        if match is None or match[1].lower() == itself.lower():
            continue
        name, bounds, marker = match[1], match[2].strip(), match[3] or ""
        if all(_holds(here, op, bound) for op, bound in _PYTHON.findall(marker)):
            extra = _EXTRA.search(marker)
            yield Requirement(name, bounds, extra[1] if extra else "", installed_version(name))


def _holds(version: str, op: str, bound: str) -> bool:
    """Compare release numbers; local parts and pre-releases do not count."""
    have, want = _release(version), _release(bound)
    if have is None or want is None or op == "~=" or "*" in bound:
        return True
    size = max(len(have), len(want))
    a, b = (each + (0,) * (size - len(each)) for each in (have, want))
    return {"<=": a <= b, ">=": a >= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}[op]


def _release(text: str) -> tuple[int, ...] | None:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else None
