"""What people see: progress on stderr, results on stdout, hostile names inert."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from vlexport.core.errors import VlexportError
from vlexport.core.inert import inert, one_line

_SHOWN_AFTER_SECONDS = 2.0


def error_lines(error: VlexportError) -> list[str]:
    """An error as it is shown: what, where, what to do."""
    lines = [f"error {error.code}: {error.message}"]
    if error.where:
        lines.append(f"  where: {error.where}")
    if error.hint:
        lines.append(f"  do:    {error.hint}")
    return [inert(line).replace("\n", "\n         ") for line in lines]


class PlainReporter:
    """One line a finished step, for CI, pipes and NO_COLOR; silent about short steps."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what took longer than two seconds."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        if spent >= _SHOWN_AFTER_SECONDS:
            print(f"{one_line(name)}: {spent:.1f} s", file=sys.stderr, flush=True)  # noqa: T201

    @contextlib.contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Say every tenth of a long step."""
        done, started, last = 0, time.perf_counter(), time.perf_counter()

        def advance() -> None:
            nonlocal done, last
            done += 1
            now = time.perf_counter()
            if now - last >= 10 and done < total:
                last = now
                left = (now - started) / done * (total - done)
                print(f"{one_line(name)}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201

        yield advance

    def note(self, text: str) -> None:
        """One line; a name in it that holds a line break begins no line that looks like another message."""
        print(inert(text).replace("\n", "\n  "), file=sys.stderr)  # noqa: T201


class RichReporter(PlainReporter):
    """A live bar on a terminal."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A spinner that leaves nothing behind."""
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(one_line(name))), super().stage(name):
            yield

    @contextlib.contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar with the time left."""
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(escape(one_line(name)), total=total)
            yield lambda: bar.advance(task)


def make_reporter() -> PlainReporter:
    """A live reporter on a terminal, plain lines elsewhere."""
    live = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and not os.environ.get("CI")
    return RichReporter() if live else PlainReporter()
