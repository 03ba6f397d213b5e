"""Entry point: parses, runs a command, and turns every end into an exit code and one clear message.

``--json`` prints one object on stdout also on failure, ``--format`` a document; C++ runtimes print to file descriptor
1, so it is redirected first.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import vlexport
from vlexport.cli.commands import COMMANDS, LazyGroup
from vlexport.cli.console import error_lines
from vlexport.cli.formats import OutputFormat, format_of, formatted
from vlexport.cli.outcome import Outcome
from vlexport.core.errors import (
    EXIT_INPUT,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    BundleError,
    VlexportError,
    nearest,
)
from vlexport.core.inert import inert

OUTPUT_SCHEMA = 1
_BadUsage: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""What typer raises on a wrong command line: click's class, or that of the copy of click which typer carries."""

_CHOICE = re.compile(r"'([^']*)' is not one of (.*)")

app = typer.Typer(
    name="vlexport",
    help="Trained PyTorch vision models become verified, measured deployment bundles.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its import takes longer than all of the help
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is signal.SIG_DFL:  # not where, as by nohup, it is ignored
            signal.signal(each, signal.default_int_handler)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_INPUT
        if not isinstance(error, BrokenPipeError):  # whose reader, as `head`, has seen enough
            problem = BundleError(
                "VLX0607", f"the output cannot be written: {error.strerror}", where="stdout",
                hint="make room where it goes",
            )  # fmt: skip
            _complain(error_lines(problem))
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code and never raises."""
    as_json, started = "--json" in arguments, time.perf_counter()
    wanted = OutputFormat.HUMAN
    real_stdout = _aside() if as_json else None
    try:
        wanted = format_of(arguments)
        if wanted is not OutputFormat.HUMAN:
            real_stdout = _aside()
        found = app(list(arguments), standalone_mode=False)
        if found == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this number
            raise KeyboardInterrupt
        outcome = found if isinstance(found, Outcome) else Outcome(exit_code=found if isinstance(found, int) else 0)
        error: dict[str, str] | None = None
    except VlexportError as problem:
        outcome, error = Outcome(exit_code=problem.exit_code), problem.as_dict()
        _complain(error_lines(problem))
    except _BadUsage as problem:
        message, hint = _usage(problem)
        outcome = Outcome(exit_code=EXIT_USAGE)
        error = {"code": "VLX0703", "message": message, "where": "command line", "hint": hint}
        _complain([f"error VLX0703: {inert(message)}", f"  do:    {hint}"])
    except (KeyboardInterrupt, typer.Abort):
        outcome = Outcome(exit_code=EXIT_INTERRUPTED)
        error = {"code": "", "message": "interrupted", "where": "", "hint": ""}
        _complain(["interrupted: nothing was written"])
    except Exception as problem:  # the CLI boundary: a bug of ours becomes a crash file, not a traceback
        outcome, error = Outcome(exit_code=EXIT_INTERNAL), _crash(problem)
    if real_stdout is not None and wanted is not OutputFormat.HUMAN:
        _print(real_stdout, formatted(wanted, arguments, outcome, error, time.perf_counter() - started))
    elif real_stdout is not None:
        _print(real_stdout, [_json_line(outcome, error)])
    elif error is None:
        for line in outcome.lines:
            typer.echo(inert(line).replace("\n", "\\n"))
    return outcome.exit_code


def _usage(problem: Exception) -> tuple[str, str]:
    """What is wrong with a command line, and where to look; without any command, the help is shown first."""
    message: str = cast("Any", problem).format_message()
    if type(problem).__name__ == "NoArgsIsHelpError":
        _complain([message, ""])
        return "no command was given", "type one of these behind vlexport"
    message = message.replace(": Value error, ", ": ")
    if choice := _CHOICE.search(message):
        message = message.rstrip(".") + nearest(choice[1], re.findall(r"'([^']+)'", choice[2]))
    name = getattr(getattr(problem, "ctx", None), "info_name", None)
    return message, f"see `vlexport {name} --help`" if name in COMMANDS else "see `vlexport --help`"


def _aside() -> int:
    """Move stdout away from everybody else; returns the descriptor that still leads there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _json_line(outcome: Outcome, error: dict[str, str] | None) -> str:
    whole: dict[str, Any] = {"schema": OUTPUT_SCHEMA, "ok": outcome.exit_code == 0, "exit": outcome.exit_code}
    whole.update(outcome.payload if error is None else {"error": error})
    return json.dumps(whole, allow_nan=False)


def _print(descriptor: int, lines: Sequence[str]) -> None:
    """Give stdout back, and write to it."""
    sys.stdout.flush()
    os.dup2(descriptor, 1)
    os.close(descriptor)
    with open(1, "w", encoding="utf-8", closefd=False) as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _complain(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(line, err=True)


def _crash(problem: Exception) -> dict[str, str]:
    """Write a crash file without paths of this machine, and say where it is."""
    frames = traceback.extract_tb(problem.__traceback__)
    said = f"{type(problem).__name__}: {problem}".replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")
    text = [f"vlexport {vlexport.__version__}: {said}"]
    text += [f"  {os.path.basename(f.filename)}:{f.lineno} in {f.name}" for f in frames]
    with tempfile.NamedTemporaryFile(
        "w", prefix="vlexport-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("\n".join(text) + "\n")
    message = f"vlexport broke: {said}"
    _complain([f"error VLX0901: {inert(message)}", f"  do:    please report it with {file.name}"])
    return {"code": "VLX0901", "message": message, "where": file.name, "hint": "please report it with that file"}
