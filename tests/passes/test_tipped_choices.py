"""Choices that the last digits tip over: found in the graphs and rows that have them, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.quant_ops import DEQUANTIZE, QUANTIZE
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


class Rounding(nn.Module):
    """Sums of whole numbers, which a rounding makes of what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return DEQUANTIZE(QUANTIZE(x, self.scale, self.zero), self.scale, self.zero).sum(1)


def test_row_that_lies_between_two_integers_counts_where_a_distance_is_given() -> None:
    x = torch.ones(ROWS, TOKENS)
    x[1] = 2.5  # rounded to 2 or 3 as the last digit says
    program = captured(Rounding(), x)
    found = tipped_choices(program, [x], in_integers=0.05)
    assert found.rows == (1,)
    assert found.moved >= 0.05
    assert tipped_choices(program, [x]).rows == (), "a graph that chooses nothing, where integers are not asked for"
    assert tipped_choices(program, [x], in_integers=1.0).rows == (), "it does not move that far"
    assert tipped_choices(program, [torch.ones(ROWS, TOKENS)], in_integers=0.05).rows == ()
    assert tipped_choices(captured(Choosing(chooses=False), tied()), [tied()], in_integers=0.0).rows == ()


def test_what_is_stored_moves_where_inputs_are_whole_numbers() -> None:
    class Words(Rounding):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("words", torch.tensor([[1.0] * WIDTH, [2.5] * WIDTH]))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.embedding(x, self.words)).sum(1)

    ids = torch.tensor([[0, 0], [0, 1], [0, 0]])
    program = captured(Words(), ids)
    assert tipped_choices(program, [ids], in_integers=0.05).rows == (1,)
    assert torch.equal(program.run(ids)[0], Words()(ids)), "the program itself holds what it held"
