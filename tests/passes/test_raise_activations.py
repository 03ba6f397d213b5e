"""raise-activations: every spelling becomes one operator, and what is another function stays and says why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, check_pass, near_misses
from tests.spelled import EXACT, Writer, aten, examples, left, raised
from vlexport.ir.text import text
from vlexport.passes.base import Match
from vlexport.passes.idioms import quick_gelu
from vlexport.passes.match import Failed, Found
from vlexport.passes.raise_activations import RaiseActivations

SHAPE = (3, 4)
C = math.sqrt(2 / math.pi)
QUICK = ["mul.Tensor", "sigmoid", "mul.Tensor"]


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


# -- a grammar of spellings ------------------------------------------------------------------------------------------


def halves(w: Writer, gate: Node, half: float = 0.5) -> Node:
    """x/2 · (1 + gate)."""
    spelling = w.pick("after", "before", "inside", "sum", "addcmul")
    if spelling == "after":
        return w.times(w.product(w.x, w.plus(gate, 1.0)), half)
    if spelling == "before":
        return w.product(w.times(w.x, half), w.plus(gate, 1.0))
    if spelling == "inside":
        return w.product(w.x, w.plus(w.times(gate, half), half))
    if spelling == "sum":
        return w.sum(w.times(w.x, half), w.product(w.times(w.x, half), gate))
    return w.call(aten.addcmul.default, w.times(w.x, half), w.x, gate, value=half)


def cubic(w: Writer, slope: float, cube: float = 0.044715) -> Node:
    """slope · (x + 0.044715 x³)."""
    x = w.x
    spelling = w.pick("pow", "product", "factored")
    if spelling == "factored":
        return w.times(w.product(x, w.plus(w.times(w.square(x), cube), 1.0)), slope)
    third = w.call(aten.pow.Tensor_Scalar, x, 3) if spelling == "pow" else w.product(w.square(x), x)
    return w.times(w.sum(x, w.times(third, cube)), slope)


def held(w: Writer, value: Node, low: float, high: float) -> Node:
    """A value between two limits."""
    spelling = w.pick("clamp", "hardtanh", "max then min", "min then max", "minimum")
    if spelling == "hardtanh":
        return w.call(aten.hardtanh.default, value, low, high)
    if spelling == "max then min":
        return w.call(aten.clamp_max.default, w.call(aten.clamp_min.default, value, low), high)
    if spelling == "min then max":
        return w.call(aten.clamp_min.default, w.call(aten.clamp_max.default, value, high), low)
    if spelling == "minimum":
        limit = w.stored(torch.tensor(high))
        return w.commuted(aten.minimum.default, w.call(aten.clamp.default, value, low), limit)
    return w.call(aten.clamp.default, value, low, high)


def hard_gate(w: Writer, shift: float = 3.0, high: float = 6.0) -> tuple[Node, float]:
    """A multiple of the hard sigmoid, and what it has to be multiplied by."""
    if shift == 3.0 and high == 6.0 and w.pick(False, True):
        return held(w, w.plus(w.times(w.x, 1 / 6), 0.5), 0.0, 1.0), 1.0
    return held(w, w.plus(w.x, shift), 0.0, high), 1 / 6


def hardsigmoid(w: Writer) -> Node:
    gate, scale = hard_gate(w)
    return gate if scale == 1.0 else w.times(gate, scale)


def hardswish(w: Writer, shift: float = 3.0, high: float = 6.0) -> Node:
    gate, scale = hard_gate(w, shift, high)
    if scale == 1.0:
        return w.product(w.x, gate)
    if w.pick(False, True):
        return w.times(w.product(w.x, gate), scale)
    return w.product(w.x, w.times(gate, scale)) if w.pick(False, True) else w.product(w.times(w.x, scale), gate)


def sigmoid_of(w: Writer, value: Node) -> Node:
    return w.product(w.x, w.call(aten.sigmoid.default, value))


GRAMMAR: dict[str, tuple[Callable[[Writer], Node], list[str]]] = {
    "gelu": (lambda w: halves(w, w.call(aten.erf.default, w.times(w.x, math.sqrt(0.5)))), ["gelu"]),
    "gelu tanh": (lambda w: halves(w, w.call(aten.tanh.default, cubic(w, C))), ["gelu"]),
    "gelu tanh by a sigmoid": (lambda w: sigmoid_of(w, cubic(w, 2 * C)), ["gelu"]),
    "silu": (lambda w: sigmoid_of(w, w.x), ["silu"]),
    "silu by a tanh": (lambda w: halves(w, w.call(aten.tanh.default, w.times(w.x, 0.5))), ["silu"]),
    "quick gelu": (lambda w: sigmoid_of(w, w.times(w.x, 1.702)), QUICK),
    "hardswish": (hardswish, ["hardswish"]),
    "hardswish by a hardsigmoid": (
        lambda w: w.product(w.x, w.call(aten.hardsigmoid.default, w.x)),
        ["hardswish"],
    ),
    "hardsigmoid": (hardsigmoid, ["hardsigmoid"]),
    "relu6": (lambda w: held(w, w.x, 0.0, 6.0), ["relu6"]),
}


@pytest.mark.parametrize("kind", GRAMMAR)
@examples(40)
@given(data=st.data())
def test_every_spelling_becomes_one_operator_when_it_is_equal(kind: str, data: st.DataObject) -> None:
    write, wanted = GRAMMAR[kind]
    w = Writer(SHAPE, data.draw)
    operators, error = raised(RaiseActivations(), w.finished(write(w)))
    assert operators == wanted
    assert error <= EXACT


@pytest.mark.parametrize("kind", GRAMMAR)
def test_text_is_the_same_when_spellings_differ(kind: str) -> None:
    """One spelling of each idea: only names of stored numbers could tell two programs apart, and none is left."""
    write, _ = GRAMMAR[kind]
    texts = set()
    for choice in range(3):
        w = Writer(SHAPE)
        w.pick = lambda *options, choice=choice: options[choice % len(options)]  # type: ignore[method-assign]
        program = w.finished(write(w))
        RaiseActivations().run(program)
        texts.add(text(program))
    assert len(texts) == 1


MUTATIONS: dict[str, tuple[Callable[[Writer], Node], str]] = {
    "erf of x/1.41421": (
        lambda w: halves(w, w.call(aten.erf.default, w.times(w.x, 1 / 1.41421))),
        r"its erf is of 0\.7071086·x, not of 0\.7071068·x \(gelu\)",
    ),
    "0.49 for a half": (
        lambda w: halves(w, w.call(aten.erf.default, w.times(w.x, math.sqrt(0.5))), 0.49),
        r"it makes 0\.49·x \+ 0\.49·x·erf, not 0\.5·x \+ 0\.5·x·erf",
    ),
    "0.0447 for 0.044715": (
        lambda w: halves(w, w.call(aten.tanh.default, cubic(w, C, 0.0447))),
        r"its tanh is of 0\.7978846·x \+ 0\.03566544·x³, not of",
    ),
    "1.7 for 1.702": (
        lambda w: sigmoid_of(w, w.times(w.x, 1.7)),
        r"its sigmoid is of 1\.7·x, not of 1·x \(silu\), 1\.702·x \(quick gelu\)",
    ),
    "2.9 for 3": (
        lambda w: hardswish(w, shift=2.9),
        r"it multiplies x by 0\.1666667 times 2\.9 \+ 1·x between 0 and 6, not by 1/6 times 3 \+ x",
    ),
    "5 for 6": (lambda w: hardswish(w, high=5.0), r"times 3 \+ 1·x between 0 and 5, not by"),
}


@pytest.mark.parametrize("kind", MUTATIONS)
@examples(40)
@given(data=st.data())
def test_nothing_is_raised_when_a_constant_is_another(kind: str, data: st.DataObject) -> None:
    write, reason = MUTATIONS[kind]
    w = Writer(SHAPE, data.draw)
    program = w.finished(write(w))
    changes, misses = RaiseActivations().run(program)
    assert {c.what for c in changes} <= {"relu6 raised"}
    reasons = [miss.reason for miss in misses]
    assert len(reasons) == 1
    assert re.search(reason, reasons[0]), reasons


@examples(60)
@given(data=st.data(), kind=st.sampled_from(sorted(set(GRAMMAR) - {"relu6"})))
def test_nothing_is_raised_when_a_value_inside_has_another_reader(data: st.DataObject, kind: str) -> None:
    w = Writer(SHAPE, data.draw)
    result = GRAMMAR[kind][0](w)
    gates = ("erf", "tanh", "sigmoid", "hardsigmoid", "clamp", "hardtanh", "clamp_max", "clamp_min", "minimum")
    names = [f"aten.{name}.default" for name in gates]
    inner = [n for n in w.program.calls(*names) if n is not result]
    if not inner:
        return  # the limits of a hard sigmoid are its last calls
    program = w.finished(w.sum(result, inner[-1]))
    after = program.copy()
    _, misses = RaiseActivations().run(after)
    assert not after.calls("aten.gelu.default", "aten.silu.default", "aten.hardswish.default")
    assert any("is used by 1 other(s)" in miss.reason for miss in misses)


@examples(40)
@given(data=st.data())
def test_nothing_is_raised_when_the_gate_is_of_another_value(data: st.DataObject) -> None:
    w = Writer(SHAPE, data.draw)
    other = w.call(aten.sin.default, w.x)
    gate = w.call(w.pick(aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default), other)
    assert left(RaiseActivations(), w.finished(w.pick(w.product(w.x, gate), halves(w, gate)))) == []


# -- single cases ----------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One activation of each kind."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "gelu": x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
            "new_gelu": 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
            "fast_gelu": 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
            "quick_gelu": torch.sigmoid(1.702 * x) * x,
            "silu": torch.sigmoid(x) * x,
            "hardswish": x * F.relu6(x + 3.0) / 6.0,
            "hardswish_2": x * (torch.clamp(x + 3.0, 0, 6) / 6),
            "hardsigmoid": F.relu6(x + 3.0) / 6.0,
            "relu6": x.clamp(0, 6),
            "relu6_2": nn.functional.hardtanh(x, 0.0, 6.0),
        }


def test_each_becomes_what_it_is_when_models_write_it_by_hand() -> None:
    checked = check_pass(RaiseActivations(), Zoo(), example(2, 3), golden="raise_activations")
    assert not checked.near_misses
    whats = sorted(c.what for c in checked.changes)
    assert whats == sorted([
        "gelu raised", "gelu tanh raised", "gelu tanh raised", "quick gelu raised", "silu raised", "hardswish raised",
        "hardswish raised", "hardsigmoid raised", "relu6 raised", "relu6 raised",
    ])  # fmt: skip


def test_quick_gelu_is_seen_by_its_shared_pattern_when_it_was_raised() -> None:
    program = captured(Calls(lambda x: torch.sigmoid(x * 1.702) * x + torch.sigmoid(x * 1.6) * x), example(2, 3))
    RaiseActivations().run(program)
    found = [quick_gelu(program, n) for n in program.calls("aten.mul.Tensor")]
    assert sum(isinstance(f, Found) and f["x"] is program.placeholders[0] for f in found) == 1
    assert all(isinstance(f, (Found, Failed)) for f in found)


def test_product_behind_stays_when_a_gate_is_followed_by_another_factor() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x)
            return torch.sigmoid(gate) * gate * self.up(x)

    checked = check_pass(RaiseActivations(), Gated(), example(2, 4), expect_changes=1)
    names = [str(n.target) for n in checked.after.calls()]
    assert names == ["aten.linear.default", "aten.silu.default", "aten.linear.default", "aten.mul.Tensor"]


def test_half_precision_stays_when_every_step_rounds() -> None:
    program = captured(Calls(lambda x: (lambda h: torch.sigmoid(h) * h)(x.half()).float()), example(2, 3))
    reason = "by hand it rounds to float16 after every step, the operator only once"
    assert near_misses(RaiseActivations(), program) == [("mul", reason)]


def test_limits_become_relu6_when_the_value_is_of_a_half_type_and_stay_when_it_is_an_integer() -> None:
    half = check_pass(
        RaiseActivations(), Calls(lambda x: x.half().clamp(0, 6).float()), example(2, 3), expect_changes=1
    )
    assert half.after.calls("aten.relu6.default")[0].meta["val"].dtype is torch.float16
    whole = captured(Calls(lambda x: x.int().clamp(0, 6).float()), example(2, 3))
    assert list(RaiseActivations().find(whole)) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(min=0),
        lambda x: x.clamp(0, 5),
        lambda x: x.clamp(6, 0),
        lambda x: torch.minimum(x, x.mean()).relu(),
        lambda x: x.sigmoid() * 2,
        lambda x: x.tanh() * (x + 1),
    ],
)
def test_nothing_is_seen_when_limits_and_gates_are_no_activation(function: Callable[[Tensor], Tensor]) -> None:
    assert list(RaiseActivations().find(captured(Calls(function), example(2, 3)))) == []


def test_activation_between_casts_is_raised_when_it_computes_in_single_precision() -> None:
    model = Calls(lambda x: (lambda s: torch.sigmoid(s) * s)(x.half().float()).half().float())
    checked = check_pass(RaiseActivations(), model, example(2, 3), expect_changes=1)
    assert len(checked.after.calls("aten.to.dtype", "aten._to_copy.default")) == 4


def test_result_stays_when_a_stored_number_gives_it_another_rank() -> None:
    w = Writer((4,))
    wide = w.stored(torch.ones(1, 1, 1) * 0.5)
    gate = w.call(aten.erf.default, w.call(aten.mul.Tensor, w.x, math.sqrt(0.5)))
    result = w.call(aten.mul.Tensor, w.call(aten.mul.Tensor, w.x, w.call(aten.add.Tensor, gate, 1.0)), wide)
    program = w.finished(result)
    reasons = [f.reason for f in RaiseActivations().find(program) if not isinstance(f, Match)]
    assert reasons == ["the result has another shape or dtype than what gelu is taken of"]


def test_rounded_constants_are_accepted_when_they_are_those_of_float32() -> None:
    root = float(torch.tensor(math.sqrt(0.5)))  # off by 2e-8
    model = Calls(lambda x: 0.5 * x * (1 + torch.erf(x * root)))
    program = captured(model, example(2, 3))
    before = program.run(example(2, 3))[0]
    changes, _ = RaiseActivations().run(program)
    assert [c.what for c in changes] == ["gelu raised"]
    torch.testing.assert_close(program.run(example(2, 3))[0], before, rtol=1e-6, atol=1e-6)
