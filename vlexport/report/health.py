"""What the doctor found, in words."""

from __future__ import annotations

from vlexport.core.health import Health, State

_WORDS: dict[State, str] = {"ok": "ok", "absent": "absent", "warning": "warning", "broken": "BROKEN"}


def health_lines(found: Health) -> list[str]:
    """Lines for the terminal: every thing that was looked at, then what works here and what was asked for in vain."""
    lines = []
    for each in found.symptoms:
        lines.append(f"{_WORDS[each.state]:8} {each.about}: {each.found}")
        lines += [f"         do: {each.do}"] if each.do else []
    lines.append(f"Works    {'; '.join(found.works) or 'nothing runs here'}")
    lines += [f"Lacks    {each}" for each in found.unmet]
    return lines
