from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vlexport.core.errors import UsageError
from vlexport.core.verdict import (
    METRICS,
    Gate,
    Measured,
    exit_code,
    gate_from_text,
    judge,
    measured_drop,
    measured_rate,
    measured_regress,
)


@pytest.mark.parametrize("text", ["drop<=0.5", " drop <= 0.5 ", "drop<= .5", "drop <=5e-1"])
def test_gate_from_text_reads_the_same_when_blanks_vary(text: str) -> None:
    assert gate_from_text(text) == Gate(metric="drop", op="<=", value=0.5)


@pytest.mark.parametrize("op", ["<=", ">=", "<", ">"])
@pytest.mark.parametrize("metric", [*METRICS])
def test_gate_from_text_inverts_str_when_metric_and_op_vary(metric: str, op: str) -> None:
    gate = gate_from_text(f"{metric}{op}12.5")
    assert (gate.metric, gate.op, gate.value) == (metric, op, 12.5)
    assert gate_from_text(str(gate)) == gate


@pytest.mark.parametrize("metric", [*METRICS])
def test_metric_examples_are_gates_when_read(metric: str) -> None:
    assert gate_from_text(METRICS[metric].example).metric == metric


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cosin>=0.9", "did you mean 'cosine'?"),
        ("top-1>=80", "did you mean 'top1'?"),
        ("drop=0.5", "METRIC OP VALUE"),
        ("drop==0.5", "METRIC OP VALUE"),
        ("drop", "METRIC OP VALUE"),
        ("", "METRIC OP VALUE"),
        ("drop<=half", "not a finite number"),
        ("drop<=0.5%", "not a finite number"),
        ("drop<=nan", "not a finite number"),
        ("drop<=inf", "not a finite number"),
    ],
)
def test_gate_from_text_says_what_is_wrong_when_text_is_no_gate(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        gate_from_text(text)
    assert caught.value.code == "VLX0702"
    assert said in caught.value.message
    assert caught.value.hint


def test_gate_from_text_knows_a_users_metric_when_it_is_named() -> None:
    assert gate_from_text("miou>=0.7", extra=["miou"]).metric == "miou"


@pytest.mark.parametrize(
    ("gate", "low", "high", "outcome"),
    [
        ("drop<=0.5", 0.1, 0.5, "pass"),
        ("drop<0.5", 0.1, 0.5, "inconclusive"),
        ("drop<=0.5", 0.5, 0.9, "inconclusive"),
        ("drop<0.5", 0.5, 0.9, "fail"),
        ("drop<=0.5", 0.51, 0.9, "fail"),
        ("top1>=80", 80.0, 85.0, "pass"),
        ("top1>80", 80.0, 85.0, "inconclusive"),
        ("top1>=80", 75.0, 80.0, "inconclusive"),
        ("top1>80", 75.0, 80.0, "fail"),
        ("top1>=80", 70.0, 79.9, "fail"),
    ],
)
def test_judge_takes_the_worse_end_when_there_is_an_interval(gate: str, low: float, high: float, outcome: str) -> None:
    read = gate_from_text(gate)
    measured = Measured(metric=read.metric, value=(low + high) / 2, low=low, high=high, samples=100)
    assert judge(read, [measured]).outcome == outcome


@pytest.mark.parametrize(("value", "outcome"), [(25.0, "pass"), (25.1, "fail"), (math.nan, "fail"), (math.inf, "fail")])
def test_judge_takes_the_point_when_there_is_no_interval(value: float, outcome: str) -> None:
    verdict = judge(gate_from_text("size_mb<=25"), [Measured(metric="size_mb", value=value)])
    assert (verdict.outcome, verdict.samples_needed) == (outcome, None)


@pytest.mark.parametrize("metric", [*METRICS])
def test_judge_names_the_flag_when_metric_was_not_measured(metric: str) -> None:
    other = Measured(metric="other", value=1)
    with pytest.raises(UsageError) as caught:
        judge(Gate(metric=metric, op="<=", value=1), [other])
    assert caught.value.code == "VLX0804"
    assert metric in caught.value.message
    assert "`-" in caught.value.hint


def test_judge_is_inconclusive_when_nothing_differs_but_samples_are_few() -> None:
    verdict = judge(gate_from_text("drop<=0.5"), [measured_drop(0, 0, 100)])
    assert verdict.outcome == "inconclusive"
    assert verdict.samples_needed == 765  # 199·z², see the interval's tests
    assert "about 765 samples would decide, 100 were given" in str(verdict)
    assert judge(gate_from_text("drop<=0.5"), [measured_drop(0, 0, 765)]).outcome == "pass"


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(20, 400), st.floats(0.5, 1), st.floats(50, 100))
def test_samples_needed_decides_when_that_many_samples_show_the_same_rate(n: int, rate: float, bound: float) -> None:
    gate = Gate(metric="top1", op=">=", value=bound)
    verdict = judge(gate, [measured_rate("top1", round(rate * n), n)])
    if verdict.samples_needed is None:
        assert verdict.outcome != "inconclusive" or abs(verdict.measured.value - bound) < 0.05
        return
    assert verdict.samples_needed > n
    low, high = verdict.measured.interval_at(verdict.samples_needed)
    assert low >= bound or high < bound
    low, high = verdict.measured.interval_at(verdict.samples_needed - 1)
    assert low < bound <= high


