"""narrow-to-demand on random models: values stay, to float64's last digits, and multiply-accumulates only fall."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from tests.demand_strategies import pyramids, token_models
from tests.harness import check_pass, worst_error
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.base import Match
from vlexport.passes.narrow_to_demand import NarrowToDemand


def settings_of(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip


FLOAT64_TOLERANCE = 1e-12
OTHERS = ("linear", "matmul", "conv2d", "slice", "select", "split", "cat", "split axis", "pad")


def in_float64(program: Program) -> tuple[torch.Tensor, ...]:
    """What a Program computes at batch 3. Its nodes keep their recorded dtypes, which nothing here reads."""
    (example,) = program.example
    x = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = program.copy()
    twin.tensors = {name: t.double() if t.is_floating_point() else t for name, t in program.tensors.items()}
    return twin.run(x)


def check_values(program: Program) -> None:
    """Values at batch 3, savings as foreseen, and a fixed point. The whole harness takes ten times as long."""
    expected, before = in_float64(program), cost(program).macs
    foreseen = sum(match.data.saved_macs for match in NarrowToDemand().find(program) if isinstance(match, Match))
    changes, _ = NarrowToDemand().run(program)
    assert worst_error(in_float64(program), expected) <= FLOAT64_TOLERANCE
    assert all(change.saved_macs > 0 for change in changes)
    assert foreseen <= before - cost(program).macs == sum(change.saved_macs for change in changes)
    assert NarrowToDemand().run(program)[0] == [], "applied twice, it changes more"


def check_contract(program: Program) -> None:
    try:
        check_pass(NarrowToDemand(), program, prefixes=2)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)


@settings_of(200)
@given(token_models())
def test_values_are_equal_when_heads_read_some_tokens(program: Program) -> None:
    check_values(program)


@settings_of(60)
@given(pyramids())
def test_values_are_equal_when_heads_read_some_channels(program: Program) -> None:
    check_values(program)


@settings_of(60)
@given(programs(most=6, including=OTHERS))
def test_values_are_equal_when_the_program_is_random(program: Program) -> None:
    check_values(program)


@settings_of(12)
@given(st.one_of(token_models(), pyramids()))
def test_contract_holds_when_heads_read_some(program: Program) -> None:
    check_contract(program)
