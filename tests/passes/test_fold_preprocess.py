"""fold-preprocess: what goes into the first convolution, what its zero padding keeps out, and that values stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses, randomize
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.fold_preprocess import FoldPreprocess
from vlexport.passes.pipeline import run_pipeline


class Net(nn.Module):
    """ImageNet's mean and std as buffers, and convolutions; what ``forward`` does with them is the case."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1))
        self.patch = nn.Conv2d(3, 5, 2, stride=2)
        self.bare = nn.Conv2d(3, 5, 2, stride=2, bias=False)
        self.padded = nn.Conv2d(3, 5, 3, padding=1)
        self.same, self.valid = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding="valid")
        self.depthwise = nn.Conv2d(3, 6, 2, groups=3)
        self.tied = nn.Conv2d(3, 3, 1)
        self.case = forward

    def forward(self, image: Tensor) -> Tensor:
        return self.case(self, image)

    def normal(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 6, 6), generator=torch.Generator().manual_seed(1))


def ready(forward: Callable[[Net, Tensor], Tensor], *shape: int) -> Program:
    torch.manual_seed(0)
    program = captured(randomize(Net(forward)), image(*shape))
    return run_pipeline(program, [Canonicalize(), FoldConstants()], gate=None)[0]


FOLDED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "mean and std": lambda n, x: n.patch(n.normal(x)),
    "no bias": lambda n, x: n.bare(n.normal(x)),
    "a shift alone": lambda n, x: n.patch(x - n.mean),
    "a factor alone, with padding": lambda n, x: n.padded(x / n.std),
    "numbers": lambda n, x: n.patch(x * 2.0 - 1.0),
    "subtracted from": lambda n, x: n.patch(n.mean - x),
    "subtracted from a number": lambda n, x: n.patch(1.0 - n.normal(x)),
    "a scaled shift": lambda n, x: n.patch(torch.add(x, n.mean, alpha=-2) * n.std),
    "no padding by name": lambda n, x: n.valid(n.normal(x)),
    "groups": lambda n, x: n.depthwise(n.normal(x)),
    "two convolutions": lambda n, x: n.patch(y := n.normal(x)) + n.bare(y),
    "channels last": lambda n, x: n.patch(n.normal(x.permute(0, 3, 1, 2))),
    "a cast": lambda n, x: n.patch(n.normal(x.to(torch.float64).to(torch.float32))),
    "padded before": lambda n, x: n.patch(n.normal(F.pad(x, (1, 1, 1, 1)))),
}


@pytest.mark.parametrize("case", FOLDED)
def test_no_arithmetic_is_left_when_it_is(case: str) -> None:
    program = ready(FOLDED[case], *((2, 6, 6, 3) if case == "channels last" else ()))
    checked = check_pass(FoldPreprocess(), program, expect_changes=1)
    left = checked.after.calls("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor")
    assert len(left) == (case == "two convolutions"), "the sum behind them"
    assert checked.changes[0].what == "arithmetic at an input folded into conv2d"
    assert not checked.near_misses


@pytest.mark.parametrize("name", ["padded", "same"])
def test_shift_stays_in_front_when_the_convolution_pads(name: str) -> None:
    """Exact at the border, too: probes compare every place."""
    checked = check_pass(FoldPreprocess(), ready(lambda n, x: getattr(n, name)(n.normal(x))), expect_changes=1)
    assert len(checked.after.calls()) == 2
    assert checked.changes[0].what == "factor at an input folded into conv2d"
    assert checked.changes[0].saved_nodes == 1
    reasons = [miss.reason for miss in checked.near_misses]
    assert reasons == ["the convolution pads with zeros, where the shift is not zero"]


PADS = "the convolution pads with zeros, where the shift is not zero"
STAYS: dict[str, tuple[Callable[[Net, Tensor], Tensor], list[tuple[str, str]]]] = {
    "a shift alone meets padding": (lambda n, x: n.padded(x - n.mean), [("sub", PADS)]),
    "it is not at an input": (lambda n, x: n.patch(n.normal(x.tanh())), []),
    "its numbers are of rows": (lambda n, x: n.patch(x * n.bare.weight.flatten()[:6].reshape(6, 1)), []),
    "something else reads it": (
        lambda n, x: n.tied(y := x * n.std) + y, [("mul", "add reads it, which is no convolution")],
    ),
    "a weight is computed": (
        lambda n, x: F.conv2d(n.normal(x), n.patch.weight * x.mean()),
        [("div", "the conv2d's weight is computed, not stored")],
    ),
    "a weight is tied": (
        lambda n, x: n.tied(n.tied(n.normal(x)).relu()), [("div", "the conv2d's weight is used by 1 other(s)")],
    ),
    "the dtype changes": (lambda n, x: n.patch((x.double() - n.mean.double() * 2).float()), []),
    "a factor is 0 where the convolution pads": (
        lambda n, x: n.padded(x * torch.tensor([1.0, 0.0, 2.0]).reshape(3, 1, 1) + 1.0), [("add", PADS)],
    ),
    "there is none": (lambda n, x: n.patch(x), []),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_arithmetic_stays_and_says_why_when(case: str) -> None:
    forward, reasons = STAYS[case]
    program = ready(forward)
    assert near_misses(FoldPreprocess(), program) == reasons
    check_pass(FoldPreprocess(), program, expect_changes=0)


def test_arithmetic_stays_when_the_weight_would_leave_half_precision() -> None:
    program = ready(lambda n, x: n.patch(x / 1e-7))
    assert [reason for _, reason in near_misses(FoldPreprocess(), program)] == [
        "the folded weight would leave the range of half precision"
    ]


def test_text_is_golden_when_patches_are_embedded() -> None:
    check_pass(FoldPreprocess(), ready(FOLDED["mean and std"]), golden="fold_preprocess", expect_changes=1)


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=2, including=("scaled input, conv2d",)))
def test_values_are_equal_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(FoldPreprocess(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert cost(checked.after).macs == cost(checked.before).macs
    assert len(checked.after.calls()) <= len(checked.before.calls()) - len(checked.changes)
