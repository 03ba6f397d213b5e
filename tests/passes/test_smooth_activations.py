"""smooth-activations: what is rewritten stays the same in float and is worth more in integers; near misses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.harness import captured, check_pass, near_misses
from tests.passes.quantizing import IMAGE, SCHEMES, images, program_of, quantizer, ranges
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.methods import Method
from vlexport.core.numerics import sqnr_db
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.cast_floats import CastFloats
from vlexport.passes.projections.projection import projection_of
from vlexport.passes.quantization.migration import _weight_reach
from vlexport.passes.smooth_activations import SmoothActivations, SmoothActivationsOptions, smoothed_channels

WIDTH = 16


class Block(nn.Module):
    """A norm whose channels are unlike, an MLP, and an activation with an outlier channel."""

    def __init__(self, *, outliers: float = 50.0, other: bool = False) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.other = other
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        with torch.no_grad():
            self.norm.weight[[2, 7]] *= outliers
            self.norm.bias.normal_()
            self.up.weight[:, [2, 7]] /= outliers
            self.up.weight[5] *= outliers
            self.down.weight[:, 5] /= outliers

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(image)
        y = self.down(nn.functional.gelu(self.up(x)))
        return y + x if self.other else y


class Behind(nn.Module):
    """A norm, and something that reads it."""

    def __init__(self, *readers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.norm, self.readers = nn.LayerNorm(WIDTH), nn.Sequential(*readers)

    def forward(self, image: Tensor) -> Tensor:
        return self.readers(self.norm(image))  # type: ignore[no-any-return]


def smoother(program: Program, *, scheme: str = "static-u8s8", **options: object) -> SmoothActivations:
    table = calibrate(program, dataset(images(16, 1).numpy(), program), smoothed_channels(program), Method())
    return SmoothActivations(
        SmoothActivationsOptions.model_validate(options), scheme=SCHEMES[scheme], ranges=table.by_value(),
        samples=[(images(4, 2),)],
    )  # fmt: skip


def quantized_sqnr(program: Program) -> float:
    image = images(16, 9)
    after = program.copy()
    quantizer(program, table=ranges(program, SCHEMES["static-u8s8"])).run(after)
    return sqnr_db(after.run(image)[0].numpy(), program.run(image)[0].numpy())


@pytest.fixture(scope="module")
def block() -> Program:
    return program_of(Block())


def test_text_is_golden_and_integers_keep_ten_decibels_more(block: Program) -> None:
    checked = check_pass(smoother(block), block, golden="smooth_activations", expect_changes=2)
    assert {c.what for c in checked.changes} == {
        "a factor and shift a channel moved from layer_norm into its readers",
        "a factor a channel moved from gelu into its readers",
    }
    assert quantized_sqnr(checked.after) > quantized_sqnr(block) + 10.0


def test_no_product_and_no_shift_are_made_when_options_say_so(block: Program) -> None:
    changes, _ = smoother(block, products=False, shift=False).run(block.copy())
    assert [c.what for c in changes] == ["a factor a channel moved from layer_norm into its readers"]


def test_norm_keeps_its_own_scale_when_it_has_one_and_rms_norms_are_not_shifted() -> None:
    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.norm, self.up = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 8)
            with torch.no_grad():
                self.norm.weight[3] *= 80.0

        def forward(self, image: Tensor) -> Tensor:
            return self.up(self.norm(image))

    checked = check_pass(smoother(program := program_of(Rms())), program, expect_changes=1)
    assert [c.what for c in checked.changes] == ["a factor a channel moved from rms_norm into its readers"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Block(other=True), "the layer_norm's output is read by add"),
        (Behind(), "the layer_norm's value is an output"),
        (Behind(nn.ReLU()), "the layer_norm's output is read by relu"),
    ],
)
def test_reason_is_told_when_something_else_reads_the_norm(module: nn.Module, reason: str) -> None:
    program = program_of(module)
    assert [why for _, why in near_misses(smoother(program, products=False), program)] == [reason]


def test_reason_is_told_when_nothing_is_gained_or_quantized_or_measured(block: Program) -> None:
    program = program_of(Behind(nn.Linear(WIDTH, 4)))
    even = smoother(program)
    even.samples = [(torch.zeros(2, *IMAGE),)]
    assert [why for _, why in near_misses(even, program)] == ["no factor leaves less than 0.9 of the rounding error"]
    kept = smoother(program)
    kept.keep = ("readers",)
    assert [why for _, why in near_misses(kept, program)] == ["nothing that reads it is quantized"]
    unmeasured = smoother(program)
    unmeasured.ranges = {}
    assert [why for _, why in near_misses(unmeasured, program)] == ["the ranges of its channels were not measured"]
    assert list(SmoothActivations().find(block)) == []


def test_what_is_smoothed_is_typed_half_like_anything_else() -> None:
    program = program_of(Block())
    changes, _ = smoother(program).run(program)
    assert {each.what.split("from ")[1].split()[0] for each in changes} == {"layer_norm", "gelu"}
    CastFloats(samples=[(images(4, 2),)]).run(program)
    floats = [n for n in program.calls() if n.meta["val"].dtype is torch.float32 and not dialect.is_cast(n)]
    kept = {dialect.op_name(node) for node in floats}
    assert kept == {"aten.layer_norm.default"}, "the product that was put in is none of them"


def test_reach_of_a_grouped_convolution_is_that_of_each_group() -> None:
    conv = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        conv.weight[:] = torch.tensor([[1.0, 2.0], [3.0, 0.5], [10.0, 20.0], [5.0, 40.0]])[..., None, None]
    program = captured(conv, torch.randn(2, 4, 3, 3))
    found = _weight_reach(program, projection_of(program, program.calls("aten.conv2d.default")[0]))
    assert found.tolist() == [3.0, 2.0, 10.0, 40.0]
