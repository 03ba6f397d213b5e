"""eliminate-dead removes what nobody reads, with all that only it read, and keeps what is there to refuse."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, check_pass
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect
from vlexport.ir.facts import FACTS
from vlexport.ir.program import Program
from vlexport.passes.eliminate_dead import EliminateDead
from vlexport.passes.pipeline import verify

aten = torch.ops.aten
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def calls(program: Program) -> list[str]:
    return [dialect.plain_name(n) for n in program.calls()]


def base() -> Program:
    """``linear(x).tanh()`` with a weight of 3 × 4."""
    torch.manual_seed(0)
    return captured(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ROWS)


def dead(program: Program, target: Any, *arguments: Any) -> Node:
    """A call before the output that nobody reads."""
    return program.add_call(target, arguments, before=program.output, value_of=program.calls()[0])


def test_program_stays_when_everything_is_read() -> None:
    check_pass(EliminateDead(), base(), expect_changes=0)


def test_chain_goes_with_its_weights_when_nobody_reads_its_end() -> None:
    program = base()
    weight = program.add_tensor("unread", torch.randn(5, 4), before=program.output)
    product = dead(program, aten.linear.default, program.placeholders[0], weight)
    dead(program, aten.tanh.default, product)
    checked = check_pass(EliminateDead(), program, expect_changes=1)
    assert calls(checked.after) == ["linear", "tanh"]
    assert "unread" not in checked.after.tensors
    assert (checked.changes[0].saved_nodes, checked.changes[0].saved_parameters) == (2, 20)
    assert checked.changes[0].saved_macs == 20
    assert checked.changes[0].what == "unread tanh removed"


def test_operand_stays_when_something_else_reads_it() -> None:
    program = base()
    kept = program.calls()[0]
    dead(program, aten.mul.Tensor, kept, kept.args[2])
    checked = check_pass(EliminateDead(), program, expect_changes=1)
    assert calls(checked.after) == ["linear", "tanh"]
    assert checked.changes[0].saved_parameters == 0, "the bias is still read"


def test_operand_of_two_dead_calls_is_counted_once_when_both_go() -> None:
    program = base()
    shared = dead(program, aten.exp.default, program.placeholders[0])
    dead(program, aten.sin.default, shared)
    dead(program, aten.cos.default, shared)
    checked = check_pass(EliminateDead(), program, expect_changes=2)
    assert sorted(c.saved_nodes for c in checked.changes) == [1, 2]


def test_call_with_several_results_stays_whole_when_one_of_them_is_read() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.chunk(2, -1)[0] * 2

    program = captured(Half(), ROWS)
    dead(program, operator.getitem, program.calls("aten.chunk.default")[0], 1)
    checked = check_pass(EliminateDead(), program)
    assert calls(checked.after) == ["chunk", "getitem", "mul"]


def test_inputs_stay_when_nobody_reads_them() -> None:
    class Ignores(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2

    program = captured(Ignores(), (ROWS, ROWS))
    dead(program, aten.exp.default, program.placeholders[1])
    checked = check_pass(EliminateDead(), program, expect_changes=1)
    assert [n.name for n in checked.after.placeholders] == ["x", "y"]


class Selected(nn.Module):
    """Refuses inputs of which fewer than two elements are positive."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[x > 0]
        torch._check(chosen.shape[0] >= 2)
        return chosen * 2


def test_assertion_stays_with_what_it_reads_when_nobody_reads_it() -> None:
    program = captured(Selected(), ROWS)
    assert program.calls("aten._assert_scalar.default")
    doomed = dead(program, aten.exp.default, program.placeholders[0])
    after = program.copy()
    changes, _ = EliminateDead().run(after)
    verify(after, made_by="test")
    assert [c.what for c in changes] == ["unread exp removed"]
    assert calls(after) == [dialect.plain_name(n) for n in program.calls() if n is not doomed]
    assert after.run(ROWS)[0].shape == program.run(ROWS)[0].shape
    with pytest.raises(RuntimeError):
        after.run(-ROWS.abs())


def test_text_is_golden_when_dead_calls_lie_between_others() -> None:
    program = base()
    dead(program, aten.exp.default, program.calls()[0])
    dead(program, aten.mul.Tensor, program.calls()[0], program.add_tensor("t", torch.ones(3), before=program.output))
    check_pass(EliminateDead(), program, expect_changes=2, golden="eliminate_dead")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=4, including=("dead", "constant")))
def test_values_are_equal_and_no_dead_call_is_left_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(EliminateDead(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert checked.record.gate.worst == 0.0
    assert FACTS["no-dead-calls"](program) == (not checked.changes), "pass and fact agree on what is dead"
