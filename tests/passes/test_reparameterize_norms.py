"""reparameterize: batch norms alone, where they fold, where they must not and say why, and that values stay."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses, randomize
from vlexport.ir.exported import exported_from_program
from vlexport.ir.facts import FACTS
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.reparameterize import Reparameterize


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def sequence(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter)
    return randomize(nn.Sequential(*modules))


POSITIVE = {
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), (1, 3, 8)),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), (1, 3, 8, 8)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (1, 2, 4, 4, 4)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (1, 3, 8, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (1, 4, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (1, 4, 6, 6)),
    "padding same, 1d": (nn.Conv1d(3, 4, 4, padding="same"), nn.BatchNorm1d(4), (1, 3, 8)),
    "padding same, 2d": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm2d(4), (1, 3, 6, 6)),
    "padding same, 3d": (nn.Conv3d(2, 3, 3, padding="same"), nn.BatchNorm3d(3), (1, 2, 4, 4, 4)),
    "reflect padding": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (1, 3, 6, 6)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (1, 3, 6)),
    "transposed 2d": (nn.ConvTranspose2d(3, 5, 2, stride=2, bias=False), nn.BatchNorm2d(5), (1, 3, 4, 4)),
    "transposed 2d, grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), (1, 4, 4, 4)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 3, 3, 3)),
    "linear": (nn.Linear(6, 4), nn.BatchNorm1d(4), (1, 6)),
    "not affine": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (1, 3, 8, 8)),
    "large epsilon": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.3), (1, 3, 8, 8)),
}


@pytest.mark.parametrize("case", POSITIVE)
def test_batch_norm_disappears_when_its_producer_is(case: str) -> None:
    producer, norm, shape = POSITIVE[case]
    checked = check_pass(Reparameterize(), sequence(producer, norm), image(*shape), expect_changes=1)
    assert not checked.after.calls("aten.batch_norm.default")
    assert checked.changes[0].where == ("0", "1")
    assert not checked.near_misses


def test_every_norm_is_folded_at_once_when_several_follow_each_other() -> None:
    model = sequence(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )
    checked = check_pass(Reparameterize(), model, image(1, 3, 6, 6), expect_changes=2)
    assert len(checked.after.calls()) == 3


def test_both_norms_are_folded_in_one_sweep_when_a_convolution_reads_a_norm() -> None:
    """The second convolution's input is replaced by the first fold, after both were found."""
    model = sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(2))
    checked = check_pass(Reparameterize(), model, image(1, 3, 8, 8), expect_changes=2)
    assert len(checked.after.calls()) == 2


