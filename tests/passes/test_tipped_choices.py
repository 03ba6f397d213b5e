"""Choices that the last digits tip over: found in the graphs and rows that have them, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.passes.selection import tipped_choices

ROWS, TOKENS, WIDTH = 3, 8, 4


class Choosing(nn.Module):
    """The mean of half of the tokens, by a score."""

    def __init__(self, *, chooses: bool = True) -> None:
        super().__init__()
        self.chooses = chooses

    def forward(self, x: Tensor) -> Tensor:
        if not self.chooses:
            return x.mean(1)
        best = x[:, :, 0].topk(TOKENS // 2).indices
        return x.gather(1, best[:, :, None].expand(-1, -1, WIDTH)).mean(1)


def tokens() -> Tensor:
    """Scores are a step apart; the rest is drawn."""
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 1.0 + torch.arange(TOKENS)
    return x


def tied() -> Tensor:
    """In row 1 the fourth score and the fifth are one."""
    x = tokens()
    x[1, 3, 0] = x[1, 4, 0]
    return x


def test_row_is_named_with_what_it_moves_by_when_its_scores_tie() -> None:
    x = tied()
    found = tipped_choices(captured(Choosing(), x), [x])
    assert found.rows == (1,)
    other = float((x[1, 3] - x[1, 4]).abs().max()) / (TOKENS // 2)
    largest = float(Choosing()(x).abs().max())
    assert abs(found.moved - other / largest) < 1e-4


def test_rows_that_tip_over_without_a_difference_are_left_out_beyond_a_distance() -> None:
    x = tied()
    x[1, 4] = x[1, 3]  # whichever of the two is taken, it is the same
    program = captured(Choosing(), x)
    assert tipped_choices(program, [x]).rows == (1,)
    assert tipped_choices(program, [x], beyond=5e-6).rows == ()
    x = tied()
    assert tipped_choices(captured(Choosing(), x), [x], beyond=5e-6).rows == (1,)


def test_scores_further_apart_tip_over_when_inputs_move_further() -> None:
    x = tokens()
    x[1, 3, 0] = x[1, 4, 0] * (1 - 6e-6)
    program = captured(Choosing(), x)
    assert tipped_choices(program, [x]).rows == ()
    assert tipped_choices(program, [x], nudge=1e-5).rows == (1,)


def test_nothing_is_found_when_scores_lie_apart() -> None:
    x = tokens()
    found = tipped_choices(captured(Choosing(), x), [x])
    assert (found.rows, found.moved) == ((), 0.0)


def test_nothing_is_found_when_nothing_is_chosen() -> None:
    x = tied()
    found = tipped_choices(captured(Choosing(chooses=False), x), [x])
    assert (found.rows, found.moved) == ((), 0.0)


def test_all_rows_are_named_when_the_choice_is_of_the_whole_batch() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            best = x[:, :, 0].mean(0).topk(TOKENS // 2).indices
            return x[:, best].mean(1)

    x = tied()
    x[:, 3, 0] = x[:, 4, 0]
    assert tipped_choices(captured(Whole(), x), [x]).rows == tuple(range(ROWS))
