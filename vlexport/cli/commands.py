"""The commands by name, each loaded when it is typed: ``vlexport --help`` imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "build": ("vlexport.cli.build:build", "Build a verified, measured bundle from a model file."),
    "validate": ("vlexport.cli.measure:validate", "Measure accuracy on labelled samples, and fidelity to a reference."),
    "profile": (
        "vlexport.cli.measure:profile",
        "Measure latency, interleaved with a baseline, each in its own process.",
    ),
    "compare": (
        "vlexport.cli.compare:compare",
        "Compare two bundles: passes, precision, accuracy, latency, size, and the flag that made the difference.",
    ),
    "verify": (
        "vlexport.cli.bundle:verify",
        "Check that a bundle is intact and computes its golden vectors here.",
    ),
    "run": ("vlexport.cli.bundle:run", "Run a bundle on an image or on DATA."),
    "inspect": (
        "vlexport.cli.inspect:inspect",
        "Show what a model file or a bundle holds, and what targets would refuse of a model.",
    ),
    "explain": (
        "vlexport.cli.inspect:explain",
        "Explain an error code, or what each pass of a bundle did, where, and why not elsewhere.",
    ),
    "bisect": (
        "vlexport.cli.bisect:bisect",
        "Find the pass, and the match of it, that makes a built model differ from its source.",
    ),
    "passes": (
        "vlexport.cli.catalogue:passes",
        "List the passes in pipeline order, those of targets last, or describe one with its options.",
    ),
    "targets": (
        "vlexport.cli.catalogue:targets",
        "List the targets, what is installed here and the device profiles, or describe one target with its options.",
    ),
    "cache": (
        "vlexport.cli.cache:cache",
        "Show the cache of exports: folder, entries, size; VLEXPORT_CACHE moves it, VLEXPORT_CACHE=off does without.",
    ),
    "doctor": (
        "vlexport.cli.doctor:doctor",
        "Say what works on this machine, what to install for the rest, and what may surprise.",
    ),
    "schema": (
        "vlexport.cli.schema:schema",
        "List the JSON Schemas of what --json prints and of a bundle's files, or print one.",
    ),
}
"""Name → where its function is, and the first line of that function's docstring; a test keeps them equal."""


class LazyGroup(TyperGroup):
    """A group that knows its commands' names and summaries, and imports the one that is typed."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Loaded()

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of the help."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The rows of the help, without loading a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


class _Loaded(MutableMapping[str, Any]):
    """Name → command, made of its function when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, _, function = COMMANDS[name][0].partition(":")
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            alone.command(name)(getattr(importlib.import_module(module), function))
            self._made[name] = typer.main.get_command(alone)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)
