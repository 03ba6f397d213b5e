"""``vlexport schema``: the JSON Schemas of what ``--json`` prints and of a bundle's files."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome


def schema(
    name: Annotated[
        str | None,
        typer.Argument(help="A command, a file of a bundle, or `error`.", metavar="NAME", show_default=False),
    ] = None,
    json_output: JsonOption = False,
) -> Outcome:
    """List the JSON Schemas of what --json prints and of a bundle's files, or print one."""
    from vlexport.core.outputs import schema_named, schema_names

    if name is None:
        known = schema_names()
        return Outcome([f"{each}: {what}" for each, what in known.items()], {"schemas": known})
    found = schema_named(name)
    return Outcome(json.dumps(found, indent=2).splitlines(), {"name": name, "json_schema": found})
