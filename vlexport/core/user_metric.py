"""Metrics of the user's: ``FILE.py:FUNCTION``, one figure a sample.

The function gets ``(outputs, label)``: output name → array of one sample (without batch dim), and the sample's label as
the data gives it (a class index, an array, a dict, or None). It returns one finite number. A class serves as well: it
is made once, without arguments, and its object is called. Samples stream by; the metric is the mean over them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlexport.core.artifact import Array
from vlexport.core.bundle_schema import MetricResult
from vlexport.core.dataset import Label, Sample
from vlexport.core.errors import DataError, UsageError
from vlexport.core.numerics import RunningMean
from vlexport.core.user_code import Blamed, user_object
from vlexport.core.verdict import METRICS, Measured

CHANGE = ".change"
"""``NAME.change`` is the mean of ours minus the reference's, sample by sample."""


def metric_name(text: str) -> str:
    """Name of the metric that ``FILE.py:FUNCTION`` gives: the function's. Nothing is run.

    Raises:
        UsageError: VLX0703 when the text is no such thing, or a built-in metric has the name.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(
            "VLX0703", f"--metric {text} is not FILE.py:FUNCTION", where="--metric", hint="as --metric metrics.py:iou"
        )
    if name in METRICS:
        raise UsageError(
            "VLX0703", f"--metric {text}: '{name}' is a built-in metric", where="--metric", hint="rename the function"
        )
    return name


def metric_names(texts: Sequence[str]) -> list[str]:
    """Names that gates may use: of every metric, and its change against a reference.

    Raises:
        UsageError: VLX0703 as in :func:`metric_name`, or when two have one name.
    """
    names = [metric_name(text) for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("VLX0703", f"--metric is given twice under the name '{name}'", where="--metric")
    return [*names, *(f"{name}{CHANGE}" for name in names)]


class UserMetric:
    """A metric of the user's, ready to be called. Making it runs the user's file.

    Args:
        text: ``FILE.py:FUNCTION``.

    Attributes:
        name: The function's name.

    Raises:
        UsageError: VLX0703 when the text is no such thing.
        DataError: VLX0201 no such file, VLX0212 the file or its function cannot be used, with file and line.
    """

    def __init__(self, text: str) -> None:
        self.name = metric_name(text)
        self._file = Path(text.rpartition(":")[0])
        found = user_object(self._file, self.name, code="VLX0212")
        if isinstance(found, type):
            with Blamed(self._file, f"{self.name} in", "VLX0212"):
                found = found()
        if not callable(found):
            raise DataError(
                "VLX0212",
                f"objects of {text} cannot be called",
                where=text,
                hint="define __call__(self, outputs, label)",
            )
        self._function = found

    def __call__(self, outputs: Mapping[str, Array], label: Label, sample: str) -> float:
        """The figure of one sample.

        Args:
            outputs: Output name → array without batch dim.
            label: The sample's label.
            sample: Its id, for errors.

        Raises:
            DataError: VLX0212 when the function fails or returns anything but a finite number.
        """
        with Blamed(self._file, f"{self.name} in", "VLX0212"):
            found = self._function(dict(outputs), label)
        value = found.item() if getattr(found, "ndim", None) == 0 else found  # a numpy scalar, or an array of one
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            shown = f"{value}" if isinstance(value, numbers.Real) else f"a {type(found).__name__}"
            raise DataError(
                "VLX0212",
                f"{self.name} returned {shown} for sample {sample}",
                where=sample,
                hint="return one finite number a sample",
            )
        return float(value)


class MetricTally:
    """Means of one metric while samples stream by: ours, the reference's, and the paired change."""

    def __init__(self, metric: UserMetric) -> None:
        self._metric = metric
        self._ours, self._theirs, self._change = RunningMean(), RunningMean(), RunningMean()

    def add(self, sample: Sample, ours: Mapping[str, Array], theirs: Mapping[str, Array] | None) -> None:
        """Add one sample.

        Args:
            sample: It, with its label.
            ours: Output name → array without batch dim.
            theirs: The same of the reference, or None.

        Raises:
            DataError: VLX0212.
        """
        mine = self._metric(ours, sample.label, sample.id)
        self._ours.add(mine)
        if theirs is not None:
            reference = self._metric(theirs, sample.label, sample.id)
            self._theirs.add(reference)
            self._change.add(mine - reference)

    def result(self) -> MetricResult:
        """What was found."""
        low, high = self._ours.interval()
        found = MetricResult(
            name=self._metric.name, samples=self._ours.samples, value=self._ours.mean, low=low, high=high
        )
        if not self._theirs.samples:
            return found
        low, high = self._change.interval()
        update = {"reference": self._theirs.mean, "change": self._change.mean, "change_low": low, "change_high": high}
        return found.model_copy(update=update)


def measured_metric(found: MetricResult) -> Iterator[Measured]:
    """A metric's figures as gates see them."""
    yield Measured(metric=found.name, value=found.value, low=found.low, high=found.high, samples=found.samples)
    if found.change is not None:
        yield Measured(
            metric=f"{found.name}{CHANGE}",
            value=found.change,
            low=found.change_low,
            high=found.change_high,
            samples=found.samples,
        )


def open_metrics(texts: Sequence[str]) -> tuple[UserMetric, ...]:
    """Every metric that is named; their files are run.

    Raises:
        VlexportError: As :func:`metric_names` and :class:`UserMetric` say.
    """
    metric_names(texts)
    return tuple(UserMetric(text) for text in texts)