def test_result_exports_as_a_module_when_the_unfolded_weight_is_still_stored() -> None:
    """Modules are nested by the dots in names: nothing may lie below a tensor."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.norm = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.norm(F.conv2d(x, self.kernel)).relu(), self.kernel)

    torch.manual_seed(0)
    checked = check_pass(Reparameterize(), randomize(Root()), image(1, 3, 4, 4), expect_changes=1)
    assert {"kernel", "kernel_folded.weight"} <= set(checked.after.used_tensors())
    module = exported_from_program(checked.after).module()
    assert torch.equal(module(image(2, 3, 4, 4))[0], checked.after.run(image(2, 3, 4, 4))[0])


def test_weight_and_bias_are_found_when_given_by_keyword() -> None:
    program = captured(sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), image(1, 3, 4, 4))
    conv = program.calls("aten.conv2d.default")[0]
    conv.kwargs = {"weight": conv.args[1], "bias": conv.args[2]}
    conv.args = conv.args[:1]
    assert not FACTS["no-foldable-batch-norm"](program)
    check_pass(Reparameterize(), program, expect_changes=1)


def test_each_use_gets_its_own_weight_when_a_convolution_is_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.conv(self.first(self.conv(x)).relu()))

    torch.manual_seed(0)
    checked = check_pass(Reparameterize(), randomize(Tied()), image(1, 3, 6, 6), expect_changes=2)
    weights = [checked.after.tensor_of(n.args[1]) for n in checked.after.calls("aten.conv2d.default")]
    assert weights[0] is not None
    assert weights[1] is not None
    assert not torch.equal(weights[0], weights[1])
    assert "conv.weight" not in checked.after.tensors


def test_weight_stays_for_its_other_reader_when_only_one_use_is_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(x)).relu())

    torch.manual_seed(0)
    checked = check_pass(Reparameterize(), randomize(Shared()), image(1, 3, 6, 6), expect_changes=1)
    assert "conv.weight" in checked.after.used_tensors()
    assert checked.changes[0].saved_parameters == 4 * 3 - (81 + 3), "a second weight and bias are stored"


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.relu()


class AlsoReturned(TwoReaders):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.conv(x)
        return self.norm(y), y


class ComputedWeight(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight.tanh(), self.conv.bias))


class ComputedBias(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight, self.norm.weight * 2))


class ComputedScale(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight * 2, norm.bias)


class BatchStatistics(TwoReaders):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ComputedStatistics(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(self.conv(x), norm.running_mean * 2, norm.running_var, norm.weight, norm.bias)


class TokenAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 6), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class ReshapeBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 2, 1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).reshape(-1, 8))


class NoBatchAxis(nn.Module):
    """The convolution takes one image without batch; its rows become batch norm's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class NoVariance(nn.Module):
    """One channel never varied, and nothing is added to its variance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


COMPUTED = "the convolution's weight or bias is computed, not stored"
PICTURE = (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (TwoReaders, PICTURE, "the conv2d's output is used by 1 other(s)"),
        (AlsoReturned, PICTURE, "the conv2d's output is used by 1 other(s)"),
        (ComputedWeight, PICTURE, COMPUTED),
        (ComputedBias, PICTURE, COMPUTED),
        (ComputedScale, PICTURE, "the batch norm's scale or shift is computed, not stored"),
        (ComputedStatistics, PICTURE, "the batch norm's statistics are computed, not stored"),
        (BatchStatistics, (2, 3, 4, 4), "the batch norm uses batch statistics (train mode)"),
        (TokenAxis, (1, 4, 3), "the linear's output has a token axis where batch norm expects channels"),
        (ReshapeBetween, (1, 3, 2, 2), "its operand is made by reshape.default, not by a convolution or linear"),
        (First, PICTURE, "its operand is made by placeholder, not by a convolution or linear"),
        (
            NoBatchAxis,
            (3, 4, 4),
            "the convolution's input has no batch axis, so batch norm takes another axis for its channels",
        ),
    ],
)
def test_batch_norm_stays_and_says_why_when(model: type[nn.Module], shape: tuple[int, ...], reason: str) -> None:
    torch.manual_seed(0)
    program = captured(randomize(model()), image(*shape), dynamic="auto" if model is not NoBatchAxis else False)
    assert ("batch_norm", reason) in near_misses(Reparameterize(), program)
    checked = check_pass(Reparameterize(), program, expect_changes=0)
    record = next(miss for miss in checked.record.near_misses if miss.reason == reason)
    assert record.pattern in ("conv → batch_norm", "one convolution")
    assert "aten.batch_norm" in record.node
    assert "test_reparameterize_norms.py:" in record.node


def test_batch_norm_stays_when_a_channel_has_no_variance() -> None:
    """Behind its infinite factor stands an infinity of one sign; a folded weight would make a NaN of it."""
    model = randomize(NoVariance())
    model.norm.running_var[1] = 0.0  # type: ignore[union-attr,index,operator]
    program = captured(model, image(*PICTURE))
    assert near_misses(Reparameterize(), program) == [("batch_norm", "the scale or shift is not finite")]


def test_text_is_golden_when_a_residual_block_is_folded() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
            self.short, self.norm3 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
            y += self.norm3(self.short(x))
            return F.relu_(y)

    torch.manual_seed(0)
    check_pass(Reparameterize(), randomize(Block()), image(1, 3, 6, 6), golden="reparameterize_norms", expect_changes=3)


def test_origins_and_paths_of_both_are_kept_when_folded() -> None:
    from vlexport.ir import provenance

    checked = check_pass(Reparameterize(), sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), image(1, 3, 4, 4))
    node = checked.after.calls()[0]
    assert provenance.origins(node) == (0, 1)
    assert provenance.module_path(node) == "0"


def test_scale_is_computed_in_float64_when_weights_are_float32() -> None:
    """Folding in float32 rounds three times; in float64 once, so the result is the nearest float32 of the true one."""
    model = sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    conv, norm = model[0], model[1]  # type: ignore[index]
    checked = check_pass(Reparameterize(), model, image(1, 3, 4, 4))
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    expected = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).float()
    weight = checked.after.tensor_of(checked.after.calls()[0].args[1])
    assert weight is not None
    assert torch.equal(weight, expected)


def test_positive_cases_cover_every_producer_when_listed() -> None:
    from vlexport.ir.facts import _BEFORE_BATCH_NORM

    seen = set()
    for producer, norm, shape in POSITIVE.values():
        program = captured(nn.Sequential(producer, norm), image(*shape), dynamic=False)
        seen |= set(itertools.chain(str(n.target) for n in program.calls()))
    assert set(_BEFORE_BATCH_NORM) <= {s if s.count(".") > 1 else f"{s}.default" for s in seen}


class Tokens(nn.Module):
    """A linear over tokens whose batch norm takes them all as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


