"""``vlexport targets`` and ``vlexport passes``."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome
from vlexport.core.halves import require_build_half


def targets(json_output: JsonOption = False) -> Outcome:
    """List the targets and what is installed here."""
    from vlexport.targets import CATALOGUE, open_target

    lines, payload = [], {}
    for name in CATALOGUE:
        target = open_target(name)
        probe = target.probe()
        state = f"{probe.version}, {', '.join(probe.providers)}" if probe.available else f"not here: {probe.reason}"
        lines += [f"{name}: {target.summary}", f"  runs {', '.join(target.precisions)}; {state}"]
        lines += [f"  --set {name}.{key}={field.default}" for key, field in target.Options.model_fields.items()]
        payload[name] = probe.model_dump(mode="json")
    return Outcome(lines, {"targets": payload})


def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass, for its whole description.", metavar="NAME", show_default=False)
    ] = None,
    json_output: JsonOption = False,
) -> Outcome:
    """List the passes in pipeline order, or describe one."""
    require_build_half("vlexport passes")
    from vlexport.passes import CATALOGUE, pass_class

    if name is not None:
        module = inspect.getmodule(pass_class(name))
        text = inspect.cleandoc((module.__doc__ if module else None) or "")
        return Outcome(text.splitlines(), {"name": name, "description": text})
    found = {each: pass_class(each) for each in CATALOGUE}
    lines = [f"{each} ({kind.stage}, {kind.effect}): {inspect.getdoc(kind)}" for each, kind in found.items()]
    return Outcome(lines, {"passes": [{"name": n, "stage": k.stage, "effect": k.effect} for n, k in found.items()]})
