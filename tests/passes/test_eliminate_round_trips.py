"""eliminate-round-trips: what may be crossed, what may not and why, and that nothing moves for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from tests.passes.test_merge_layout import IMAGE, calls, canonical
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.eliminate_round_trips import COPY_LIMIT, EliminateRoundTrips

F = torch.nn.functional


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[2], 6, 6)


def wide(x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, torch.full((5, 6), 0.5), torch.full((5,), 0.25))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: first(F.gelu(last(x))), ["gelu"]),
        (lambda x: first(F.gelu(last(x)).softmax(-1)), ["gelu", "softmax"]),
        (lambda x: last(x).mean((1, 2)), ["mean"]),
        (lambda x: first((lambda y: y * y.mean((1, 2), True))(last(x))), ["mean", "mul"]),
        (lambda x: F.gelu(last(x)).permute(0, 2, 1, 3), ["gelu", "permute"]),
        (lambda x: last(x) + last(x.tanh()), ["tanh", "add", "permute"]),
        (lambda x: first(torch.cat([last(x), last(x.tanh())], 3)), ["tanh", "cat"]),
        (lambda x: torch.cat([p.permute(0, 1, 3, 2) for p in x.chunk(2, 2)], 2),
         ["chunk", "getitem", "getitem", "cat", "permute"]),
        (lambda x: torch.stack([p.mT * k for k, p in enumerate(x.chunk(2, 2))]),
         ["permute", "chunk", "getitem", "getitem", "mul", "mul", "stack"]),
        (lambda x: F.layer_norm(x.reshape(-1, 24, 6), [6]).reshape(-1, 4, 6, 6), ["layer_norm"]),
        (lambda x: (lambda y: y + F.gelu(y))(x.reshape(-1, 24, 6)).sum(2).reshape(-1, 4, 6), ["gelu", "add", "sum"]),
        (lambda x: image(F.layer_norm(tokens(x), [4])), ["permute", "layer_norm", "permute"]),
        (lambda x: last(x).narrow(3, 1, 2).permute(0, 3, 2, 1), ["slice", "permute"]),
        (lambda x: first(F.silu(last(x)).clamp(-1, 1) ** 2), ["silu", "clamp", "pow"]),
    ],
)  # fmt: skip
def test_layout_operators_go_when_they_meet(function: Callable[[Tensor], Tensor], left: list[str]) -> None:
    checked = check_pass(EliminateRoundTrips(), canonical(function))
    found = ["slice" if n == "narrow" else n for n in calls(checked.after)]
    assert found == left
    assert all(change.saved_nodes > 0 for change in checked.changes)
    assert cost(checked.after).macs == cost(checked.before).macs


class Parameters(nn.Module):
    """``function(x, …)`` with stored tensors of the given shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(3)
        self.stored = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, x: Tensor) -> Any:
        return self.function(torch.relu(x), *self.stored)


@pytest.mark.parametrize(
    ("shape", "moved"),
    [
        ((4,), (4, 1, 1)),
        ((6, 1), (1, 6)),
        ((1, 6, 6, 4), (1, 4, 6, 6)),
        ((), ()),
        ((1, 1), (1, 1)),
        ((6, 4), (4, 1, 6)),
    ],
)
def test_stored_operand_is_brought_into_the_other_layout_when_it_is_broadcast(
    shape: tuple[int, ...], moved: tuple[int, ...]
) -> None:
    program = captured(Parameters(lambda x, b: first(last(x) + b), shape), IMAGE)
    after = check_pass(EliminateRoundTrips(), program, expect_changes=1).after
    assert [tuple(t.shape) for t in after.used_tensors().values()] == [moved]
    assert cost(after).parameters == cost(program).parameters


def test_stored_operand_stays_one_tensor_when_it_lies_along_the_last_axis() -> None:
    program = captured(Parameters(lambda x, b: (x.reshape(-1, 24, 6) + b).reshape(-1, 4, 6, 6), (6,)), IMAGE)
    after = check_pass(EliminateRoundTrips(), program, expect_changes=1).after
    assert list(after.used_tensors()) == list(program.used_tensors())


def test_large_stored_tensor_is_not_stored_twice_when_others_read_it() -> None:
    side = 72
    x = torch.randn(2, 1, side, side)
    function = lambda x, b: (first(last(x) + b), b * x.mean())  # noqa: E731
    program = captured(Parameters(function, (side, side, 1)), x)
    assert side * side > COPY_LIMIT
    program = captured(Parameters(lambda x, b: ((x.mT + b).mT, b * x.mean()), (side, side)), x)
    Canonicalize().run(program)
    assert near_misses(EliminateRoundTrips(), program)[0][1] == (
        "a large stored tensor that others read would be stored a second time"
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: first(F.layer_norm(last(x), [4])), "the layer_norm needs its axis last"),
        (lambda x: F.conv2d(x.mT, torch.ones(4, 4, 1, 1)).mT, "the conv2d needs its axes where they are"),
        (lambda x: x.reshape(-1, 24, 6).softmax(1).reshape(-1, 4, 6, 6),
         "the softmax works along axis 1, which is no whole axis in the other layout"),
        (lambda x: first(F.linear(last(x), torch.ones(4, 4))), "the linear needs its axis last"),
        (lambda x: x.reshape(-1, 24, 6).cumsum(1).reshape(-1, 4, 6, 6), "the cumsum needs its axes where they are"),
        (lambda x: first(torch.cat([x.new_zeros(0), last(x)], 1)), "the cat is given a tensor without elements"),
        (lambda x: F.gelu(x.reshape(-1, 2, 2, 3, 2, 6).permute(0, 2, 1, 3, 4, 5).flatten(1, 2))
                    .reshape(-1, 2, 2, 3, 2, 6), None),
        (lambda x: (x.reshape(-1, 24, 6) + torch.ones(24, 1)).reshape(-1, 4, 6, 6), None),
        (lambda x: (lambda y: (first(y), y + 1, y.sum(1)))(F.gelu(last(x))), None),
        (lambda x: F.gelu(last(x)), None),
        (lambda x: last(x).softmax(1).softmax(2), None),
    ],
)  # fmt: skip
def test_layout_operators_stay_when_none_would_go(function: Callable[[Tensor], Any], reason: str | None) -> None:
    program = canonical(function)
    if reason is None:
        checked = check_pass(EliminateRoundTrips(), program)
        assert all(change.saved_nodes > 0 for change in checked.changes)
    else:
        assert [r for _, r in near_misses(EliminateRoundTrips(), program)] == [reason]


def test_text_is_golden_when_a_block_works_on_tokens_between_images() -> None:
    class Block(nn.Module):
        """Norm and MLP on flat tokens, as Swin has them, and an image before and behind."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x).flatten(1, 2)
            y = y + self.scale * self.down(F.gelu(self.up(self.norm(y))))
            return first(torch.sigmoid(last(y.unflatten(1, (4, 6)))) * self.scale[:4])

    torch.manual_seed(0)
    program = captured(Block(), IMAGE)
    Canonicalize().run(program)
    check_pass(EliminateRoundTrips(), program, golden="eliminate_round_trips")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=2, including=("round trip", "permute")))
def test_values_are_equal_and_there_are_fewer_calls_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(EliminateRoundTrips(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert all(change.saved_nodes > 0 for change in checked.changes)
    assert cost(checked.after).macs == cost(checked.before).macs
