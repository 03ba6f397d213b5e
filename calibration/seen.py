"""What one run over calibration samples saw, as data. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from vlexport.calibration.observer import Observer


@dataclass(frozen=True, eq=False)
class SeenValue:
    """One value of the Program, over all samples.

    Attributes:
        key: As in :mod:`vlexport.calibration.keys`.
        op: Plain name of the operator (``linear``), or ``input``.
        module: Module path; empty for inputs.
        source: ``file.py:LINE`` of the user's code; empty for inputs.
        observer: What was seen.
    """

    key: str
    op: str
    module: str
    source: str
    observer: Observer


@dataclass(frozen=True, eq=False)
class Collected:
    """What one run over the samples saw.

    Attributes:
        model: Key of the Program.
        data: Key of the samples.
        order: Key of the samples in the order in which they came.
        samples: How many there were.
        batch: How many ran together.
        values: In the Program's order.
    """

    model: str
    data: str
    order: str
    samples: int
    batch: int
    values: tuple[SeenValue, ...]
