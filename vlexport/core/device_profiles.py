"""Device profiles: what the machine that runs a bundle can do, as data with sources."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources

from vlexport.core.artifact import Frozen
from vlexport.core.bundle_schema import Machine
from vlexport.core.errors import UsageError, nearest

_FILE = "device_profiles.json"
THIS = "this"
"""The profile of the machine that builds."""


class Fact(Frozen):
    """Something known about a device, and where it is written."""

    value: str
    source: str


class DeviceProfile(Frozen):
    """One kind of device.

    Attributes:
        id: Name for ``--for``.
        summary: One line.
        targets: Targets that run there; empty means any.
        instruction_set: Processor flags that it has for certain, as Linux spells them.
        facts: Name → fact; schemes, lowering and defaults read them.
    """

    id: str
    summary: str
    targets: tuple[str, ...]
    instruction_set: tuple[str, ...]
    facts: dict[str, Fact]

    def is_this(self, machine: Machine) -> bool:
        """Whether what is measured on ``machine`` says something about this device."""
        if not self.instruction_set:  # nothing is known that this machine could have
            return self.id == THIS
        return set(self.instruction_set) <= set(machine.instruction_set)


@lru_cache(maxsize=1)
def device_profiles() -> dict[str, DeviceProfile]:
    """All profiles by id."""
    text = resources.files("vlexport.core").joinpath(_FILE).read_text(encoding="utf-8")
    return {name: DeviceProfile.model_validate({"id": name, **values}) for name, values in json.loads(text).items()}


def device_profile(name: str, *, target: str) -> DeviceProfile:
    """The profile behind ``--for``.

    Raises:
        UsageError: VLX0703 when there is none of that name, or the target does not run there.
    """
    known = device_profiles()
    if name not in known:
        raise UsageError(
            "VLX0703",
            f"no device profile '{name}'{nearest(name, known)}",
            where="--for",
            hint=f"known: {', '.join(known)}",
        )
    found = known[name]
    if found.targets and target not in found.targets:
        raise UsageError(
            "VLX0703",
            f"{target} does not run on {name}",
            where="--for",
            hint=f"it runs on: {', '.join(p.id for p in known.values() if not p.targets or target in p.targets)}",
        )
    return found
