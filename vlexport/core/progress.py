"""What a stage tells while it works. The command line shows it; the Python API is silent by default."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Reporter(Protocol):
    """Shows progress. Every step over two seconds is shown."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """One step of unknown length."""

    def steps(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A counted step; the callable advances it by one."""

    def note(self, text: str) -> None:
        """One line that the user should read."""


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Does nothing."""
        yield

    @contextlib.contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Does nothing."""
        yield lambda: None

    def note(self, text: str) -> None:
        """Does nothing."""


class StageClock:
    """Seconds per stage, around any reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show and time one stage."""
        started = time.perf_counter()
        with self.reporter.stage(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
