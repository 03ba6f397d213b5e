"""fold-casts: which casts go, that nothing changes by it, and which stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from vlexport.ir.quant_ops import CHOOSE_QPARAMS, DEQUANTIZE, E4M3, LOOK_UP, QUANTIZE
from vlexport.passes.fold_casts import FoldCasts

HALF = torch.float16
SCALE = float(torch.tensor(0.0213).half())


class Rounded(nn.Module):
    """Half values that are rounded, read in half and in float32; and a stored weight."""

    def __init__(self, scale: float = SCALE, kind: torch.dtype = torch.int8, *, odd: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.zeros(()).to(kind))
        self.register_buffer("steps", torch.randint(-127, 128, (4, 8), generator=draw).to(kind))
        self.register_buffer("scales", (torch.rand(4, generator=draw) + 0.01).half().float() * odd)
        self.register_buffer("zeros", torch.zeros(4).to(kind))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.to(HALF) * 3.0
        back = DEQUANTIZE(QUANTIZE(half.to(torch.float32), self.scale, self.zero), self.scale, self.zero)
        weight = DEQUANTIZE(self.steps, self.scales, self.zeros, 0).to(HALF)
        return nn.functional.linear(back.to(HALF), weight).to(torch.float32), back * 2.0


def example() -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def test_casts_go_when_scales_are_numbers_of_half() -> None:
    checked = check_pass(FoldCasts(), Rounded(), example(), golden="fold_casts", expect_changes=3)
    assert [c.what for c in checked.changes].count("dequantize → cast without the cast") == 2
    assert not checked.near_misses


def test_float8_is_read_in_half_when_it_is_dequantized() -> None:
    check_pass(FoldCasts(), Rounded(kind=E4M3), example(), expect_changes=3)


@pytest.mark.parametrize("scale", [0.0213, 1e-9])
def test_cast_stays_when_half_does_not_hold_the_scale(scale: float) -> None:
    found = near_misses(FoldCasts(), captured(Rounded(scale, odd=1.0001), example()))
    assert [reason for _, reason in found] == ["its scale is no number of float16"] * 3


@pytest.mark.parametrize("groups", [1, 2])
def test_cast_of_what_is_looked_up_goes_whatever_the_tables_hold(groups: int) -> None:
    class LookedUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            draw = torch.Generator().manual_seed(0)
            self.register_buffer("places", torch.randint(0, 16, (4, 8), generator=draw).to(torch.uint8))
            self.register_buffer("tables", torch.randn(groups, 16, generator=draw))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.to(HALF), LOOK_UP(self.places, self.tables).to(HALF))

    checked = check_pass(FoldCasts(), LookedUp(), example(), expect_changes=1)
    assert [c.what for c in checked.changes] == ["look_up → cast without the cast"]


def test_cast_stays_when_the_scale_is_found_at_run_time() -> None:
    class AtRunTime(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale, point = CHOOSE_QPARAMS(x)
            return DEQUANTIZE(QUANTIZE(x, scale, point), scale, point).to(HALF)

    found = near_misses(FoldCasts(), captured(AtRunTime(), example()))
    assert [reason for _, reason in found] == ["its scale is computed, not stored"]


def test_cast_stays_when_a_bias_is_dequantized() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.tensor([3, -4], dtype=torch.int32))
            self.register_buffer("s", torch.tensor([0.5, 0.25]))
            self.register_buffer("z", torch.zeros(2, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return x.to(HALF)[:, :2] + DEQUANTIZE(self.b, self.s, self.z, 0).to(HALF)

    found = near_misses(FoldCasts(), captured(Bias(), example()))
    assert [reason for _, reason in found] == ["a bias is rounded at the product of two scales"]


def test_nothing_is_said_when_a_cast_makes_no_half() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale, zero = torch.tensor(0.5), torch.tensor(0, dtype=torch.int8)
            return DEQUANTIZE(QUANTIZE(x, scale, zero), scale, zero).to(torch.float64)

    assert list(FoldCasts().find(captured(Wide(), example()))) == []


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-14, 100.0), st.integers(0, 2**31), st.sampled_from([torch.int8, E4M3]))
def test_rounding_in_half_is_that_in_float32_whatever_the_scale(scale: float, seed: int, kind: torch.dtype) -> None:
    """The equation of the pass, on the operators themselves."""
    half = torch.tensor(scale).half()
    x = (torch.randn(64, generator=torch.Generator().manual_seed(seed)) * scale * 50).half()
    zero = torch.zeros(()).to(kind)
    wide = QUANTIZE(x.float(), half.float(), zero)
    assert torch.equal(QUANTIZE(x, half, zero).float(), wide.float())
    assert torch.equal(DEQUANTIZE(wide, half, zero), DEQUANTIZE(wide, half.float(), zero).half())