class Turned(nn.Module):
    """A batch norm over the channels of a linear, which stand last before and second behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2).relu()


class ThreeReaders(nn.Module):
    """One batch norm in front of the projections of an attention."""

    def __init__(self, *, also: bool = False, width: int = 4) -> None:
        super().__init__()
        self.norm, self.also = nn.BatchNorm2d(4), also
        self.readers = nn.ModuleList(nn.Linear(4, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (reader(tokens) for reader in self.readers)
        made: Tensor = q * k.sigmoid() + v.tanh()
        return made + tokens if self.also else made


@pytest.mark.parametrize(
    ("model", "shape", "left"), [(Tokens, (2, 5, 6), 1), (Turned, (2, 5, 6), 2), (ThreeReaders, (1, 4, 4, 4), 9)]
)
def test_norm_goes_through_reshapes_and_permutes_when_channels_stay_whole(
    model: type[nn.Module], shape: tuple[int, ...], left: int
) -> None:
    torch.manual_seed(0)
    program = captured(randomize(model()), image(*shape))
    Canonicalize().run(program)
    checked = check_pass(Reparameterize(), program, expect_changes=1)
    assert not checked.after.calls("aten.batch_norm.default")
    assert len(checked.after.calls()) == left, [n.format_node() for n in checked.after.calls()]


def test_norm_stays_and_says_why_when_one_of_its_readers_needs_it_all_the_same() -> None:
    torch.manual_seed(0)
    program = captured(randomize(ThreeReaders(also=True)), image(1, 4, 4, 4))
    Canonicalize().run(program)
    checked = check_pass(Reparameterize(), program, expect_changes=0)
    assert len(checked.after.calls("aten.batch_norm.default")) == 1


class TurnedBehindTwoReaders(nn.Module):
    """The first norm is read twice, once by way of a reshape: the second linear begins where the reshape ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 3), nn.BatchNorm1d(3)
        self.second, self.last = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.norm(self.first(x))
        again = inner.unsqueeze(1).permute(0, 2, 1).squeeze(2)
        return inner.tanh(), self.last(self.second(again))


def test_norm_is_folded_when_its_linear_reads_the_reshape_of_a_value_that_others_read() -> None:
    torch.manual_seed(0)
    checked = check_pass(Reparameterize(), captured(randomize(TurnedBehindTwoReaders()), image(2, 8)), expect_changes=2)
    assert not checked.after.calls("aten.batch_norm.default")
