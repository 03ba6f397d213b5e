"""equalize-ranges: chains of convolutions, linears and attention; what is rewritten stays the same; near misses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.harness import check_pass, near_misses
from tests.passes.quantizing import SCHEMES, images, program_of
from tests.passes.test_smooth_activations import WIDTH, quantized_sqnr
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.methods import Method
from vlexport.ir.program import Program
from vlexport.passes.equalize_ranges import EqualizeRanges, equalized_channels


def equalizer(program: Program, **given: object) -> EqualizeRanges:
    table = calibrate(program, dataset(images(16, 1).numpy(), program), equalized_channels(program), Method())
    values = {"scheme": SCHEMES["static-u8s8"], "ranges": table.by_value(), "samples": [(images(4, 2),)], **given}
    return EqualizeRanges(None, **values)  # type: ignore[arg-type]


def uneven(*chain: nn.Conv2d | nn.Linear, seed: int = 5) -> None:
    """Channels between two of the chain a thousand times apart, though the same is computed: as after merging."""
    with torch.no_grad():
        for first, second in itertools.pairwise(chain):
            generator = torch.Generator().manual_seed(seed)
            spread = torch.logspace(-1.5, 1.5, len(first.weight))[
                torch.randperm(len(first.weight), generator=generator)
            ]
            first.weight *= spread.reshape(-1, *[1] * (first.weight.ndim - 1))
            assert first.bias is not None
            first.bias *= spread
            along = spread.reshape(-1, 1) if second.weight.shape[1] == 1 else spread[None]
            second.weight /= along.reshape(*along.shape, *[1] * (second.weight.ndim - 2))


class Convolutions(nn.Module):
    """As after merging: convolutions with rectifiers, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1),
        )  # fmt: skip
        uneven(*(each for each in self.body if isinstance(each, nn.Conv2d)))

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Two heads over one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            spread = torch.logspace(-1.5, 1.5, WIDTH)
            self.qkv.weight[2 * WIDTH :] *= spread[:, None]
            self.proj.weight /= spread

    def forward(self, image: Tensor) -> Tensor:
        tokens = image.reshape(-1, 48, WIDTH)
        qkv = self.qkv(tokens).reshape(-1, 48, 3, 2, 8).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(found.permute(0, 2, 1, 3).reshape(-1, 48, WIDTH))  # type: ignore[no-any-return]


def test_text_is_golden_and_integers_keep_more_when_convolutions_are_uneven() -> None:
    program = program_of(Convolutions())
    checked = check_pass(equalizer(program), program, golden="equalize_ranges", expect_changes=3)
    assert {c.what for c in checked.changes} == {"a factor a channel moved from conv2d into conv2d"}
    assert quantized_sqnr(checked.after) > quantized_sqnr(program) + 6.0


def test_values_of_attention_are_scaled_when_a_linear_reads_them() -> None:
    program = program_of(Attention())
    checked = check_pass(equalizer(program), program, expect_changes=1)
    assert [c.what for c in checked.changes] == ["a factor a channel moved from linear into linear"]
    assert quantized_sqnr(checked.after) > quantized_sqnr(program) + 1.0


class Two(nn.Module):
    """Two linears with something between them."""

    def __init__(self, between: nn.Module, *, also: bool = False) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.first, self.between, self.second, self.also = nn.Linear(16, 16), between, nn.Linear(16, 3), also
        uneven(self.first, self.second)

    def forward(self, image: Tensor) -> Tensor:
        x = self.between(self.first(image))
        found = self.second(x)
        return torch.cat([found, x], -1) if self.also else found


@pytest.mark.parametrize(
    ("module", "reasons"),
    [
        (Two(nn.GELU()), []),  # no pattern of this pass
        (Two(nn.ReLU6()), []),
        (Two(nn.MaxPool2d(3, 1, 1)), ["the max_pool2d's windows lie over its channels"]),
        (Two(nn.ReLU(), also=True), ["not all that reads it are projections over the same channels"]),
    ],
)
def test_nothing_is_scaled_when_the_function_bends_or_others_read(module: nn.Module, reasons: list[str]) -> None:
    program = program_of(module)
    assert [why for _, why in near_misses(equalizer(program), program)] == reasons


def test_reason_is_told_when_nothing_is_quantized_or_measured_or_gained() -> None:
    program = program_of(Two(nn.ReLU()))
    assert [why for _, why in near_misses(equalizer(program, keep=("second",)), program)] == [
        "nothing that reads it is quantized"
    ]
    assert [why for _, why in near_misses(equalizer(program, ranges={}), program)] == [
        "the ranges of its channels were not measured"
    ]
    module = Two(nn.ReLU())
    nn.init.zeros_(module.first.bias)
    program = program_of(module)
    silent = equalizer(program, samples=[(torch.zeros(2, 3, 16, 16),)])
    assert [why for _, why in near_misses(silent, program)] == ["no factor leaves less than 0.9 of the rounding error"]
    assert list(EqualizeRanges().find(program)) == []


def test_a_linear_through_a_rectifier_is_equalized() -> None:
    program = program_of(Two(nn.ReLU()))
    checked = check_pass(equalizer(program), program, expect_changes=1)
    assert quantized_sqnr(checked.after) > quantized_sqnr(program) + 6.0
