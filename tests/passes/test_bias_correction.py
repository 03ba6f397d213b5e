"""bias correction: the mean error of a layer goes away, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.passes.quantizing import images, program_of, quantizer
from vlexport.core.numerics import sqnr_db
from vlexport.ir.program import Program
from vlexport.passes.quantization.bias_correction import mean_errors


class Shifted(nn.Module):
    """Two layers whose inputs lie on one side of 0, so that rounding a weight moves the mean of the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(21)
        self.conv, self.head = nn.Conv2d(3, 8, 3, groups=1), nn.Linear(8, 4, bias=False)
        with torch.no_grad():
            self.conv.weight[:, 0, 0, 0] *= 40.0
            self.head.weight[:, 0] *= 40.0

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.conv(image.abs() + 1.0))
        return self.head(x.permute(0, 2, 3, 1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(Shifted())


def mean_error(program: Program, *, samples: list[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Largest mean error of an output channel on other images, and the ratio of signal to noise."""
    pass_ = quantizer(program)
    pass_.samples = samples
    after = program.copy()
    pass_.run(after)
    image = images(16, 9)
    ours, reference = after.run(image)[0], program.run(image)[0]
    return float((ours - reference).mean((0, 1, 2)).abs().max()), sqnr_db(ours.numpy(), reference.numpy())


def test_mean_error_goes_and_noise_falls_when_biases_are_corrected(program: Program) -> None:
    plain, plain_db = mean_error(program, samples=[])
    corrected, corrected_db = mean_error(program, samples=[(images(8, 3),)])
    assert corrected < plain / 2
    assert corrected_db > plain_db + 1.0


def test_errors_are_those_of_a_second_measurement_when_means_are_taken_by_hand(program: Program) -> None:
    pass_, sample = quantizer(program), (images(4, 3),)
    decisions = pass_.decisions(program)
    found = mean_errors(program, decisions, [sample, sample])
    assert [len(each) for each in found.values()] == [8, 4]
    once = mean_errors(program, decisions, [sample])
    assert all(torch.allclose(found[key], once[key]) for key in once)


def test_bias_stays_when_the_option_says_so(program: Program) -> None:
    pass_ = quantizer(program, correct_bias=False)
    pass_.samples = [(images(8, 3),)]
    after = program.copy()
    pass_.run(after)
    assert not any("corrected" in name for name in after.tensors)
