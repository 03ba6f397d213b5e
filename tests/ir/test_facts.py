"""Facts hold exactly when what they name is so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.facts import _SPELLINGS, FACTS
from vlexport.ir.program import Program

aten = torch.ops.aten


def program_of(function: Callable[[Tensor], Tensor], *shape: int) -> Program:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return captured(Model(), torch.randn(shape or (2, 3, 4)))


def sequence(*modules: nn.Module, shape: tuple[int, ...] = (1, 3, 4, 4)) -> Program:
    torch.manual_seed(0)
    return captured(nn.Sequential(*modules), torch.randn(shape))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(1, 2) * 2,
        lambda x: x.mT * 2,
        lambda x: x.swapaxes(1, 2) * 2,
        lambda x: x.movedim(1, 2) * 2,
        lambda x: x.flatten(1) * 2,
        lambda x: x.unflatten(-1, (2, 2)) * 2,
        lambda x: x.view_as(x) * 2,
    ],
)
def test_canonical_is_false_when_a_second_spelling_is_left(function: Callable[[Tensor], Tensor]) -> None:
    assert not FACTS["canonical"](program_of(function))


@pytest.mark.parametrize(
    "function",
    [lambda x: x * 2, lambda x: x.permute(0, 2, 1) * 2, lambda x: x.reshape(-1, 12) * 2],
)
def test_canonical_is_true_when_only_first_spellings_are_there(function: Callable[[Tensor], Tensor]) -> None:
    assert FACTS["canonical"](program_of(function))


def test_second_spellings_are_operators_of_torch_when_listed() -> None:
    for name in _SPELLINGS:
        _, packet, overload = name.split(".")
        assert isinstance(getattr(getattr(aten, packet), overload), torch._ops.OpOverload), name


def test_no_dead_calls_is_false_when_a_call_is_unread_and_true_when_it_is_gone() -> None:
    program = program_of(lambda x: x * 2)
    assert FACTS["no-dead-calls"](program)
    node = program.add_call(aten.exp.default, (program.placeholders[0],), before=program.output,
                            value_of=program.results[0])  # fmt: skip
    assert not FACTS["no-dead-calls"](program)
    program.erase_dead(node)
    assert FACTS["no-dead-calls"](program)


def test_no_dead_calls_is_true_when_only_an_assertion_is_unread() -> None:
    def selects(x: Tensor) -> Tensor:
        chosen = x[x > 0]
        torch._check(chosen.shape[0] >= 2)
        return chosen * 2

    program = program_of(selects)
    assert [n for n in program.calls() if not n.users], "the assertion is unread"
    assert FACTS["no-dead-calls"](program)


@pytest.mark.parametrize(
    ("modules", "shape", "holds"),
    [
        ((nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (1, 3, 4, 4), False),
        ((nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)), (1, 3, 4, 4), False),
        ((nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), (1, 3, 4, 4), False),
        ((nn.Linear(3, 4), nn.BatchNorm1d(4)), (1, 3), False),
        ((nn.Linear(3, 4), nn.BatchNorm1d(5)), (1, 5, 3), True),
        ((nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), (1, 3, 4, 4), True),
        ((nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), (1, 3, 4, 4), True),
        ((nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (2, 3, 4, 4), True),
    ],
)
def test_no_foldable_batch_norm_holds_when_none_follows_a_convolution_it_fits(
    modules: tuple[nn.Module, ...], shape: tuple[int, ...], holds: bool
) -> None:
    assert FACTS["no-foldable-batch-norm"](sequence(*modules, shape=shape)) is holds


def test_no_foldable_batch_norm_holds_when_the_convolution_is_read_twice_or_its_weight_is_computed() -> None:
    program = sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    conv, norm = program.calls()
    read_twice, computed = program.copy(), program.copy()

    conv, norm = read_twice.calls()
    total = read_twice.add_call(aten.add.Tensor, (norm, conv), before=read_twice.output, value_of=norm)
    read_twice.output.args = ((total,),)
    assert FACTS["no-foldable-batch-norm"](read_twice)

    conv, _ = computed.calls()
    weight = computed.add_call(aten.tanh.default, (conv.args[1],), before=conv, value_of=conv)
    conv.args = (conv.args[0], weight, *conv.args[2:])
    assert FACTS["no-foldable-batch-norm"](computed)


def test_no_foldable_batch_norm_is_false_when_operands_are_given_by_keyword() -> None:
    program = sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    conv = program.calls()[0]
    conv.kwargs = {"weight": conv.args[1], "bias": conv.args[2]}
    conv.args = conv.args[:1]
    assert not FACTS["no-foldable-batch-norm"](program)
