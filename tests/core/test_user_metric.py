"""Metrics of the user's: what is accepted, how errors name his line, and the means and intervals on known numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlexport.core.dataset import Sample
from vlexport.core.errors import DataError, UsageError
from vlexport.core.numerics import RunningMean
from vlexport.core.user_metric import MetricTally, UserMetric, measured_metric, metric_names, open_metrics

OUTPUTS = {"y": np.array([1.0, 2.0])}


def metric(folder: Path, source: str, name: str = "score") -> UserMetric:
    (folder / "m.py").write_text(source)
    return UserMetric(f"{folder / 'm.py'}:{name}")


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("return label", 3.0),
        ("return outputs['y'].sum()", 3.0),  # a numpy scalar
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("import numpy; return numpy.array(2)", 2.0),
        ("return outputs['y'][0] < 2", 1.0),  # a numpy bool
    ],
)
def test_metric_returns_a_float_when_the_function_gives_a_number(tmp_path: Path, body: str, wanted: float) -> None:
    found = metric(tmp_path, f"def score(outputs, label):\n    {body}\n")(OUTPUTS, 3, "#0")
    assert (type(found), found) == (float, wanted)


def test_metric_may_be_a_class_when_it_keeps_something(tmp_path: Path) -> None:
    source = (
        "class score:\n    def __init__(self): self.calls = 0\n"
        "    def __call__(self, outputs, label):\n        self.calls += 1\n        return self.calls\n"
    )
    found = metric(tmp_path, source)
    assert [found(OUTPUTS, None, "#0"), found(OUTPUTS, None, "#1")] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def score(outputs, label):\n    return None\n", "returned a NoneType for sample #7"),
        ("def score(outputs, label):\n    return outputs['y']\n", "returned a ndarray for sample #7"),
        ("def score(outputs, label):\n    return float('nan')\n", "returned nan for sample #7"),
        ("def score(outputs, label):\n    return '1'\n", "returned a str for sample #7"),
        ("def score(outputs, label):\n    return outputs['z']\n", "m.py:2"),
        ("def score(outputs):\n    return 1\n", "TypeError"),
        ("class score:\n    def __init__(self):\n        1 / 0\n", "m.py:3"),
        ("class score:\n    pass\n", "cannot be called"),
        ("def scored(outputs, label): pass\n", "did you mean 'scored'?"),
        ("import no_such_module_here\n", "m.py:1"),
    ],
)
def test_metric_error_names_line_or_sample_when_it_cannot_be_used(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        metric(tmp_path, source)(OUTPUTS, 0, "#7")
    assert caught.value.code == "VLX0212"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["score"], "is not FILE.py:FUNCTION"),
        (["m.py"], "is not FILE.py:FUNCTION"),
        (["m.py:a b"], "is not FILE.py:FUNCTION"),
        (["m.py:top1"], "built-in"),
        (["a.py:iou", "b.py:iou"], "twice"),
    ],
)
def test_metric_text_is_refused_when_it_names_no_metric(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError, match="VLX0703") as caught:
        open_metrics(texts)
    assert said in caught.value.message
    assert metric_names(["a.py:iou", "b.py:f1"]) == ["iou", "f1", "iou.change", "f1.change"]


def test_mean_and_interval_equal_the_textbook_when_figures_stream() -> None:
    values = np.random.default_rng(0).normal(1e6, 1.0, 500)  # a large offset: naive sums of squares would cancel
    running = RunningMean()
    for value in values:
        running.add(float(value))
    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    assert running.mean == pytest.approx(values.mean(), rel=1e-12)
    low, high = running.interval()
    assert (high - low) / 2 == pytest.approx(half, rel=1e-5)  # the offset costs 6 of 16 digits
    assert (low + high) / 2 == pytest.approx(values.mean(), rel=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_interval_is_infinite_when_there_is_no_spread_to_see(count: int) -> None:
    running = RunningMean()
    for _ in range(count):
        running.add(2.0)
    assert running.interval() == (-math.inf, math.inf)


def test_change_is_paired_when_there_is_a_reference(tmp_path: Path) -> None:
    tally = MetricTally(metric(tmp_path, "def score(outputs, label):\n    return outputs['y'] * label\n"))
    ours, theirs = [1.0, 3.0, 8.0], [0.5, 2.5, 7.5]  # a steady half: the paired interval has no width
    for i, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        tally.add(Sample(f"#{i}", {}, 2), {"y": np.array(mine)}, {"y": np.array(reference)})
    found = tally.result()
    assert (found.samples, found.value, found.reference) == (3, 8.0, 7.0)
    assert (found.change, found.change_low, found.change_high) == (1.0, 1.0, 1.0)
    assert found.low < 0 < 16 < found.high  # unpaired it is wide: mean 8, s = 7.2
    figures: dict[str, Any] = {m.metric: (m.value, m.low, m.high) for m in measured_metric(found)}
    assert figures == {"score": (8.0, found.low, found.high), "score.change": (1.0, 1.0, 1.0)}
