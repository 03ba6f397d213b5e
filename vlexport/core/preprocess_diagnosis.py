"""What the preprocessing doctor found, as typed data. No torch."""

from __future__ import annotations

from typing import Literal

from vlexport.core.artifact import Frozen
from vlexport.core.errors import EXIT_INCONCLUSIVE, EXIT_OK

Axis = Literal["range", "color", "size"]
Standing = Literal["better", "worse", "cannot tell", "same"]
Verdict = Literal["named", "stands", "cannot tell"]


class Trial(Frozen):
    """One preprocessing that was tried, against the one that the round began with, on the same samples.

    Attributes:
        what: In words: ``0 to 1``, ``BGR``, ``short edge 256, crop 224``.
        axis: What it changes: ``range`` (scale, mean, std), ``color`` (with or without them), ``size`` (resize, crop).
        spec: As ``--preprocess`` takes it.
        samples: Seen before it was given up or the data ended.
        top1: Right on these, percent.
        against: The other's top-1 on the same samples.
        low: Lower bound of the paired difference, points, at the level that all trials of a round share.
        high: Upper bound.
        standing: ``better`` or ``worse`` where the interval leaves no zero in it; ``same`` where the inputs were equal
            on every sample, as both channel orders of gray photos.
    """

    what: str
    axis: Axis
    spec: str
    samples: int
    top1: float
    against: float
    low: float
    high: float
    standing: Standing


class Round(Frozen):
    """One axis, tried once.

    Attributes:
        axis: ``range`` covers colour order too: the two are tried together.
        began_with: The preprocessing that the others were held against.
        trials: All others.
        took: The spec that was better and became the next round's; empty where none was.
        alike: Those that cannot be told from what the round ended with.
    """

    axis: Axis
    began_with: str
    trials: tuple[Trial, ...]
    took: str = ""
    alike: tuple[str, ...] = ()


class Diagnosis(Frozen):
    """What was found.

    Attributes:
        input: Name of the input.
        recorded: The bundle's preprocessing.
        verdict: ``named`` (another one is better), ``stands`` (all others are worse) or ``cannot tell``.
        line: What to paste: the better one; the recorded one otherwise.
        samples: Labelled samples that were used.
        recorded_top1: Right on them as recorded, percent.
        top1: Right on them with ``line``.
        gain: ``top1`` minus ``recorded_top1``, paired, points.
        gain_low: Lower bound of its interval at the shared level.
        gain_high: Upper bound.
        confidence: The level of every interval: 95 % shared by all that was tried in a round (Bonferroni).
        rounds: In order.
        runner: What computed: the artifact or the reference.
    """

    input: str
    recorded: str
    verdict: Verdict
    line: str
    samples: int
    recorded_top1: float
    top1: float
    gain: float
    gain_low: float
    gain_high: float
    confidence: float
    rounds: tuple[Round, ...]
    runner: str

    @property
    def exit_code(self) -> int:
        """5 where it cannot be told, else 0."""
        return EXIT_INCONCLUSIVE if self.verdict == "cannot tell" else EXIT_OK
