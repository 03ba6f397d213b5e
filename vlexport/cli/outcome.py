"""What a command returns: exit code, lines for people, an object for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        lines: Text for stdout.
        payload: Content of the ``--json`` object beside ``schema``, ``ok`` and ``exit``.
        exit_code: Exit code.
    """

    lines: list[str] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
