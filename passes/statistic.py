"""How an approximate pass is judged: a statistic that it declares, and the bound that it promises to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlexport.core.artifact import Array
from vlexport.core.bundle_schema import GateRecord, StatisticName
from vlexport.core.numerics import cosine, relative_error, sqnr_db

_MEASURES: dict[StatisticName, Callable[[Array, Array], float]] = {
    "sqnr_db": sqnr_db, "cosine": cosine, "max_relative": relative_error,
}  # fmt: skip


def one_digit(value: float) -> float:
    """Rounded to one significant digit, so that records are equal from machine to machine."""
    return float(f"{value:.0e}")


@dataclass(frozen=True)
class Statistic:
    """What an approximate pass promises of every output, sample by sample.

    Attributes:
        name: ``sqnr_db`` and ``cosine`` are at least the bound on every floating output, ``max_relative``
            (``max|a−b| / max|b|``) at most.
        bound: In the statistic's unit.
        agreement: Least share of equal elements of an integer or boolean output, 0 to 1.
        hint: What a user can do when the promise is broken.
        place: What each place keeps alone, given what stood before it, in the same unit; None promises nothing of it.
        fewer_rows: Outputs may hold fewer rows along one axis; then the means along it are compared.
    """

    name: StatisticName
    bound: float
    agreement: float = 0.9
    hint: str = "leave that pass out"
    fewer_rows: bool = False
    place: float | None = None

    def of(self, ours: Array, reference: Array) -> float:
        """The statistic of a floating output, the share of equal elements of any other."""
        ours, reference = self.comparable(ours, reference)
        if reference.dtype.kind == "f":
            return _MEASURES[self.name](ours, reference)
        if ours.shape != reference.shape or ours.dtype != reference.dtype:
            return 0.0
        return float(np.mean(ours == reference)) if reference.size else 1.0

    def comparable(self, ours: Array, reference: Array) -> tuple[Array, Array]:
        """Both as they are, or their means along the axis on which ours holds fewer rows, where it may."""
        if self.fewer_rows and ours.ndim == reference.ndim and ours.dtype.kind == "f":
            axes = [i for i, (a, b) in enumerate(zip(ours.shape, reference.shape, strict=True)) if a != b]
            if len(axes) == 1 and 0 < ours.shape[axes[0]] < reference.shape[axes[0]]:
                return ours.mean(axes[0]), reference.mean(axes[0])
        return ours, reference

    def excess(self, ours: Array, reference: Array) -> float:
        """How far an output lies beyond what is promised; 0 or less where the promise is kept. NaN is no promise."""
        value = self.of(ours, reference)
        if reference.dtype.kind != "f":
            return self.agreement - value
        beyond = value - self.bound if self.name == "max_relative" else self.bound - value
        return math.inf if math.isnan(beyond) else beyond

    def broken(self, ours: Array, reference: Array) -> bool:
        """Whether an output, or a value inside, breaks the promise."""
        return self.excess(ours, reference) > 0.0

    def shown(self, value: float) -> float:
        """Rounded towards the worse, so that records are equal from machine to machine: whole decibels, one digit."""
        if not math.isfinite(value) or value == 0.0:
            return value
        if self.name == "sqnr_db":
            return float(math.floor(value))
        lost = 1.0 - value if self.name == "cosine" else value
        step = 10.0 ** math.floor(math.log10(abs(lost))) if lost else 1.0
        up = math.ceil(lost / step - 1e-6) * step
        return round(1.0 - up, 12) if self.name == "cosine" else one_digit(up)


@dataclass
class Tally:
    """The worst that was found over probes and outputs.

    Attributes:
        statistic: What is promised.
        worst: Largest ``max|a−b| / max|b|`` of a floating output.
        values: Statistics of floating outputs.
        shares: Shares of equal elements of the others.
        aside: Rows that did not count.
    """

    statistic: Statistic
    worst: float = 0.0
    values: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    aside: int = 0

    def broken_by(self, ours: Sequence[Array], reference: Sequence[Array]) -> bool:
        """Whether the outputs of a probe break the promise."""
        return any(self.statistic.broken(a, b) for a, b in zip(ours, reference, strict=True))

    def add(self, ours: Sequence[Array], reference: Sequence[Array], *, aside: int = 0) -> str:
        """Count the outputs of a probe.

        Returns:
            What breaks the promise (``sqnr_db 12 of output 1, 40 is promised``), or an empty string.
        """
        self.aside += aside
        for position, (a, b) in enumerate(zip(ours, reference, strict=True), 1):
            value = self.statistic.of(a, b)
            floating = b.dtype.kind == "f"
            (self.values if floating else self.shares).append(value)
            if floating:
                self.worst = max(self.worst, relative_error(*self.statistic.comparable(a, b)))
            if self.statistic.broken(a, b):
                what = self.statistic.name if floating else "a share of equal elements of"
                bound = self.statistic.bound if floating else self.statistic.agreement
                return f"{what} {value:.3g} of output {position}, {bound:g} is promised"
        return ""

    def record(self, probes: int) -> GateRecord:
        """What goes into the bundle."""
        shown = self.statistic.shown
        pick = max if self.statistic.name == "max_relative" else min
        return GateRecord(
            worst=one_digit(self.worst),
            proof="statistic",
            probes=probes,
            set_aside=self.aside,
            statistic=self.statistic.name,
            value=shown(pick(self.values)) if self.values else None,
            bound=self.statistic.bound,
            agreement=math.floor(min(self.shares) * 100) / 100 if self.shares else None,
        )
