"""Gates and verdicts: a promise in one line, judged on the worse end of a 95 % interval."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import Literal

from pydantic import model_validator

from vlexport.core.artifact import Frozen
from vlexport.core.errors import EXIT_GATE, EXIT_INCONCLUSIVE, EXIT_OK, UsageError, nearest
from vlexport.core.intervals import clopper_pearson, samples_needed, tango

Op = Literal["<=", ">=", "<", ">"]
Outcome = Literal["pass", "fail", "inconclusive"]

_OPS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(<=|>=|<|>)\s*(\S+)\s*")


class Metric(Frozen):
    """What a gate can be about.

    Attributes:
        unit: Unit of its value; empty for a pure number.
        example: A gate on it, as typed.
        flag: What to give so that it is measured.
    """

    unit: str
    example: str
    flag: str


_LABELLED = "give labelled samples with `--data DATA`"
_ANY_SAMPLES = "give samples with `--data DATA`, labels are not needed"
_TIMED = "give `--profile`"

METRICS: dict[str, Metric] = {
    "drop": Metric(unit="points", example="drop<=0.5", flag=_LABELLED),
    "top1": Metric(unit="%", example="top1>=80", flag=_LABELLED),
    "top5": Metric(unit="%", example="top5>=95", flag=_LABELLED),
    "agreement": Metric(unit="%", example="agreement>=99", flag=_ANY_SAMPLES),
    "cosine": Metric(unit="", example="cosine>=0.99", flag=_ANY_SAMPLES),
    "sqnr": Metric(unit="dB", example="sqnr>=30", flag=_ANY_SAMPLES),
    "regress": Metric(
        unit="%", example="regress<=5", flag="give `--against OTHER` to `vlexport profile`, without `--quick`"
    ),
    "p50_ms": Metric(unit="ms", example="p50_ms<=8", flag=_TIMED),
    "load_ms": Metric(unit="ms", example="load_ms<=500", flag=_TIMED),
    "size_mb": Metric(unit="MB", example="size_mb<=25", flag="give `-o DIR`, so that the artifact is written"),
}
"""Metric → its unit, an example and how to have it measured. ``drop`` is top-1 of the reference minus ours; ``regress``
is how much longer a run takes than the baseline's, in percent of the baseline's p50."""


class Gate(Frozen):
    """A condition on one metric.

    Attributes:
        metric: A key of :data:`METRICS`, or the name of a metric of the user's.
        op: How the measured value must compare with ``value``.
        value: The bound, in the metric's unit (``drop`` in percentage points; top1, top5, agreement in percent).
    """

    metric: str
    op: Op
    value: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` satisfies the condition; NaN never does."""
        return _OPS[self.op](value, self.value)

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{self.value:g}"


def gate_from_text(text: str, *, extra: Iterable[str] = ()) -> Gate:
    """Read ``METRIC OP VALUE``; blanks are optional.

    Args:
        text: For example ``drop<=0.5`` or ``cosine >= 0.99``.
        extra: Names of further metrics (the user's own).

    Raises:
        UsageError: VLX0702 when the text is no gate, the metric is unknown or the value is no finite number.
    """
    known = [*METRICS, *extra]
    match = _GATE.fullmatch(text)
    if not match:
        raise UsageError(
            "VLX0702",
            f"'{text}' is not METRIC OP VALUE, with OP one of <= >= < >",
            where=f"--gate {text}",
            hint='write for example --gate "drop<=0.5"; metrics: ' + ", ".join(known),
        )
    metric, op, written = match.groups()
    if metric not in known:
        raise UsageError(
            "VLX0702",
            f"no metric is called '{metric}'{nearest(metric, known)}",
            where=f"--gate {text}",
            hint="metrics: " + ", ".join(known),
        )
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        example = METRICS[metric].example if metric in METRICS else f"{metric}{op}1"
        raise UsageError(
            "VLX0702",
            f"'{written}' is not a finite number",
            where=f"--gate {text}",
            hint=f'write for example --gate "{example}", without a unit',
        )
    return Gate.model_validate({"metric": metric, "op": op, "value": value})


