"""canonicalize leaves one spelling of each idea, bit for bit the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.facts import FACTS
from vlexport.ir.program import Program
from vlexport.ir.text import text
from vlexport.passes.canonicalize import Canonicalize

SQUARE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def calls(program: Program) -> list[str]:
    """``permute.default`` and so on, in order."""
    return [str(n.target).removeprefix("aten.") for n in program.calls()]


@pytest.mark.parametrize(
    ("function", "dims"),
    [
        (lambda x: x.transpose(1, -1) * 2, [0, 3, 2, 1]),
        (lambda x: x.mT * 2, [0, 1, 3, 2]),
        (lambda x: x.swapaxes(-2, 1) * 2, [0, 2, 1, 3]),
        (lambda x: x.swapdims(2, 3) * 2, [0, 1, 3, 2]),
        (lambda x: x.movedim(1, -1) * 2, [0, 2, 3, 1]),
        (lambda x: x.movedim((1, 2), (3, 1)) * 2, [0, 2, 3, 1]),
        (lambda x: x.permute(0, -1, 1, -2) * 2, [0, 3, 1, 2]),
    ],
)
def test_axis_exchange_becomes_permute_when_spelled_otherwise(
    function: Callable[[Tensor], Tensor], dims: list[int]
) -> None:
    checked = check_pass(Canonicalize(), Lambda(function), SQUARE, expect_changes=1)
    assert calls(checked.after) == ["permute.default", "mul.Tensor"]
    assert checked.after.calls()[0].args[1] == dims


def test_t_becomes_permute_when_the_value_is_a_matrix() -> None:
    checked = check_pass(Canonicalize(), Lambda(lambda x: x.t() * 2), torch.randn(3, 5), expect_changes=1)
    assert calls(checked.after) == ["permute.default", "mul.Tensor"]


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: x.flatten(1) * 2, [-1, 48]),
        (lambda x: x.flatten(2) * 2, [-1, 3, 16]),
        (lambda x: x.view(x.shape[0], 12, 4) * 2, [-1, 12, 4]),
        (lambda x: x.reshape(x.shape[0], 6, 8) * 2, [-1, 6, 8]),
        (lambda x: x.reshape(x.shape[0] * 3, 16) * 2, [-1, 16]),
        (lambda x: x.unflatten(-1, (2, 2)) * 2, [-1, 3, 4, 2, 2]),
    ],
)
def test_shape_change_becomes_reshape_with_an_open_batch_when_one_size_is_symbolic(
    function: Callable[[Tensor], Tensor], sizes: list[int]
) -> None:
    checked = check_pass(Canonicalize(), Lambda(function), SQUARE, expect_changes=1)
    assert calls(checked.after) == ["reshape.default", "mul.Tensor"], "sizes that nobody reads any more are gone"
    assert checked.after.calls()[0].args[1] == sizes


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.flatten(2) * 2, "  %1 = reshape(x, [%0,3,-1]) -> f32[batch,3,4*height]"),
        (lambda x: x.flatten(1, 2) * 2, "  %1 = reshape(x, [%0,-1,4]) -> f32[batch,3*height,4]"),
        (lambda x: x.unflatten(1, (1, 3)) * 2, "  %1 = reshape(x, [-1,1,3,%0,4]) -> f32[batch,1,3,height,4]"),
    ],
)
def test_shape_change_becomes_reshape_when_two_sizes_are_symbolic(
    function: Callable[[Tensor], Tensor], expected: str
) -> None:
    dynamic = {"x": {0: "batch", 2: ("height", 2, 6)}}
    checked = check_pass(Canonicalize(), Lambda(function), SQUARE, dynamic=dynamic, expect_changes=1)
    assert expected in text(checked.after).splitlines()


def test_expand_as_becomes_expand_when_the_batch_is_symbolic() -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor, row: Tensor) -> Tensor:
            return row.expand_as(x) + row.mean(0, keepdim=True).expand_as(x)

    checked = check_pass(Canonicalize(), Spread(), (SQUARE, torch.randn(2, 1, 1, 4)), expect_changes=2)
    assert checked.after.calls("aten.expand.default")[0].args[1] == [-1, 3, 4, 4]
    assert calls(checked.after).count("sym_size.int") == 1, "the batch of the second is read, as its operand has none"


def test_broadcast_to_becomes_expand_when_the_batch_is_symbolic() -> None:
    net = Lambda(lambda x: x + torch.broadcast_to(x.mean(0, keepdim=True), x.shape))
    checked = check_pass(Canonicalize(), net, SQUARE, expect_changes=1)
    assert calls(checked.after) == ["sym_size.int", "mean.dim", "expand.default", "add.Tensor"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(0, 1, 2, 3) * 2,
        lambda x: x.reshape(x.shape) * 2,
        lambda x: x.squeeze(1) * 2,
        lambda x: x.to(torch.float32).to("cpu") * 2,
        lambda x: x.type_as(x) * 2,
        lambda x: x.view_as(x) * 2,
    ],
)
def test_operator_disappears_when_it_has_no_effect(function: Callable[[Tensor], Tensor]) -> None:
    checked = check_pass(Canonicalize(), Lambda(function), SQUARE)
    assert calls(checked.after) == ["mul.Tensor"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(0, 2, 3, 1) * 2,
        lambda x: x[:, :1].squeeze(1) * 2,
        lambda x: x.reshape(-1, 4) * 2,
        lambda x: (x.to(torch.int32) + 1).to(torch.float32),
        lambda x: x.unsqueeze(1) * 2,
    ],
)
def test_operator_stays_when_it_is_plain_and_has_effect(function: Callable[[Tensor], Tensor]) -> None:
    check_pass(Canonicalize(), Lambda(function), SQUARE, expect_changes=0)


def test_reshape_keeps_its_symbol_when_another_size_is_zero() -> None:
    """With an empty axis, −1 has no single meaning."""
    model = Lambda(lambda x: torch.cat([x[:, :0].reshape(x.shape[0], 0, 16).flatten(2), x.flatten(2)], 1))
    checked = check_pass(Canonicalize(), model, SQUARE)
    assert checked.after.run(SQUARE)[0].shape == (2, 3, 16)


def test_reshape_keeps_its_symbol_when_the_size_left_open_is_zero() -> None:
    model = Lambda(lambda x: torch.cat([x[:, :0].reshape(x.shape[0], -1), x.flatten(1)], 1))
    checked = check_pass(Canonicalize(), model, SQUARE)
    assert checked.after.run(SQUARE)[0].shape == (2, 48)


def test_reshape_stays_when_two_symbols_change_places() -> None:
    dynamic = {"x": {0: "batch", 2: ("height", 2, 6)}}
    model = Lambda(lambda x: x.reshape(x.shape[2], 3, x.shape[0], 4) * 2)
    checked = check_pass(Canonicalize(), model, SQUARE, dynamic=dynamic, expect_changes=0)
    assert checked.after.run(SQUARE)[0].shape == (4, 3, 2, 4)


def test_text_is_golden_when_a_vision_transformer_block_is_canonicalized() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, width = x.shape
            query, key, value = self.qkv(x).reshape(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (query @ key.transpose(-2, -1) * 0.5).softmax(dim=-1)
            return self.proj((weights @ value).transpose(1, 2).contiguous().view(batch, tokens, width))

    torch.manual_seed(0)
    check_pass(Canonicalize(), Attention(), torch.randn(1, 5, 8), golden="canonicalize")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=5, including=("permute", "flatten", "split axis", "expand", "no-op", "squeeze", "unsqueeze")))
def test_values_are_equal_and_the_program_canonical_when_it_is_random(program: Program) -> None:
    try:
        checked = check_pass(Canonicalize(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    # Without a removed `contiguous` a mean or softmax reads a permuted value, and may sum in another order.
    assert checked.record.gate.worst <= (0.0 if not program.calls("aten.contiguous.default") else 1e-6)
    assert FACTS["canonical"](checked.after)


def test_fact_canonical_is_false_when_a_second_spelling_is_left() -> None:
    program = captured(Lambda(lambda x: x.transpose(1, 2) * 2), SQUARE)
    assert not FACTS["canonical"](program)
