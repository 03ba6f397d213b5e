"""Entry point: parses, runs a command, and turns every end into an exit code and one clear message.

``--json`` prints one object on stdout also on failure; C++ runtimes print to file descriptor 1, so it is redirected
first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import click
import typer

import vlexport
from vlexport.cli import build, bundle, catalogue, measure
from vlexport.cli.console import error_lines, inert
from vlexport.cli.outcome import Outcome
from vlexport.core.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, VlexportError

OUTPUT_SCHEMA = 1

app = typer.Typer(
    name="vlexport",
    help="Trained PyTorch vision models become verified, measured deployment bundles.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    build.build,
    measure.validate,
    measure.profile,
    bundle.verify,
    bundle.run,
    catalogue.passes,
    catalogue.targets,
):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlexport {vlexport.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Trained PyTorch vision models become verified, measured deployment bundles."""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code and never raises."""
    as_json = "--json" in arguments
    real_stdout = _aside() if as_json else None
    try:
        found = app(list(arguments), standalone_mode=False)
        outcome = found if isinstance(found, Outcome) else Outcome(exit_code=found if isinstance(found, int) else 0)
        error: dict[str, str] | None = None
    except VlexportError as problem:
        outcome, error = Outcome(exit_code=problem.exit_code), problem.as_dict()
        _complain(error_lines(problem))
    except click.UsageError as problem:
        message = problem.format_message()
        outcome = Outcome(exit_code=EXIT_USAGE)
        error = {"code": "VLX0703", "message": message, "where": "command line", "hint": "see `vlexport --help`"}
        _complain([f"error VLX0703: {inert(message)}", "  do:    see `vlexport --help`"])
    except (KeyboardInterrupt, click.Abort):
        outcome = Outcome(exit_code=EXIT_INTERRUPTED)
        error = {"code": "", "message": "interrupted", "where": "", "hint": ""}
        _complain(["interrupted: nothing was written"])
    except Exception as problem:  # the CLI boundary: a bug of ours becomes a crash file, not a traceback
        outcome, error = Outcome(exit_code=EXIT_INTERNAL), _crash(problem)
    if real_stdout is not None:
        _print_json(real_stdout, outcome, error)
    elif error is None:
        for line in outcome.lines:
            typer.echo(inert(line))
    return outcome.exit_code


def _aside() -> int:
    """Move stdout away from everybody else; returns the descriptor that still leads there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _print_json(descriptor: int, outcome: Outcome, error: dict[str, str] | None) -> None:
    whole: dict[str, Any] = {"schema": OUTPUT_SCHEMA, "ok": outcome.exit_code == 0, "exit": outcome.exit_code}
    whole.update(outcome.payload if error is None else {"error": error})
    sys.stdout.flush()
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(whole, allow_nan=False) + "\n")


def _complain(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(line, err=True)


def _crash(problem: Exception) -> dict[str, str]:
    """Write a crash file without paths of this machine, and say where it is."""
    frames = traceback.extract_tb(problem.__traceback__)
    text = [f"vlexport {vlexport.__version__}: {type(problem).__name__}: {problem}"]
    text += [f"  {os.path.basename(f.filename)}:{f.lineno} in {f.name}" for f in frames]
    with tempfile.NamedTemporaryFile(
        "w", prefix="vlexport-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("\n".join(text) + "\n")
    message = f"vlexport broke: {type(problem).__name__}: {problem}"
    _complain([f"error VLX0901: {inert(message)}", f"  do:    please report it with {file.name}"])
    return {"code": "VLX0901", "message": message, "where": file.name, "hint": "please report it with that file"}