class Measured(Frozen):
    """One measured figure, with its 95 % interval if it has one.

    Attributes:
        metric: Name of the metric.
        value: The figure, in ``unit``.
        low: Lower bound of the interval, in ``unit``; None together with ``high``.
        high: Upper bound of the interval, in ``unit``.
        samples: How many samples it rests on; None where that means nothing (a size).
        unit: Unit of value, low and high; empty for a pure number.
        counts: What the interval was made of, so that it can be drawn for more samples: (right,) of a rate,
            (only the reference right, only ours right) of ``drop``; empty otherwise.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    unit: str = ""
    counts: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _interval_is_whole(self) -> Measured:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high are given together")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} lies above high {self.high}")
        return self

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def interval_at(self, samples: float) -> tuple[float, float]:
        """The interval that ``samples`` samples would give at the same rates.

        From ``counts`` where there are any, else both half-widths shrink with the root of the sample count.
        """
        if self.interval is None or not self.samples:
            return self.value, self.value
        more = samples / self.samples
        if len(self.counts) == 2:
            low, high = tango(self.counts[0] * more, self.counts[1] * more, samples)
            return 100 * low, 100 * high
        if len(self.counts) == 1:
            low, high = clopper_pearson(self.counts[0] * more, samples)
            return 100 * low, 100 * high
        shrink = 1 / math.sqrt(more)
        low, high = self.interval
        return self.value - (self.value - low) * shrink, self.value + (high - self.value) * shrink


def measured_rate(metric: str, right: int, samples: int) -> Measured:
    """A rate in percent with its exact interval (Clopper-Pearson), for ``top1``, ``top5`` and ``agreement``.

    Args:
        metric: Name of the metric.
        right: Samples that count.
        samples: All samples, ≥ 1.

    Raises:
        ValueError: ``samples`` is 0, or the count does not fit.
    """
    if samples < 1:
        raise ValueError("a rate needs at least one sample")
    low, high = clopper_pearson(right, samples)
    return Measured(
        metric=metric,
        value=100 * right / samples,
        low=100 * low,
        high=100 * high,
        samples=samples,
        unit="%",
        counts=(right,),
    )


def measured_drop(only_reference: int, only_ours: int, samples: int) -> Measured:
    """The paired drop of top-1 in percentage points, with its score interval (Tango); negative where ours is better.

    Args:
        only_reference: Samples that only the reference gets right.
        only_ours: Samples that only ours gets right.
        samples: All samples, ≥ 1.

    Raises:
        ValueError: ``samples`` is 0, or the counts do not fit.
    """
    if samples < 1:
        raise ValueError("a drop needs at least one sample")
    low, high = tango(only_reference, only_ours, samples)
    return Measured(
        metric="drop",
        value=100 * (only_reference - only_ours) / samples,
        low=100 * low,
        high=100 * high,
        samples=samples,
        unit="points",
        counts=(only_reference, only_ours),
    )


class Verdict(Frozen):
    """A judged gate.

    Attributes:
        gate: The gate.
        measured: What it was judged on.
        outcome: ``pass``, ``fail`` or ``inconclusive``.
        samples_needed: Where inconclusive: how many samples would decide if the observed rates stayed; None when no
            count would, because the value lies on the bound.
    """

    gate: Gate
    measured: Measured
    outcome: Outcome
    samples_needed: int | None = None

    def __str__(self) -> str:
        unit = f" {self.measured.unit}" if self.measured.unit else ""
        shown = f"{self.gate}: {self.outcome}, {self.measured.metric} is {self.measured.value:.4g}{unit}"
        low, high = self.measured.interval or (math.nan, math.nan)
        if math.isinf(low) or math.isinf(high):
            return f"{shown}, without an interval: {'too noisy' if self.measured.samples is None else 'one sample'}"
        if self.measured.interval is not None:
            shown += f" (95 %: {low:.4g} to {high:.4g})"
        if self.outcome != "inconclusive":
            return shown
        if self.measured.samples is None:
            return f"{shown}; a quieter machine may decide"
        if self.samples_needed is None:
            return f"{shown}; the value lies on the bound, more samples would not decide"
        return f"{shown}; about {self.samples_needed} samples would decide, {self.measured.samples} were given"


def measured_regress(ratio: float, interval: tuple[float, float] | None) -> Measured:
    """How much longer a run takes than the baseline's, in percent: negative where ours is faster.

    Args:
        ratio: Baseline's p50 over ours.
        interval: Its 95 % interval; None where the rounds were too noisy for one, which no gate then decides on.
    """
    low, high = interval or (0.0, math.inf)
    return Measured(
        metric="regress",
        value=100 * (1 / ratio - 1),
        low=100 * (1 / high - 1) if math.isfinite(high) else -100.0,
        high=100 * (1 / low - 1) if low > 0 else math.inf,
        unit="%",
    )


def judge(gate: Gate, measured: Iterable[Measured]) -> Verdict:
    """Judge a gate on the figure of its metric.

    It passes when the worse end of the 95 % interval satisfies it, fails when the better end violates it, and is
    inconclusive in between. A figure without interval is judged as it stands; NaN fails.

    Args:
        gate: The gate.
        measured: All that was measured; the first figure of the gate's metric counts.

    Raises:
        UsageError: VLX0804 when the metric was not measured.
    """
    figures = list(measured)
    figure = next((m for m in figures if m.metric == gate.metric), None)
    if figure is None:
        known = METRICS.get(gate.metric)
        raise UsageError(
            "VLX0804",
            f"gate {gate} needs {gate.metric}, which was not measured",
            where=f"--gate {gate}",
            hint=known.flag if known else "give the metric with `--metric FILE.py:FUNCTION` and samples with `--data`",
        )
    if math.isnan(figure.value):
        return Verdict(gate=gate, measured=figure, outcome="fail")
    low, high = figure.interval or (figure.value, figure.value)
    outcome = _outcome(gate, low, high)
    if outcome != "inconclusive":
        return Verdict(gate=gate, measured=figure, outcome=outcome)
    needed = None
    if figure.samples:
        needed = samples_needed(
            figure.interval_at, lambda low, high: _outcome(gate, low, high) != "inconclusive", n=figure.samples
        )
    return Verdict(gate=gate, measured=figure, outcome=outcome, samples_needed=needed)


def _outcome(gate: Gate, low: float, high: float) -> Outcome:
    worse, better = (high, low) if gate.op in ("<=", "<") else (low, high)
    if gate.holds(worse):
        return "pass"
    return "inconclusive" if gate.holds(better) else "fail"


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """3 when a gate failed, else 5 when one is inconclusive, else 0."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if "fail" in outcomes:
        return EXIT_GATE
    return EXIT_INCONCLUSIVE if "inconclusive" in outcomes else EXIT_OK
