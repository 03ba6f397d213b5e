"""``vlexport doctor``: what works on this machine, and what to install."""

from __future__ import annotations

from typing import Annotated

import typer

from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import plain_json
from vlexport.core.errors import UsageError, nearest


def doctor(
    need: Annotated[
        list[str] | None,
        typer.Option("--need", help="Repeatable: `build`, or a target that must run here; exit code 4 if it does not."),
    ] = None,
    json_output: JsonOption = False,
) -> Outcome:
    """Say what works on this machine, what to install for the rest, and what may surprise."""
    from vlexport.report.health import health_lines
    from vlexport.stages.doctor import BUILD
    from vlexport.stages.doctor import doctor as stage
    from vlexport.targets import offered_targets

    known = (BUILD, *offered_targets())
    for name in need or ():
        if name not in known:
            raise UsageError(
                "VLX0701",
                f"no target '{name}'{nearest(name, known)}",
                where="--need",
                hint=f"known: {', '.join(known)}",
            )
    found = stage(wanted=tuple(need or ()))
    return Outcome(health_lines(found), plain_json(found), found.exit_code)
