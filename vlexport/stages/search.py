"""search: the only search loop. Candidates are recipes, examined in turn, judged and written down. No torch.

A strategy proposes the next candidate as a pure function of the trials so far, so a search that was killed goes on
where it stopped: the journal gives back the trials, and from them the strategy proposes what it proposed before. A
candidate is a set of options (``SCOPE.NAME`` → value) laid over a recipe; what a search decides becomes part of the
resolved recipe, and a build replays it without measuring. Passes never time anything; only here does a clock choose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import ValidationError

from vlexport.core.bundle_schema import Trial, canonical_json, plain_json
from vlexport.core.cache import Cache
from vlexport.core.config import BuildConfig
from vlexport.core.dataset import Dataset
from vlexport.core.errors import BundleError, DataError

Options = Mapping[str, str]
CHOOSE_PERCENT = 60
"""Share of the samples that a search chooses on; the rest confirms, once, and is what is reported."""


class Strategy(Protocol):
    """Decides what to try next."""

    def propose(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        """The next candidate, or None when there is nothing left to try. A pure function of ``trials``."""

    def best(self, trials: Sequence[Trial]) -> dict[str, str]:
        """The options to keep after ``trials``; empty for the recipe as it stands."""


@dataclass(frozen=True)
class CoordinateSteps:
    """Varies one option at a time, from the recipe as it stands, and keeps what measured faster than the best so far.

    Attributes:
        axes: Option → values to try beside the recipe's own.
    """

    axes: Mapping[str, tuple[str, ...]]

    def propose(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        """The first step that was not tried from the best so far."""
        seen = [trial.options for trial in trials]
        best: dict[str, str] = {}
        for axis, values in self.axes.items():
            for value in values:
                candidate = {**best, axis: value}
                if candidate not in seen:
                    return candidate
            best = self._after(axis, best, trials)
        return None

    def best(self, trials: Sequence[Trial]) -> dict[str, str]:
        """What the steps so far have kept."""
        best: dict[str, str] = {}
        for axis in self.axes:
            best = self._after(axis, best, trials)
        return best

    def _after(self, axis: str, best: dict[str, str], trials: Sequence[Trial]) -> dict[str, str]:
        """The best once an axis was walked: its last faster step, for each was measured against the one before."""
        found = best
        for trial in trials:
            others = {key: value for key, value in trial.options.items() if key != axis}
            if trial.outcome == "faster" and axis in trial.options and others == best:
                found = dict(trial.options)
        return found


class Journal:
    """Trials on disk, one JSON line each, flushed before the next is examined.

    Args:
        path: The file.
        resume: Keep what an earlier search wrote, but for a line that a killed process left half-written; otherwise it
            starts empty.

    Raises:
        BundleError: VLX0607 when it cannot be written, also later.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.trials: list[Trial] = []
        with self._writing():
            if resume and path.is_file():
                self.trials = list(_readable(path.read_text(encoding="utf-8", errors="replace").splitlines()))
            scratch = path.with_name(f"{path.name}.{os.getpid()}")
            scratch.write_text("".join(map(_line, self.trials)), encoding="utf-8")
            scratch.replace(path)

    def add(self, trial: Trial) -> None:
        """Write a trial down."""
        self.trials.append(trial)
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(trial))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The search is over, and its decision stands in a recipe."""
        with self._writing():
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BundleError(
                "VLX0607", f"the search's journal cannot be written: {error.strerror}", where=str(self.path.parent),
                hint="set VLEXPORT_CACHE to a folder that can be written",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """What a search decided.

    Attributes:
        options: Options to lay over the recipe.
        trials: All that was tried, replayed ones included.
        finished: False when the budget ended it.
    """

    options: dict[str, str]
    trials: tuple[Trial, ...]
    finished: bool


def search(
    strategy: Strategy,
    examine: Callable[[Options, Options], Trial],
    journal: Journal,
    *,
    budget_minutes: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Decision:
    """Try candidates until there are none left or the budget is spent.

    Args:
        strategy: Proposes candidates.
        examine: Judges a candidate and measures it against the best so far: ``examine(candidate, best) -> Trial``.
        journal: Where trials are written.
        budget_minutes: No candidate is begun after so many minutes; None means no limit.
        clock: Seconds, monotonic.
    """
    started = clock()
    while (candidate := strategy.propose(journal.trials)) is not None:
        if budget_minutes is not None and clock() - started >= 60 * budget_minutes:
            return Decision(strategy.best(journal.trials), tuple(journal.trials), finished=False)
        journal.add(examine(candidate, strategy.best(journal.trials)))
    return Decision(strategy.best(journal.trials), tuple(journal.trials), finished=True)


def candidate(recipe: BuildConfig, options: Options) -> BuildConfig:
    """The recipe of a candidate: a pure function, so that it can be built and measured anywhere.

    A key with a dot is an option of a pass or target, one without is a field of the recipe (``precision``, ``tokens``).
    """
    fields = {key: value for key, value in options.items() if "." not in key}
    scoped = {key: value for key, value in options.items() if "." in key}
    return recipe.model_copy(update={**fields, "options": {**recipe.options, **scoped}})


def open_journal(key: Mapping[str, object], *, resume: bool) -> Journal:
    """The journal of a search in the cache folder, which is made where it is missing.

    Args:
        key: Everything that a trial depends on, as JSON values; it decides the name.
        resume: As for :class:`Journal`.

    Raises:
        BundleError: VLX0607.
    """
    return Journal(Cache().folder / journal_name(key), resume=resume)


def journal_name(key: Mapping[str, object]) -> str:
    """File name of the journal of a search, by the hash of ``key``."""
    return f"search-{hashlib.sha256(canonical_json(dict(key)).encode()).hexdigest()}.jsonl"


@dataclass(frozen=True)
class Split:
    """The samples of a search.

    Attributes:
        choosing: Those that candidates are judged on.
        confirming: The others, which are looked at once, and are what is reported.
        choosing_samples: Number of good samples to choose on.
        confirming_samples: Number of good samples to confirm on.
        digest: SHA-256 of the ids, contents and labels of the samples to choose on.
    """

    choosing: Dataset
    confirming: Dataset
    choosing_samples: int
    confirming_samples: int
    digest: str


def split(dataset: Dataset) -> Split:
    """Divide samples by a hash of each one's id: the same on every machine, whatever else the data holds.

    Reads all of them once.

    Raises:
        DataError: VLX02xx of a sample; VLX0202 when there are too few for two parts.
    """
    digest = hashlib.sha256()
    sides = []
    for sample in dataset:
        sides.append(chosen(sample.id))
        if sides[-1]:
            digest.update(
                canonical_json([_plain(sample.id), sample.content_hash(), _label_text(sample.label)]).encode()
            )
    bad = [chosen(name) for name in dataset.skipped]
    kept, size = sum(sides), sum(sides) + sum(bad)
    if not kept or kept == len(sides):
        raise DataError(
            "VLX0202", f"{len(sides)} samples are too few to choose on some and to confirm on others", where="--data",
            hint="give more samples, or leave --data out of the search",
        )  # fmt: skip
    return Split(
        choosing=dataset.part(chosen, size),
        confirming=dataset.part(lambda name: not chosen(name), len(sides) + len(bad) - size),
        choosing_samples=kept,
        confirming_samples=len(sides) - kept,
        digest=digest.hexdigest(),
    )


def chosen(sample_id: str) -> bool:
    """Whether a sample belongs to the part that a search chooses on."""
    digest = hashlib.sha256(_plain(sample_id).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < CHOOSE_PERCENT


def _plain(name: str) -> str:
    """A file name that is no Unicode, as Linux allows, in a spelling that can be encoded."""
    return name.encode("utf-8", "backslashreplace").decode()


def _label_text(label: object) -> str:
    if isinstance(label, dict):
        return repr([(key, _label_text(label[key])) for key in sorted(label)])
    if isinstance(label, np.ndarray):
        return f"{label.dtype.str} {label.shape} {hashlib.sha256(np.ascontiguousarray(label).tobytes()).hexdigest()}"
    return _plain(repr(label))


def _line(trial: Trial) -> str:
    return canonical_json(plain_json(trial)) + "\n"


def _readable(lines: Sequence[str]) -> Iterator[Trial]:
    """Trials up to the first line that is none."""
    for trial in map(_trial, lines):
        if trial is None:
            return
        yield trial


def _trial(line: str) -> Trial | None:
    try:
        return Trial.model_validate(json.loads(line))
    except (ValueError, ValidationError):
        return None
