"""What ``vlexport doctor`` found, as typed data. No torch."""

from __future__ import annotations

from typing import Literal

from vlexport.core.artifact import Frozen
from vlexport.core.errors import EXIT_CAPABILITY, EXIT_OK

State = Literal["ok", "absent", "warning", "broken"]


class Symptom(Frozen):
    """One thing that was looked at.

    Attributes:
        about: What: a package, a target, the cache.
        state: ``ok``; ``absent`` (not installed, and nothing else suffers); ``warning`` (works, and may surprise);
            ``broken`` (what is installed does not work).
        found: In words.
        do: What to type or change; empty where nothing needs to be done.
    """

    about: str
    state: State
    found: str
    do: str = ""


class Health(Frozen):
    """All of it.

    Attributes:
        works: What can be done here, in words a user types: ``build models``, ``run onnxruntime``.
        symptoms: In the order they were looked at.
        unmet: What was asked for and does not work here.
    """

    works: tuple[str, ...]
    symptoms: tuple[Symptom, ...]
    unmet: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """4 when something is broken, nothing runs here, or what was asked for does not; else 0."""
        broken = any(each.state == "broken" for each in self.symptoms)
        return EXIT_CAPABILITY if broken or self.unmet or not self.works else EXIT_OK
