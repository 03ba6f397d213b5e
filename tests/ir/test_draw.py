"""Seeded values: reproducible, of the right shape and dtype, ids inside the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.draw import draw, vocabulary
from vlexport.ir.hiding import hides
from vlexport.ir.program import Program


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(50, 4), nn.Embedding(3, 4)

    def forward(self, image: Tensor, ids: Tensor, types: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        hidden = self.words(ids.reshape(ids.shape[0], -1).to(torch.int64)) + self.types(types)
        return (hidden * mask.unsqueeze(-1)).sum((1, 2)) + image.mean((1, 2, 3)) + scores.sum(1)


def words() -> Program:
    torch.manual_seed(0)
    ids = torch.ones(2, 6, dtype=torch.int32)
    inputs = (torch.randn(2, 3, 4, 4), ids, ids.long(), torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6).long())
    dynamic = {name: {0: ("batch", 1, 64)} for name in ("image", "ids", "types", "mask", "scores")}
    return captured(Words(), inputs, dynamic=dynamic)


def test_draw_fits_the_signature_when_inputs_are_of_every_dtype() -> None:
    program = words()
    values = draw(program, torch.Generator().manual_seed(0), {"batch": 64})
    assert [v.dtype for v in values] == [torch.float32, torch.int32, torch.int64, torch.bool, torch.int64]
    assert [tuple(v.shape) for v in values] == [(64, 3, 4, 4), (64, 6), (64, 6), (64, 6), (64, 6)]
    assert program.run(*values)[0].shape == (64,)


def test_draw_keeps_ids_in_the_vocabulary_and_uses_all_of_it_when_many_are_drawn() -> None:
    image, ids, types, mask, scores = draw(words(), torch.Generator().manual_seed(0), {"batch": 64})
    assert set(ids.unique().tolist()) <= set(range(50))
    assert len(ids.unique()) > 40
    assert set(types.unique().tolist()) == {0, 1, 2}
    assert mask.all()
    assert set(scores.unique().tolist()) == {0, 1}, "without an embedding, a mask is likeliest"
    # 3072 values: the mean of a standard normal lies within 0.1 but for 5.5 sigma
    assert abs(float(image.mean())) < 0.1
    assert abs(float(image.std()) - 1) < 0.1


def test_draw_is_equal_when_the_seed_is_and_different_otherwise() -> None:
    program = words()
    first, same, other = (draw(program, torch.Generator().manual_seed(s), {"batch": 2}) for s in (7, 7, 8))
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], other[0])


def test_draw_leaves_the_global_generator_alone_when_called() -> None:
    state = torch.random.get_rng_state()
    draw(words(), torch.Generator().manual_seed(0), {"batch": 1})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_vocabulary_is_the_smallest_table_when_several_read_the_ids() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Embedding(50, 4), nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.large(ids) + self.small(ids.flatten(1))

    program = captured(Two(), torch.ones(2, 3, dtype=torch.int64))
    assert vocabulary(program, program.placeholders[0]) == 9


LOWEST = torch.finfo(torch.float32).min


class Attending(nn.Module):
    """Scores of each row against each other, changed by a mask, and their softmax."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.masked(x @ x.mT, mask[:, None]).softmax(-1) @ x


def attending(masked: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.bool) -> Program:
    return captured(Attending(masked), (torch.randn(2, 5, 4), torch.ones(2, 5, dtype=dtype)))


@pytest.mark.parametrize(
    ("masked", "wanted"),
    [
        (lambda scores, mask: scores.masked_fill(mask, -torch.inf), True),
        (lambda scores, mask: scores.masked_fill(~mask, LOWEST), False),
        (lambda scores, mask: scores.masked_fill(mask.logical_not().logical_not(), -1e9), True),
        (lambda scores, mask: torch.where(mask, scores, -1e9), False),
        (lambda scores, mask: torch.where(mask, torch.full((1,), -1e9), scores), True),
        (lambda scores, mask: scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf), True),
        (lambda scores, mask: scores.masked_fill(mask, 0.0), False),
        (lambda scores, mask: scores * mask, False),
    ],
)
def test_a_mask_hides_what_it_is_true_for_when_that_is_filled_with_the_lowest_score(
    masked: Callable[[Tensor, Tensor], Tensor], wanted: bool
) -> None:
    program = attending(masked)
    assert hides(program, program.placeholders[1]) is wanted
    for masks in (False, True):
        drawn = draw(program, torch.Generator().manual_seed(0), {"batch": 64}, masks=masks)
        assert not drawn[1][:, 0].logical_xor(torch.tensor(not wanted)).any(), "the first place is never hidden"
        assert bool(drawn[1].float().std() > 0) is masks
        assert program.run(*drawn)[0].isfinite().all()


def test_a_mask_in_whole_numbers_never_hides_the_first_place() -> None:
    program = attending(lambda scores, mask: scores.masked_fill(mask == 0, -torch.inf), torch.int64)
    _, mask = draw(program, torch.Generator().manual_seed(0), {"batch": 64})
    assert mask[:, 0].all()
    assert 0.3 < float(mask[:, 1:].float().mean()) < 0.7


def test_bytes_that_nothing_looks_up_are_those_of_a_photo() -> None:
    class Photo(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.float().mean((1, 2))

    program = captured(Photo(), torch.zeros(2, 8, 8, dtype=torch.uint8))
    (image,) = draw(program, torch.Generator().manual_seed(0), {"batch": 64})
    assert (int(image.min()), int(image.max())) == (0, 255)


def test_ids_of_two_words_are_no_mask() -> None:
    class Types(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.types = nn.Embedding(2, 4)

        def forward(self, types: Tensor) -> Tensor:
            return self.types(types.long())

    for dtype in (torch.int64, torch.uint8):
        program = captured(Types(), torch.ones(2, 5, dtype=dtype))
        (types,) = draw(program, torch.Generator().manual_seed(0), {"batch": 64})
        assert set(types[:, 0].tolist()) == {0, 1}
        assert int(types.max()) == 1
