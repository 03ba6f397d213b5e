"""eliminate-layout: what does nothing, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor

from tests.harness import captured, check_pass
from tests.passes.test_merge_layout import IMAGE, Model, calls, canonical
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.program import Program
from vlexport.passes.eliminate_layout import EliminateLayout

F = torch.nn.functional


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 0:],
        lambda x: x[:, -4:, :6],
        lambda x: x.narrow(1, 0, 4),
        lambda x: x.expand(-1, 4, 6, 6),
        lambda x: x.expand(x.shape[0], 4, -1, -1),
        lambda x: F.pad(x, (0, 0, 0, 0)),
        lambda x: x.repeat(1, 1, 1, 1),
        lambda x: x.tile(1),
        lambda x: x.repeat_interleave(1, 1),
        lambda x: x.roll((0, 0), (2, 3)),
        lambda x: x.roll(0),
        lambda x: torch.cat([x], 1),
        lambda x: x.split(4, 1)[0],
        lambda x: x.chunk(1, 2)[0],
    ],
)
def test_operator_goes_when_its_result_is_its_operand(function: Callable[[Tensor], Tensor]) -> None:
    assert calls(check_pass(EliminateLayout(), canonical(function)).after) == []


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.sum(1, True).flip(1).roll(1, 1), ["sum"]),
        (lambda x: x.sum((1, 2), True).permute(0, 2, 1, 3), ["sum"]),
        (lambda x: x[:, 0:].tanh()[:, 0:], ["tanh"]),
    ],
)
def test_operator_goes_when_it_moves_axes_of_size_one(function: Callable[[Tensor], Tensor], left: list[str]) -> None:
    assert calls(check_pass(EliminateLayout(), canonical(function)).after) == left


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.narrow(1, 1, 3),
        lambda x: torch.ops.aten.slice(x, 1, 0, 3),
        lambda x: torch.ops.aten.slice(x, 1, 0, 9, 2),
        lambda x: F.pad(x, (1, -1)),
        lambda x: F.pad(x, (0, 0, 0, 0, -1, 1)),
        lambda x: x.roll(1, 2),
        lambda x: x.roll(6),
        lambda x: x.flip(1),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.split(2, 1)[0],
        lambda x: x.expand(3, -1, -1, -1, -1),
    ],
)
def test_operator_stays_when_it_moves_or_drops_something(function: Callable[[Tensor], Any]) -> None:
    check_pass(EliminateLayout(), canonical(function), expect_changes=0)


def test_slice_stays_when_its_size_depends_on_the_input() -> None:
    function = lambda x: torch.ops.aten.slice(torch.cat([x, x], 2), 2, 0, -1)  # noqa: E731
    program = captured(Model(function), IMAGE, dynamic={"x": {0: "batch", 2: "height"}})
    check_pass(EliminateLayout(), program, expect_changes=0)


def test_text_is_golden_when_operators_without_effect_follow_each_other() -> None:
    function = lambda x: F.pad(x[:, 0:].roll((0, 0), (2, 3)), (0, 0, 0, 0)).expand(-1, 4, -1, -1).tanh()[:, :4]  # noqa: E731
    check_pass(EliminateLayout(), canonical(function), golden="eliminate_layout", expect_changes=5)


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=3, including=("layout chain", "slice", "split", "expand", "pad", "pieces")))
def test_values_are_equal_when_the_program_is_random(program: Program) -> None:
    try:
        check_pass(EliminateLayout(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
