"""``vlexport compare``: what differs between two bundles, and which flag made it so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome
from vlexport.core.bundle_schema import plain_json
from vlexport.core.errors import UsageError, nearest

_FORMATS = ("human", "markdown")
_HELP = "A bundle, or the folder of several targets' bundles."


def compare(
    a: Annotated[Path, typer.Argument(help=_HELP, metavar="A", show_default=False)],
    b: Annotated[Path, typer.Argument(help=_HELP, metavar="B", show_default=False)],
    shape: Annotated[
        str, typer.Option("--format", help="human, or markdown: a comment for a pull request.", metavar="FORMAT")
    ] = "human",
    json_output: JsonOption = False,
) -> Outcome:
    """Compare two bundles: passes, precision, accuracy, latency, size, and the flag that made the difference."""
    from vlexport.report.difference import difference_lines, difference_markdown
    from vlexport.stages.compare import compare as stage

    if shape not in _FORMATS:
        raise UsageError(
            "VLX0703", f"no format '{shape}'{nearest(shape, _FORMATS)}", where="--format",
            hint=f"known: {', '.join(_FORMATS)}",
        )  # fmt: skip
    if json_output and shape != "human":
        raise UsageError(
            "VLX0703", f"--json and --format {shape} were both given", where="--format", hint="give one of them"
        )
    found = stage(a, b)
    lines: list[str] = []
    for each in found:
        if lines:
            lines.append("")
        lines += difference_markdown(each).splitlines() if shape == "markdown" else difference_lines(each)
    return Outcome(lines, {"differences": [plain_json(each) for each in found]})
