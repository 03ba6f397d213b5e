"""The strategy of ``--max-drop``: how few layers it finds, in how many steps, a function of its trials alone."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from vlexport.core.trials import Trial
from vlexport.stages.return_layers import KEEP, ONLY, ReturnLayers

NAMES = tuple(f"layers.{i}" for i in range(20))


def walk(strategy: ReturnLayers, judge: Callable[[frozenset[str]], str], alone: Callable[[str], float]) -> list[Trial]:
    """Search to the end: ``judge`` is told what is in float, ``alone`` gives a layer's sensitivity."""
    trials: list[Trial] = []
    while (options := strategy.propose(trials)) is not None:
        assert strategy.propose(trials) == options  # a pure function of the trials
        if ONLY in options:
            trials.append(Trial(options=options, outcome="measured", figures={"sqnr_db": alone(options[ONLY])}))
            continue
        kept = frozenset(filter(None, options.get(KEEP, "").split(",")))
        trials.append(Trial.model_validate({"options": options, "outcome": judge(kept), "figures": {"drop": 20.0}}))
        assert len(trials) <= 3 * len(strategy.layers)
    return trials


def judged(trials: list[Trial]) -> list[int]:
    return [len(list(filter(None, t.options.get(KEEP, "").split(",")))) for t in trials if ONLY not in t.options]


def test_nothing_is_measured_when_all_layers_hold() -> None:
    trials = walk(ReturnLayers(NAMES), lambda kept: "holds", lambda name: 0.0)
    assert [trial.options for trial in trials] == [{}]
    assert ReturnLayers(NAMES).best(trials) == {}


def test_one_layer_returns_when_one_is_bad() -> None:
    strategy = ReturnLayers(NAMES)
    trials = walk(
        strategy, lambda kept: "holds" if "layers.7" in kept else "fails", lambda n: 3.0 if n == "layers.7" else 40.0
    )
    assert judged(trials) == [0, 1]
    assert strategy.best(trials) == {KEEP: "layers.7"}


def test_a_tenth_returns_when_a_tenth_is_bad() -> None:
    strategy, bad = ReturnLayers(NAMES), {"layers.3", "layers.12"}
    trials = walk(strategy, lambda kept: "holds" if bad <= kept else "wrong", lambda n: 5.0 if n in bad else 40.0)
    assert judged(trials) == [0, 1, 2]
    assert strategy.best(trials) == {KEEP: "layers.3,layers.12"}


def test_honest_share_stays_when_the_error_accumulates_evenly() -> None:
    strategy = ReturnLayers(NAMES)
    trials = walk(strategy, lambda kept: "holds" if len(kept) >= 13 else "fails", lambda name: 30.0)
    assert judged(trials) == [0, 1, 2, 4, 8, 16, 12, 14, 13]
    assert strategy.best(trials) == {KEEP: ",".join(NAMES[:13])}


def test_search_ends_with_what_lost_least_when_no_share_holds() -> None:
    strategy = ReturnLayers(NAMES)
    trials = walk(strategy, lambda kept: "fails", lambda name: 30.0)
    assert judged(trials) == [0, 1, 2, 4, 8, 16, 19]
    undecided = Trial(options={KEEP: "layers.1"}, outcome="undecided", figures={"drop": 50.0})
    assert strategy.best([*trials, undecided]) == {KEEP: "layers.1"}
    assert strategy.nearest([Trial(options={}, outcome="wrong")]) is None


def test_layers_that_were_given_stay_in_float_when_others_return() -> None:
    strategy = ReturnLayers(NAMES, given=("head",))
    trials = walk(strategy, lambda kept: "holds" if "layers.2" in kept else "fails", lambda n: float(n == "x"))
    assert all(trial.options[KEEP].startswith("head,") for trial in trials if KEEP in trial.options)
    assert strategy.returned(trials[-1]) == tuple(trials[-1].options[KEEP].split(",")[1:])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.data())
def test_fewest_layers_are_found_in_few_steps_when_more_float_is_never_worse(count: int, data: st.DataObject) -> None:
    names = tuple(f"m.{i}" for i in range(count))
    needed = data.draw(st.integers(0, count))  # with `count` no share holds
    noise = {name: data.draw(st.floats(-5, 60)) for name in names}
    strategy = ReturnLayers(names)
    trials = walk(strategy, lambda kept: "holds" if len(kept) >= needed else "fails", noise.__getitem__)
    assert len(judged(trials)) <= 2 * count.bit_length() + 2
    if needed < count:
        kept = set(filter(None, strategy.best(trials).get(KEEP, "").split(",")))
        assert len(kept) == needed
        assert max((noise[n] for n in kept), default=-9) <= min(noise[n] for n in names if n not in kept)
    for length in range(len(trials)):  # killed after any trial, it goes on as it was
        assert strategy.propose(trials[:length]) == trials[length].options
