"""The identity of a Program changes with everything that an artifact shows of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.artifact import DimRange
from vlexport.ir import provenance
from vlexport.ir.identity import program_identity
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def program() -> Program:
    torch.manual_seed(0)
    return captured(Net().eval(), torch.randn(2, 4))


def rename(made: Program) -> None:
    provenance.inherit(made.calls()[0], value_of=made.calls()[1])


def retell(made: Program) -> None:
    made.kinds["first.weight"] = "buffer"


def tie(made: Program) -> None:
    made.tensors["second.weight"] = made.tensors["first.weight"]


def turn(made: Program) -> None:
    made.tensors["first.weight"] = made.tensors["first.weight"].t().contiguous().t()


def prefer(made: Program) -> None:
    (name,) = made.signature.dims
    made.signature = made.signature.model_copy(update={"dims": {name: DimRange(min=1, opt=7)}})


def show(made: Program) -> None:
    made.example = (made.example[0] + 1,)


CHANGES: dict[str, Callable[[Program], None]] = {
    "module path": rename, "kind": retell, "tied weights": tie, "strides": turn, "preferred size": prefer,
    "example": show,
}  # fmt: skip


def test_identity_is_equal_when_captured_again_or_copied() -> None:
    assert program_identity(program()) == program_identity(program()) == program_identity(program().copy())


@pytest.mark.parametrize("change", CHANGES)
def test_identity_changes_and_the_fingerprint_does_not_when_more_than_the_values_differ(change: str) -> None:
    before, after = program(), program()
    CHANGES[change](after)
    assert fingerprint(after) == fingerprint(before)
    assert program_identity(after) != program_identity(before)


def test_identity_changes_when_a_weight_does() -> None:
    after = program()
    after.tensors["first.weight"] = after.tensors["first.weight"] * 2
    assert program_identity(after) != program_identity(program())
