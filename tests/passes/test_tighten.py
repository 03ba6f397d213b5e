"""tighten: an outlier that nothing depends on is cut off, one that matters is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.passes.quantizing import SCHEMES, images, program_of, quantizer, ranges
from vlexport.core.numerics import sqnr_db
from vlexport.ir.program import Program
from vlexport.passes.quantization.tighten import tightened


class Spiked(nn.Module):
    """A linear over values of which one in many is thirty times as large; its weight there is tiny, or is not."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        torch.manual_seed(41)
        self.linear = nn.Linear(16, 8)
        with torch.no_grad():
            self.linear.weight[:, 0] *= weight
        self.factor = nn.Parameter(torch.tensor([30.0, *[1.0] * 15]))

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(torch.sin(image) * self.factor)  # type: ignore[no-any-return]


def share(program: Program) -> tuple[float, float, float]:
    """The part of the range that is kept, and decibels on other images without and with it."""
    table = ranges(program, SCHEMES["static-u8s8"])
    plain = quantizer(program, table=table, correct_bias=False)
    before = plain.decisions(program)
    after = tightened(program, before, SCHEMES["static-u8s8"], [(images(8, 3),)])
    ratio = next(b.high / a.high for a, b in zip(before.values, after.values, strict=True))
    found = []
    for samples in ([], [(images(8, 3),)]):
        pass_ = quantizer(program, table=table, correct_bias=False)
        pass_.samples = samples
        quantized = program.copy()
        pass_.run(quantized)
        image = images(16, 9)
        found.append(sqnr_db(quantized.run(image)[0].numpy(), program.run(image)[0].numpy()))
    return ratio, found[0], found[1]


def test_range_is_narrowed_when_what_is_cut_off_hardly_matters() -> None:
    ratio, plain, ours = share(program_of(Spiked(1e-5)))
    assert ratio == pytest.approx(0.4)
    assert ours > plain + 6.0


def test_range_stays_when_the_outlier_matters() -> None:
    ratio, plain, ours = share(program_of(Spiked(1.0)))
    assert ratio >= 0.9
    assert ours > plain - 0.2


def test_decisions_stay_when_there_are_no_samples() -> None:
    program = program_of(Spiked(1.0))
    decisions = quantizer(program).decisions(program)
    assert tightened(program, decisions, SCHEMES["static-u8s8"], []) == decisions
