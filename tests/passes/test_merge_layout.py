"""merge-layout: chains that become shorter, chains that must stay and why, and that values are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.merge_layout import MergeLayout

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(torch.relu(x))


def canonical(function: Callable[[Tensor], Any], **options: Any) -> Program:
    program = captured(Model(function), IMAGE, **options)
    Canonicalize().run(program)
    return program


def calls(program: Program) -> list[str]:
    return [dialect.plain_name(n) for n in program.calls()][1:]


def to_windows(x: Tensor) -> Tensor:
    """[B, 6, 6, 4] → [4 · B, 3, 3, 4], as Swin cuts an image."""
    return x.view(-1, 2, 3, 2, 3, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 3, 3, 4)


def from_windows(x: Tensor) -> Tensor:
    return x.view(-1, 2, 2, 3, 3, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 6, 4)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), []),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 2, 1, 3), ["permute"]),
        (lambda x: x.reshape(-1, 4, 36).reshape(-1, 4, 6, 6), []),
        (lambda x: x.reshape(-1, 4, 36).reshape(-1, 2, 2, 36), ["reshape"]),
        (lambda x: x.reshape(-1, 9, 16).reshape(-1, 8, 18), ["reshape"]),
        (lambda x: x.unsqueeze(1).squeeze(1), []),
        (lambda x: x.unsqueeze(1).permute(0, 2, 1, 3, 4), ["unsqueeze"]),
        (lambda x: x.reshape(-1, 1, 4, 36).squeeze(1).reshape(-1, 4, 6, 6).unsqueeze(2), ["unsqueeze"]),
        (lambda x: x.sum(1, True).permute(0, 2, 3, 1).reshape(-1, 36), ["sum", "reshape"]),
        (lambda x: x.flatten(2).transpose(1, 2).reshape(-1, 6, 6, 4), ["permute"]),
        (lambda x: x.flatten(2).transpose(1, 2).reshape(-1, 6, 6, 4).permute(0, 3, 1, 2), []),
        (lambda x: from_windows(to_windows(x.permute(0, 2, 3, 1))), ["permute"]),
        (lambda x: to_windows(x.permute(0, 2, 3, 1)).view(-1, 9, 4), ["reshape", "permute", "reshape"]),
        (lambda x: x.reshape(-1, 36).permute(1, 0).reshape(36, -1, 4).permute(1, 2, 0), ["reshape"]),
    ],
)  # fmt: skip
def test_chain_is_shortened_when_less_says_the_same(function: Callable[[Tensor], Tensor], left: list[str]) -> None:
    checked = check_pass(MergeLayout(), canonical(function))
    assert calls(checked.after) == left
    assert checked.changes
    assert checked.near_misses == ()


def test_sizes_that_the_input_decides_are_kept_when_the_last_reshape_says_them() -> None:
    function = lambda x: x.reshape(x.shape[0], 4, -1).reshape(x.shape[0], 2, 2, x.shape[2] * 3, -1)  # noqa: E731
    program = canonical(function, dynamic={"x": {0: "batch", 2: "height"}})
    checked = check_pass(MergeLayout(), program, expect_changes=1)
    assert [n for n in calls(checked.after) if n == "reshape"] == ["reshape"]


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (lambda x: (lambda y: y.permute(0, 3, 1, 2) * y.sum())(x.permute(0, 3, 1, 2)),
         ["the permute's output is used by 1 other(s)"]),
        (lambda x: (lambda y: (y.reshape(-1, 6, 24), y.tanh()))(x.reshape(-1, 4, 36)),
         ["the reshape's output is used by 1 other(s)"]),
        (lambda x: x.reshape(-1, 2, 72).permute(0, 2, 1).reshape(-1, 12, 12), []),
        (lambda x: x.reshape(-1, 18, 8).permute(0, 2, 1).reshape(-1, 12, 12),
         ["its reshapes cut one axis at places of which neither refines the other"]),
        (lambda x: x.flatten(2).transpose(1, 2), []),
        (lambda x: torch.tanh(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), []),
    ],
)  # fmt: skip
def test_chain_stays_when_no_operator_would_go(function: Callable[[Tensor], Any], reasons: list[str]) -> None:
    assert [reason for _, reason in near_misses(MergeLayout(), canonical(function))] == reasons


def test_merged_reshape_is_not_made_when_two_sizes_depend_on_the_input() -> None:
    function = lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).permute(0, 2, 1)  # noqa: E731
    program = canonical(function, dynamic={"x": {0: "batch", 2: "height", 3: "width"}})
    reason = "the merged reshape would have two sizes that depend on the input"
    assert near_misses(MergeLayout(), program) == [("permute", reason)]


def test_both_origins_are_kept_when_two_operators_become_one() -> None:
    from vlexport.ir import provenance

    program = canonical(lambda x: x.permute(0, 2, 3, 1).permute(0, 2, 1, 3))
    _, first, second = program.calls()
    after = check_pass(MergeLayout(), program).after
    assert provenance.origins(after.calls()[-1]) == (*provenance.origins(first), *provenance.origins(second))


def test_text_is_golden_when_windows_are_cut_and_put_back() -> None:
    class Windows(nn.Module):
        """What lies between two attentions of Swin, without the attention."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 8)
            self.proj = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            y = to_windows(x).view(-1, 9, 4)
            y = self.proj(self.qkv(y).reshape(-1, 9, 2, 4).reshape(-1, 9, 8)).view(-1, 3, 3, 4)
            return (x + from_windows(y)).view(-1, 36, 4).permute(0, 2, 1).reshape(-1, 4, 6, 6)

    torch.manual_seed(0)
    program = captured(Windows(), IMAGE)
    Canonicalize().run(program)
    check_pass(MergeLayout(), program, golden="merge_layout")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=4, including=("layout chain", "permute", "split axis", "flatten")))
def test_values_are_equal_and_there_are_fewer_calls_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(MergeLayout(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert all(change.saved_nodes > 0 for change in checked.changes)
