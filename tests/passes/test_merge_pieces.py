"""merge-pieces: pieces of pieces, pieces of what was joined, and pieces joined again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from tests.passes.test_merge_layout import calls
from tests.passes.test_merge_layout import canonical as with_whole_slices
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.program import Program
from vlexport.passes.eliminate_layout import EliminateLayout
from vlexport.passes.merge_pieces import MergePieces


def canonical(function: Callable[[Tensor], Any]) -> Program:
    program = with_whole_slices(function)
    EliminateLayout().run(program)
    return program


def cls_and(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two values and both joined along axis 1: 4 + 4 channels."""
    y = x.tanh()
    return x, y, torch.cat([x, y], 1)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.narrow(2, 1, 5).narrow(2, 2, 2), ["slice"]),
        (lambda x: x[:, :, 1::2][:, :, ::2], ["slice"]),
        (lambda x: torch.ops.aten.slice(torch.ops.aten.slice(x, 3, 1, 6, 2), 3, -2, 9), ["slice"]),
        (lambda x: x.narrow(2, 1, 5).select(2, -1), ["select"]),
        (lambda x: cls_and(x)[2].narrow(1, 4, 4), ["tanh"]),
        (lambda x: cls_and(x)[2].narrow(1, 5, 2), ["tanh", "slice"]),
        (lambda x: cls_and(x)[2].select(1, 6), ["tanh", "select"]),
        (lambda x: (lambda p: p[0] * p[1])(cls_and(x)[2].split([4, 4], 1)), ["tanh", "mul"]),
        (lambda x: (lambda p: p[1])(cls_and(x)[2].chunk(2, 1)), ["tanh"]),
        (lambda x: (lambda none: torch.cat([none, x.tanh(), none], 1)[:, 1:3])(x.new_zeros(0)), ["tanh", "slice"]),
        (lambda x: torch.cat([x.new_zeros(0), x.tanh(), x], 1), ["tanh", "cat"]),
        (lambda x: torch.cat(x.split([1, 3], 1), 1), []),
        (lambda x: torch.cat([x.narrow(3, 0, 2), x.narrow(3, 2, 4)], 3), []),
        (lambda x: torch.stack(x.unbind(2), 2), []),
        (lambda x: torch.cat([x, torch.cat([x.tanh(), x], 1), x], 1), ["tanh", "cat"]),
    ],
)  # fmt: skip
def test_pieces_are_merged_when_fewer_operators_say_the_same(
    function: Callable[[Tensor], Tensor], left: list[str]
) -> None:
    checked = check_pass(MergePieces(), canonical(function))
    assert calls(checked.after) == left


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (lambda y: (y.narrow(2, 2, 2), y.tanh()))(x.narrow(2, 1, 5)),
         "the slice's output is used by 1 other(s)"),
        (lambda x: cls_and(x)[2].narrow(1, 3, 4), "it takes parts of several of the joined values"),
        (lambda x: (lambda y: (y.narrow(1, 5, 2), y.tanh()))(cls_and(x)[2]),
         "a part of one operand has to be cut out anyway"),
        (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), "the pieces are not all of it, in order"),
        (lambda x: torch.cat([x.narrow(3, 0, 2), x.narrow(3, 3, 3)], 3), "the pieces are not all of it, in order"),
        (lambda x: torch.stack(x.unbind(2), 1), None),
        (lambda x: torch.cat([x.narrow(3, 0, 2), x.tanh().narrow(3, 2, 4)], 3), None),
        (lambda x: (lambda y: torch.cat([x, y], 1) + torch.cat([y, x], 1))(torch.cat([x, x], 1)),
         "the cat's output is used by 1 other(s)"),
        (lambda x: torch.cat([x, torch.cat([x, x], 2).narrow(2, 3, 6)], 1),
         "it takes parts of several of the joined values"),
        (lambda x: x.narrow(2, 1, 5).narrow(3, 2, 2), None),
    ],
)  # fmt: skip
def test_pieces_stay_when_nothing_would_go(function: Callable[[Tensor], Any], reason: str | None) -> None:
    found = {reason for _, reason in near_misses(MergePieces(), canonical(function))}
    assert found == ({reason} if reason else set())


def test_slice_of_a_slice_stays_when_the_size_depends_on_the_input() -> None:
    function = lambda x: torch.ops.aten.slice(torch.ops.aten.slice(torch.cat([x, x], 2), 2, 0, -1), 2, 0, 1)  # noqa: E731
    program = with_whole_slices(function, dynamic={"x": {0: "batch", 2: "height"}})
    check_pass(MergePieces(), program, expect_changes=0)


def test_text_is_golden_when_a_class_token_is_joined_and_read() -> None:
    def tokens(x: Tensor) -> Tensor:
        rows = x.flatten(2)
        joined = torch.cat([rows.mean(2, True), rows], 2)
        return joined[:, :, 0] + joined[:, :, 1:].mean(2)

    check_pass(MergePieces(), canonical(tokens), golden="merge_pieces")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=3, including=("pieces", "slice", "split", "cat", "select")))
def test_values_are_equal_and_there_are_fewer_calls_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(MergePieces(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert all(change.saved_nodes >= 0 for change in checked.changes)


def test_piece_of_a_cat_stays_when_the_cat_changed_its_dtype() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, (x > 0).to(torch.int32)], 1).narrow(1, 3, 3) * 2

    program = captured(Cut(), torch.randn(2, 3))
    assert near_misses(MergePieces(), program) == [("narrow", "the cat changes its operand's dtype")]
