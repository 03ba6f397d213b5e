"""Bounds of values are never narrower than the values are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.program import Program
from vlexport.passes.tokens.intervals import ANY, EITHER, ONE, ZERO, Bounds, computed, left_out_by

CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "scaled add": lambda a, b: torch.add(a, b, alpha=-2),
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: 1 - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "square": lambda a, b: a**2,
    "sigmoid": lambda a, b: a.sigmoid(),
    "relu": lambda a, b: a.relu(),
    "exp": lambda a, b: a.exp(),
    "tanh": lambda a, b: a.tanh(),
    "clamp": lambda a, b: a.clamp(-0.5, 1.5),
    "gelu": lambda a, b: nn.functional.gelu(a),
    "lt": lambda a, b: a < b,
    "ge number": lambda a, b: a >= 0.5,
    "equal": lambda a, b: a == b,
    "where": lambda a, b: torch.where(a > b, a, b),
    "fill": lambda a, b: a.masked_fill(b > 0, -3.0),
    "and": lambda a, b: (a > 0) & (b > 0),
    "or not": lambda a, b: (a > 0) | ~(b > 0),
    "maximum": lambda a, b: torch.maximum(a, b),
    "cast": lambda a, b: a.to(torch.int64),
}


class Called(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.call(a, b)


PROGRAMS: dict[str, Program] = {}


def program(name: str) -> Program:
    if name not in PROGRAMS:
        PROGRAMS[name] = captured(Called(CALLS[name]).eval(), (torch.ones(1, 64), torch.ones(1, 64)), dynamic=False)
    return PROGRAMS[name]


def bounds_of(ir: Program, given_bounds: tuple[Bounds, Bounds]) -> Bounds:
    known = dict(zip(ir.placeholders, given_bounds, strict=True))
    from vlexport.ir import dialect

    for node in ir.calls():
        known[node] = computed(node, [known.get(e, e) if isinstance(e, torch.fx.Node) else e for e in
                                      dialect.operands(node)])  # fmt: skip
    return known[ir.results[0]]


ENDS = st.tuples(*[st.sampled_from([-4.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])] * 2).map(sorted)


@settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(st.sampled_from(sorted(CALLS)), ENDS, ENDS, st.integers(0, 9))
def test_values_lie_within_their_bounds(name: str, a: list[float], b: list[float], seed: int) -> None:
    ir = program(name)
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(1, 64, generator=generator) * (high - low) + low for low, high in (a, b)]
    found = bounds_of(ir, (Bounds(*a), Bounds(*b)))
    result = ir.run(*values)[0].to(torch.float32)
    result = result[~result.isnan()]
    assert bool((result >= found.low - 1e-6).all())
    assert bool((result <= found.high + 1e-6).all())


@pytest.mark.parametrize(
    ("name", "a", "b", "wanted"),
    [
        ("mul", ZERO, ANY, ZERO),
        ("lt", Bounds(0.99, math.inf), Bounds(0.99, 0.99), ZERO),
        ("ge number", Bounds(0.5, math.inf), ANY, ONE),
        ("ge number", ANY, ANY, EITHER),
        ("sigmoid", ANY, ANY, EITHER),
        ("and", ZERO, ANY, ZERO),
        ("rsub", ZERO, ANY, ONE),
        ("fill", ANY, ONE, Bounds(-3.0, -3.0)),
    ],
)
def test_bounds_are_as_narrow_as_a_proof_needs(name: str, a: Bounds, b: Bounds, wanted: Bounds) -> None:
    assert bounds_of(program(name), (a, b)) == wanted


def test_a_score_that_gets_a_large_negative_number_has_no_weight() -> None:
    assert bounds_of(program("add"), (ANY, Bounds(-1e4, -1e4))).weightless
    assert not bounds_of(program("add"), (ANY, Bounds(-50.0, -50.0))).weightless
    assert not bounds_of(program("add"), (ANY, ANY)).weightless


def test_a_comparison_says_what_the_score_is_where_it_is_false() -> None:
    (node,) = program("ge number").calls()
    score, bounds = left_out_by(node) or (None, ANY)
    assert score is program("ge number").placeholders[0]
    assert bounds == Bounds(-math.inf, 0.5)


@pytest.mark.parametrize("by", [EITHER, Bounds(-1.0, 0.0)])
def test_nothing_is_known_of_a_quotient_when_the_divisor_may_be_zero(by: Bounds) -> None:
    class Quotient(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a / b

    program = captured(Quotient(), (torch.ones(1, 4), torch.ones(1, 4)), dynamic=False)
    assert computed(program.calls()[0], (Bounds(1.0, 2.0), by)) == ANY
