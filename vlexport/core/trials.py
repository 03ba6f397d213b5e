"""What a search writes down: its candidates, and its decision. Parts of ``report.json``, and lines of a journal."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlexport.core.artifact import Frozen


class Trial(Frozen):
    """One candidate of a search, as it was examined.

    Attributes:
        options: ``SCOPE.NAME`` → value, laid over the recipe.
        against: The same of what it was measured against; empty for the recipe as it stands.
        outcome: ``faster`` and ``not faster`` were timed; ``wrong`` (its numbers), ``refused`` (by the runtime) and
            ``too noisy`` were not, or say nothing. ``holds``, ``fails`` and ``undecided`` were judged by the gates on
            accuracy; ``measured`` was judged by nothing yet.
        ratio: p50 of ``against`` over the candidate's, as in :class:`LatencyResult`; above 1 is faster.
        ratio_low: Lower end of its interval, or of its range where there were too few rounds for one.
        ratio_high: Upper end.
        reason: Why there is no ratio, or no figures.
        figures: What else was measured, by name: ``drop``, ``drop_low``, ``drop_high`` (points), ``agreement`` (%),
            ``sqnr_db`` (dB), ``layers`` (in integers), ``gmacs`` (10⁹ multiply-accumulates).
    """

    options: dict[str, str]
    against: dict[str, str] = Field(default_factory=dict)
    outcome: Literal["faster", "not faster", "wrong", "refused", "too noisy", "holds", "fails", "undecided", "measured"]
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    reason: str = ""
    figures: dict[str, float] = Field(default_factory=dict)


class Tuning(Frozen):
    """What a search tried, and what it decided.

    Attributes:
        trials: Every candidate, in order; chosen between by quick rounds.
        confirmation: The winner against the recipe as it stands, in full rounds; None where no candidate was faster.
        adopted: Options that were laid over the recipe; empty where it stays as it was.
        finished: False when the budget ended the search.
        choosing_samples: Samples that candidates were judged on; 0 without ``--data``.
        confirming_samples: The others: accuracy is reported on them alone.
    """

    trials: tuple[Trial, ...]
    confirmation: Trial | None
    adopted: dict[str, str]
    finished: bool
    choosing_samples: int = 0
    confirming_samples: int = 0


class SearchRecord(Frozen):
    """What a search over precisions, layers or tokens tried and decided.

    Attributes:
        about: What was searched.
        said: The decision and its figures, one phrase for the receipt.
        trials: Candidates whose artifacts were judged, in order.
        adopted: Recipe field or ``SCOPE.NAME`` → value, as the recipe holds it now; empty where it stays as it was.
        finished: False when the budget ended the search.
        choosing_samples: Samples that candidates were judged on.
        confirming_samples: The others: accuracy is reported on them alone. 0 where nothing was chosen by samples, and
            accuracy is that of all of them.
        sensitivities: Layer → signal to noise ratio of the output, dB, when that layer alone computes with integers.
        front: Numbers of the trials that no other one beats in both accuracy and speed, the fastest first.
    """

    about: Literal["layers", "precision", "tokens", "fusions"]
    said: str
    trials: tuple[Trial, ...] = ()
    adopted: dict[str, str] = Field(default_factory=dict)
    finished: bool = True
    choosing_samples: int = 0
    confirming_samples: int = 0
    sensitivities: dict[str, float] = Field(default_factory=dict)
    front: tuple[int, ...] = ()


def lost(trial: Trial) -> float | None:
    """What a candidate loses: points of top-1, or of agreement where there are no labels; None where not measured."""
    if "drop" in trial.figures:
        return trial.figures["drop"]
    return 100.0 - trial.figures["agreement"] if "agreement" in trial.figures else None
