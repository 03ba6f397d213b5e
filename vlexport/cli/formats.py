"""``--format``: the same end of a command as lines for people, JUnit XML, GitHub's workflow commands or Markdown.

::

    pass          junit: a test case             github: notice     markdown: pass
    fail          junit: a failure in it         github: error      markdown: **fail**
    error         junit: an error in it          github: error      markdown: **error**
    inconclusive  junit: an error in it          github: warning    markdown: **inconclusive**
    skipped       junit: skipped                 github: notice     markdown: skipped

A command that does not come to its end is one check of its own, named after its error's code.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from vlexport.cli.outcome import Check, CheckOutcome, Outcome
from vlexport.core.errors import EXIT_GATE, EXIT_INCONCLUSIVE, UsageError
from vlexport.core.inert import inert
from vlexport.core.markdown_text import markdown_text


class OutputFormat(str, enum.Enum):
    """What ``--format`` takes."""

    HUMAN = "human"
    JUNIT = "junit"
    GITHUB = "github"
    MARKDOWN = "markdown"


FormatOption = Annotated[
    OutputFormat,
    typer.Option("--format", help="How results are printed: for people, or for a CI system.", show_default=True),
]
FORMATTED = ("build", "validate", "profile", "verify")
"""Commands that judge something. A ``--format`` of others is their own."""
_LEVELS = {"pass": "notice", "fail": "error", "error": "error", "inconclusive": "warning", "skipped": "notice"}
_OF_EXIT: dict[int, CheckOutcome] = {EXIT_GATE: "fail", EXIT_INCONCLUSIVE: "inconclusive"}


def format_of(arguments: Sequence[str]) -> OutputFormat:
    """The format that a command line asks for; people's, where it asks for none or for nonsense.

    It is read before the command line is parsed: a wrong one is to be reported in the format that was asked for.

    Raises:
        UsageError: VLX0703 when another format and ``--json`` are both asked for.
    """
    command = next((each for each in arguments if not each.startswith("-")), "")
    if command not in FORMATTED:
        return OutputFormat.HUMAN
    texts = [each.partition("=")[2] for each in arguments if each.startswith("--format=")]
    texts += [value for name, value in itertools.pairwise(arguments) if name == "--format"]
    found = next((each for each in OutputFormat if each.value in texts), OutputFormat.HUMAN)
    if found is not OutputFormat.HUMAN and "--json" in arguments:
        raise UsageError(
            "VLX0703", f"--json and --format {found.value} were both given", where="--format",
            hint="give one of them",
        )  # fmt: skip
    return found


def formatted(
    wanted: OutputFormat,
    arguments: Sequence[str],
    outcome: Outcome,
    error: Mapping[str, str] | None,
    seconds: float,
) -> list[str]:
    """What goes to stdout.

    Args:
        wanted: Any but people's.
        arguments: The command line.
        outcome: What the command returned; its exit code alone where there is an error.
        error: As in the ``--json`` object, or None.
        seconds: How long it took.
    """
    command = next((each for each in arguments if not each.startswith("-")), "")
    checks = checks_to_show(outcome, error)
    lines = [inert(line) for line in outcome.lines]
    if wanted is OutputFormat.JUNIT:
        from vlexport.cli.format_junit import junit_lines

        return junit_lines(f"vlexport {command}", checks, lines, seconds)
    if wanted is OutputFormat.GITHUB:
        return _github_lines(f"vlexport {command}", checks, lines)
    return _markdown_lines(f"vlexport {command}", checks, lines, outcome.exit_code)


def checks_to_show(outcome: Outcome, error: Mapping[str, str] | None) -> tuple[Check, ...]:
    """What was judged; an error is a check that did not pass, and a command without any is one that did."""
    ended = _OF_EXIT.get(outcome.exit_code, "error")
    if error is not None:
        said = "\n".join(filter(None, (error["message"], error["where"] and f"where: {error['where']}", error["hint"])))
        return (Check(inert(error["code"] or "interrupted"), ended, inert(said)),)
    found = tuple(Check(inert(each.name), each.outcome, inert(each.said)) for each in outcome.checks)
    if outcome.exit_code and all(each.outcome in ("pass", "skipped") for each in found):
        found += (Check(f"exit code {outcome.exit_code}", ended, inert("\n".join(outcome.lines[-1:]))),)
    return found or (Check("done", "pass"),)


def _github_lines(suite: str, checks: Sequence[Check], lines: Sequence[str]) -> list[str]:
    """Workflow commands, one a line; what stands in them is data."""
    found = []
    for each in checks:
        level = _LEVELS[each.outcome]
        said = f"{each.outcome}: {each.said}" if each.said else each.outcome
        found.append(f"::{level} title={github_property(f'{suite}: {each.name}')}::{github_data(said)}")
    if lines:
        found.append(f"::notice title={github_property(suite)}::{github_data(chr(10).join(lines))}")
    return found


def github_data(text: str) -> str:
    """Text as the message of a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def github_property(text: str) -> str:
    """Text as a property of a workflow command."""
    return github_data(text).replace(":", "%3A").replace(",", "%2C")


def _markdown_lines(suite: str, checks: Sequence[Check], lines: Sequence[str], exit_code: int) -> list[str]:
    """A heading, a table of what was judged, and what the command says."""
    bad = [each for each in checks if each.outcome not in ("pass", "skipped")]
    shown = "passed" if not bad else bad[0].outcome if exit_code == EXIT_GATE else f"exit code {exit_code}"
    found = [f"### {suite}: {shown}", "", "| check | outcome | found |", "|---|---|---|"]
    for each in checks:
        mark = each.outcome if each.outcome in ("pass", "skipped") else f"**{each.outcome}**"
        found.append(f"| {markdown_text(each.name)} | {mark} | {markdown_text(each.said)} |")
    return found + ([""] if lines else []) + [f"- {markdown_text(line.strip())}" for line in lines if line.strip()]