def test_samples_needed_is_none_when_the_value_lies_on_the_bound() -> None:
    verdict = judge(gate_from_text("top1>=80"), [measured_rate("top1", 80, 100)])
    assert (verdict.outcome, verdict.samples_needed) == ("inconclusive", None)
    assert "would not decide" in str(verdict)


def test_samples_needed_follows_the_root_law_when_only_the_interval_is_known() -> None:
    measured = Measured(metric="cosine", value=0.995, low=0.985, high=0.999, samples=50)
    verdict = judge(gate_from_text("cosine>=0.99"), [measured])
    assert verdict.samples_needed == 200  # half the distance below takes four times the samples


def test_measured_figures_are_in_percent_and_points_when_made_from_counts() -> None:
    drop = measured_drop(3, 1, 200)
    assert (drop.value, drop.unit, drop.samples) == (1.0, "points", 200)
    assert drop.low is not None
    assert drop.high is not None
    assert drop.low < 1.0 < drop.high
    assert measured_rate("agreement", 199, 200).value == 99.5
    with pytest.raises(ValueError):
        measured_rate("top1", 0, 0)
    with pytest.raises(ValueError):
        measured_drop(0, 0, 0)


@pytest.mark.parametrize("bounds", [{"low": 1.0}, {"high": 1.0}, {"low": 2.0, "high": 1.0}])
def test_measured_refuses_when_interval_is_no_interval(bounds: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Measured(metric="drop", value=1.5, **bounds)  # type: ignore[arg-type]


def test_exit_code_is_the_worst_when_verdicts_differ() -> None:
    gate = gate_from_text("drop<=0.5")
    passed, failed = judge(gate, [measured_drop(0, 0, 5000)]), judge(gate, [measured_drop(500, 0, 5000)])
    unsure = judge(gate, [measured_drop(0, 0, 10)])
    assert (passed.outcome, failed.outcome, unsure.outcome) == ("pass", "fail", "inconclusive")
    assert exit_code([]) == exit_code([passed]) == 0
    assert exit_code([passed, unsure]) == 5
    assert exit_code([unsure, failed, passed]) == 3


def test_regress_is_in_percent_of_the_baseline_when_made_from_a_ratio() -> None:
    found = measured_regress(1 / 1.1, (1 / 1.2, 1.0))
    assert (found.value, found.low, found.high) == pytest.approx((10, 0, 20))
    assert found.unit == "%"
    judged = {bound: judge(gate_from_text(f"regress<={bound}"), [found]) for bound in (20.5, 10, -1)}
    assert [verdict.outcome for verdict in judged.values()] == ["pass", "inconclusive", "fail"]
    assert "a quieter machine may decide" in str(judged[10])


@pytest.mark.parametrize("bound", [-50, 0, 1000])
def test_regress_decides_nothing_when_it_has_no_interval(bound: float) -> None:
    verdict = judge(gate_from_text(f"regress<={bound}"), [measured_regress(2.0, None)])
    assert (verdict.outcome, verdict.measured.value) == ("inconclusive", -50)
    assert "too noisy" in str(verdict)


def test_one_sample_decides_nothing_when_a_mean_has_no_interval() -> None:
    figure = Measured(metric="miou", value=0.9, low=-math.inf, high=math.inf, samples=1)
    verdict = judge(Gate(metric="miou", op=">=", value=0.5), [figure])
    assert (verdict.outcome, verdict.samples_needed) == ("inconclusive", None)
    assert "one sample" in str(verdict)
    assert Measured.model_validate_json(figure.model_dump_json()) == figure


def test_nan_fails_when_one_sample_gave_it_no_interval() -> None:
    figure = Measured(metric="mine", value=math.nan, low=-math.inf, high=math.inf, samples=1)
    assert judge(Gate(metric="mine", op=">=", value=1.0), [figure]).outcome == "fail"
