"""Regions that torch wraps for a mode are plain calls in a Program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlexport.core.errors import CaptureError
from vlexport.frontends.capture import capture
from vlexport.ir.text import text


class Regions(nn.Module):
    """A region in a region, two results of one region, an in-place operator inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            with torch.autocast(device_type=x.device.type, enabled=False):
                first = self.linear(x.float())
                second = first + 1
            third = torch.tanh(first).relu_()
        return second * third


class Returned(nn.Module):
    """A region whose value is an output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            doubled = x * 2
        return doubled, x + 1


class Autocast(nn.Module):
    """Runs in another precision than its weights have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).float()


def test_capture_inlines_when_forward_nests_modes() -> None:
    torch.manual_seed(0)
    program = capture(Regions().eval(), torch.randn(1, 4)).program
    shown = text(program)
    assert "wrap_with" not in shown
    assert [line.split("= ")[1].split("(")[0] for line in shown.splitlines()[1:-1]] == [
        "to.dtype", "linear", "add.Tensor", "tanh", "relu", "mul.Tensor",
    ]  # fmt: skip


def test_capture_keeps_outputs_when_a_region_makes_one() -> None:
    program = capture(Returned().eval(), torch.randn(2, 3)).program
    x = torch.randn(3, 3)
    doubled, plus = program.run(x)
    assert torch.equal(doubled, x * 2)
    assert torch.equal(plus, x + 1)


def test_capture_refuses_when_forward_switches_autocast_on() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Autocast().eval(), torch.randn(1, 4))
    assert caught.value.code == "VLX0303"
    assert caught.value.message.startswith("forward switches autocast on")


class Moves(nn.Module):
    """Moves and casts, as models do that follow their input's device."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(4).to(x.device)
        return x + table.to(device=x.device, dtype=x.dtype) + table.to(x)


def test_capture_leaves_casts_only_when_forward_moves_tensors() -> None:
    program = capture(Moves().eval(), torch.randn(1, 4)).program
    shown = text(program)
    assert "to.device" not in shown
    assert "to.other" not in shown
    x = torch.randn(3, 4)
    assert torch.equal(program.run(x)[0], Moves()(x))
