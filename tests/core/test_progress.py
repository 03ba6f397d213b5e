"""Progress: silent by default, seconds per stage around any reporter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from vlexport.core import progress
from vlexport.core.progress import Silent, StageClock


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.said.append(f"begin {name}")
        yield
        self.said.append(f"end {name}")

    @contextlib.contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        yield lambda: self.said.append(f"{name} of {total}")

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes one second a look."""
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(now)))


@pytest.mark.usefixtures("ticks")
def test_seconds_add_up_when_a_stage_runs_twice() -> None:
    clock = StageClock(Silent())
    for name in ("passes", "lower", "passes"):
        with clock.stage(name):
            pass
    assert clock.seconds == {"passes": 2.0, "lower": 1.0}


def test_reporter_is_told_when_a_stage_is_timed() -> None:
    recorder = Recorder()
    with StageClock(recorder).stage("passes"):
        recorder.note("inside")
    assert recorder.said == ["begin passes", "inside", "end passes"]


def test_error_passes_when_a_stage_fails() -> None:
    clock = StageClock(Recorder())
    with pytest.raises(KeyError), clock.stage("passes"):
        raise KeyError("x")
    assert "passes" not in clock.seconds


def test_nothing_is_shown_when_silent(capfd: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    with silent.stage("a"), silent.steps("b", 3) as advance:
        advance()
        silent.note("c")
    assert capfd.readouterr() == ("", "")
