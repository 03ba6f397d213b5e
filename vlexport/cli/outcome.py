"""What a command returns: exit code, lines for people, an object for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vlexport.core.verdict import Verdict

CheckOutcome = Literal["pass", "fail", "error", "inconclusive", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing that was judged, as a CI system lists it.

    Attributes:
        name: What.
        outcome: ``error`` where something stopped it; ``skipped`` where nothing here could judge it.
        said: What was found.
    """

    name: str
    outcome: CheckOutcome
    said: str = ""


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        lines: Text for stdout.
        payload: Content of the ``--json`` object beside ``schema``, ``ok`` and ``exit``.
        exit_code: Exit code.
        checks: What was judged, for ``--format junit``, ``github`` and ``markdown``.
    """

    lines: list[str] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    checks: tuple[Check, ...] = ()


def checks_of(verdicts: Iterable[Verdict], prefix: str = "") -> tuple[Check, ...]:
    """A check for every gate that was judged."""
    return tuple(Check(f"{prefix}gate {each.gate}", each.outcome, str(each)) for each in verdicts)
