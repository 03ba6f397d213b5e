"""Targets: what lowers a Program to an artifact, and what runs it. One folder each, one line here.

Installed packages offer further ones as entry points (``core/plugins``).
"""

from __future__ import annotations

if __name__ != "vlexport.targets":
    raise ImportError("import vlexport.targets, not targets: the folder at the top is the package's source")

from vlexport.core.errors import CapabilityError, UsageError, nearest
from vlexport.core.plugins import Offer, load, offers, only_one, unusable
from vlexport.targets.base import API_VERSION, LoweredPass, Target

CATALOGUE: dict[str, str] = {
    "onnxruntime": "vlexport.targets.onnxruntime:OnnxRuntimeTarget",
    "tensorrt": "vlexport.targets.tensorrt:TensorRTTarget",
    "coreml": "vlexport.targets.coreml:CoreMLTarget",
}
"""Id → where the class lies. Imported when used."""


ALL = "all"
"""As ``--target``: every one of the catalogue."""
GROUP = "vlexport.targets"
"""Entry points of plugins: id → class."""


def offered_targets() -> dict[str, tuple[Offer, ...]]:
    """Id → who offers it: the catalogue, then installed plugins."""
    return offers(GROUP, CATALOGUE)


def open_target(name: str) -> Target:
    """The target behind an id. A plugin's code is imported here.

    Raises:
        UsageError: VLX0701 for an unknown id, with the nearest one.
        CapabilityError: VLX1001, VLX1002, VLX1003 for a plugin that cannot be used.
    """
    known = offered_targets()
    if name not in known:
        raise UsageError(
            "VLX0701", f"no target '{name}'{nearest(name, known)}", where="--target",
            hint=f"known: {', '.join(known)}; a target of another package must be installed",
        )  # fmt: skip
    offer = only_one(known[name])
    found: type[Target] = load(offer, base=Target, api_version=API_VERSION)
    if found.id != name:
        raise unusable(offer, f"its class calls itself '{found.id}'")
    return found()


def target_names(text: str) -> tuple[str, ...]:
    """Ids that ``--target`` names, each once: one, several with commas, or ``all`` of the catalogue.

    Raises:
        UsageError: VLX0701 when none is named.
    """
    names = tuple(CATALOGUE) if text == ALL else tuple(filter(None, dict.fromkeys(map(str.strip, text.split(",")))))
    if not names:
        raise UsageError(
            "VLX0701", "no target is named", where="--target", hint=f"known: {', '.join(offered_targets())}"
        )
    return names


def lowered_passes() -> dict[str, dict[str, LoweredPass]]:
    """Id of a pass over a lowered graph → target → how that target turns it on.

    A plugin's target that cannot be used has none: ``vlexport targets`` says why.
    """
    found: dict[str, dict[str, LoweredPass]] = {}
    for name in offered_targets():
        try:
            target = open_target(name)
        except CapabilityError:
            continue
        for each in target.lowered:
            found.setdefault(each.name, {})[name] = each
    return found
