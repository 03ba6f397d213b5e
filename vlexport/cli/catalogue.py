"""``vlexport targets`` and ``vlexport passes``: what there is, plugins of installed packages among it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import plain_json
from vlexport.core.device_profiles import DeviceProfile, device_profiles
from vlexport.core.errors import CapabilityError
from vlexport.core.halves import require_build_half
from vlexport.core.option_records import option_lines, option_records
from vlexport.core.plugins import Offer, only_one

if TYPE_CHECKING:
    from vlexport.targets.base import LoweredPass


def targets(
    name: Annotated[
        str | None, typer.Argument(help="A target, for its options.", metavar="NAME", show_default=False)
    ] = None,
    json_output: JsonOption = False,
) -> Outcome:
    """List the targets, what is installed here and the device profiles, or describe one target with its options."""
    from vlexport.targets import offered_targets, open_target

    def about(offer: Offer) -> tuple[list[str], dict[str, Any]]:
        target = open_target(offer.name)
        probe = target.probe()
        state = ", ".join((probe.version, *probe.providers)) if probe.available else f"not here: {probe.reason}"
        state += f"; timing here: {probe.timing}"
        lines = [
            f"{offer.name}: {target.summary}{_origin(offer)}",
            f"  runs {', '.join(target.precisions)} ({target.precisions[0]} by default: {target.precision_reason}); "
            f"{state}",
        ]
        records = option_records(target.Options)
        payload = {**probe.model_dump(mode="json"), "summary": target.summary, "precisions": list(target.precisions)}
        lines += option_lines(offer.name, records) if name is not None else []
        return lines, {**payload, "distribution": offer.origin, "options": [plain_json(each) for each in records]}

    if name is not None:
        open_target(name)
        lines, payload = about(only_one(offered_targets()[name]))
        return Outcome(lines, {"name": name, **payload})
    lines, found, broken = _listed(offered_targets(), about)
    lines += ["device profiles, for --for:", *map(_profile_line, device_profiles().values())]
    profiles = {each.id: each.model_dump(mode="json", exclude={"id"}) for each in device_profiles().values()}
    return Outcome(lines, {"targets": found, "broken": broken, "device_profiles": profiles})


def _profile_line(profile: DeviceProfile) -> str:
    """What a device is, which targets run there, and what it is known to lack."""
    lacking = ", ".join(name for name, fact in profile.facts.items() if fact.value == "no")
    fits = ", ".join(profile.targets) or "every target"
    return f"  {profile.id}: {profile.summary}; fits {fits}{f'; lacks {lacking}' if lacking else ''}"


def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass, for its whole description.", metavar="NAME", show_default=False)
    ] = None,
    json_output: JsonOption = False,
) -> Outcome:
    """List the passes in pipeline order, those of targets last, or describe one with its options."""
    require_build_half("vlexport passes")
    from vlexport.passes import offered_passes, pass_class
    from vlexport.targets import lowered_passes

    lowered = lowered_passes()
    if name is not None:
        here = None if name in offered_passes() else lowered.get(name)
        kind = next(iter(here.values())).kind() if here else pass_class(name, others=lowered)
        module = inspect.getmodule(kind)
        text = inspect.cleandoc((module.__doc__ if module else None) or inspect.getdoc(kind) or "")
        records = option_records(kind.Options)
        lines = [*text.splitlines(), "", *([_asked_for(here)] if here else [])]
        lines += option_lines(name, records)
        payload = {"stage": kind.stage, "effect": kind.effect, "options": [plain_json(each) for each in records]}
        if here:
            return Outcome(lines, {"name": name, "description": text, "turned_on_by": _switches(here), **payload})
        offer = only_one(offered_passes()[name])
        return Outcome(lines, {"name": name, "description": text, "distribution": offer.origin, **payload})

    def about(offer: Offer) -> tuple[list[str], dict[str, Any]]:
        kind = pass_class(offer.name)
        run = "" if offer.built_in else f"; run with --pass {offer.name}"
        summary = (inspect.getdoc(kind) or "").rstrip(".") if run else inspect.getdoc(kind)
        line = f"{offer.name} ({kind.stage}, {kind.effect}): {summary}{_origin(offer)}{run}"
        return [line], {"stage": kind.stage, "effect": kind.effect, "distribution": offer.origin}

    lines, found, broken = _listed(offered_passes(), about)
    rows = [{"name": each, **payload} for each, payload in found.items()]
    for each, targets_of in lowered.items():
        kind = next(iter(targets_of.values())).kind()
        summary = f"{each} ({kind.stage}, {kind.effect}): {inspect.getdoc(kind)}"
        lines.append(f"{summary.rstrip('.')}; on what is lowered, {_asked_for(targets_of)}")
        rows.append(
            {"name": each, "stage": kind.stage, "effect": kind.effect, "turned_on_by": _switches(targets_of)}
        )  # fmt: skip
    return Outcome(lines, {"passes": rows, "broken": broken})


def _switches(lowered: Mapping[str, LoweredPass]) -> list[str]:
    """What ``--set`` takes to turn a lowered pass on, for each target that has it."""
    return [f"{target}.{each.option}=true" for target, each in lowered.items()]


def _asked_for(lowered: Mapping[str, LoweredPass]) -> str:
    """How a lowered pass is turned on; where a target decides on its own, that and how to overrule it."""
    from vlexport.targets import open_target

    asked, decided = [], []
    for target, each in lowered.items():
        switch = f"--set {target}.{each.option}=true"
        left_open = open_target(target).Options.model_fields[each.option].default is None
        if left_open:
            decided.append(f"run as {target} decides; {switch} or =false overrules")
        else:
            asked.append(f"run with {switch}")
    return "; ".join([*asked, *decided])


def _listed(
    claims: dict[str, tuple[Offer, ...]], about: Callable[[Offer], tuple[list[str], dict[str, Any]]]
) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Lines, payload by id, and the errors of plugins that cannot be used: they spoil nobody else's listing.

    Raises:
        CapabilityError: VLX1001 when two packages claim one id.
    """
    lines: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    broken: dict[str, dict[str, str]] = {}
    for name, same in claims.items():
        offer = only_one(same)
        try:
            more, found[name] = about(offer)
        except CapabilityError as error:
            if offer.built_in:
                raise
            broken[name] = error.as_dict()
            more = [f"{name}: broken: {error.message}", f"  {error.hint}"]
        lines += more
    return lines, found, broken


def _origin(offer: Offer) -> str:
    return "" if offer.built_in else f" [{offer.origin}]"
