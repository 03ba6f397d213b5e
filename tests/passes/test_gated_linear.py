"""Gated linear units: which products are some, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.gated_linear import GatedLinear, gated_linear
from vlexport.passes.match import Failed
from vlexport.passes.raise_activations import RaiseActivations


class Mlp(nn.Module):
    """A function of a value and some linears."""

    def __init__(self, function: Callable[[Mlp, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gate, self.up, self.both = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(4, 12)
        self.one, self.conv = nn.Linear(4, 1), nn.Conv1d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def found(function: Callable[[Mlp, Tensor], Tensor]) -> tuple[Program, list[GatedLinear | Failed]]:
    program = captured(Mlp(function), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))
    Canonicalize().run(program)
    RaiseActivations().run(program)
    last: Node = program.results[0]
    return program, [gated_linear(program, last)]


def quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def by_chunk(m: Mlp, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, -1)
    return F.silu(gate) * up


def by_split(m: Mlp, x: Tensor) -> Tensor:
    up, gate = m.both(x).split([6, 6], dim=2)
    return up * F.gelu(gate, approximate="tanh")


def by_slice(m: Mlp, x: Tensor) -> Tensor:
    whole = m.both(x)
    return whole[..., -6:] * F.gelu(whole[..., :6])


UNITS: dict[str, tuple[Callable[[Mlp, Tensor], Tensor], str, tuple[int, int], tuple[int, int]]] = {
    "SwiGLU": (lambda m, x: F.silu(m.gate(x)) * m.up(x), "silu", (0, 6), (0, 6)),
    "SwiGLU by hand": (lambda m, x: m.up(x) * ((g := m.gate(x)) * torch.sigmoid(g)), "silu", (0, 6), (0, 6)),
    "ReGLU": (lambda m, x: m.up(x) * F.relu(m.gate(x)), "relu", (0, 6), (0, 6)),
    "quick": (lambda m, x: quick(m.gate(x)) * m.up(x), "quick gelu", (0, 6), (0, 6)),
    "chunk": (by_chunk, "silu", (0, 6), (6, 12)),
    "split": (by_split, "gelu tanh", (6, 12), (0, 6)),
    "slice": (by_slice, "gelu", (0, 6), (6, 12)),
    "glu": (lambda m, x: F.glu(m.both(x)), "sigmoid", (6, 12), (0, 6)),
    "glu of a convolution": (lambda m, x: F.glu(m.conv(x), 1), "sigmoid", (4, 8), (0, 4)),
}


@pytest.mark.parametrize("name", UNITS)
def test_unit_is_seen_when_it_is_spelled(name: str) -> None:
    function, activation, gate, up = UNITS[name]
    program, [unit] = found(function)
    assert isinstance(unit, GatedLinear)
    assert (unit.activation, (unit.gate.start, unit.gate.stop), (unit.up.start, unit.up.stop)) == (activation, gate, up)
    assert unit.is_one_linear == (gate != up)
    assert unit.nodes[-1] is program.results[0]
    linears = {unit.gate.producer, unit.up.producer}
    assert set(unit.nodes) | linears == set(program.calls()), "all calls but the linears"


def test_parts_are_the_rows_of_the_weight_when_one_linear_makes_both() -> None:
    program, [unit] = found(by_split)
    assert isinstance(unit, GatedLinear)
    weight, bias = (program.tensor_of(a) for a in unit.gate.producer.args[1:3])
    assert weight is not None
    assert bias is not None
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    gate, up = (
        F.linear(x, weight[part.start : part.stop], bias[part.start : part.stop]) for part in (unit.gate, unit.up)
    )
    torch.testing.assert_close(up * F.gelu(gate, approximate="tanh"), program.run(x)[0])


OTHERS: dict[str, tuple[Callable[[Mlp, Tensor], Tensor], str]] = {
    "no activation": (lambda m, x: m.gate(x) * m.up(x), "neither factor is an activation"),
    "no product": (lambda m, x: F.silu(m.gate(x)) + m.up(x), "it is add, no product"),
    "no linear": (lambda m, x: F.silu(m.gate(x)) * x.mean(-1, keepdim=True), "what it multiplies is made by no linear"),
    "gate of no linear": (
        lambda m, x: F.silu(x.repeat(1, 1, 3)[..., :6]) * m.up(x),
        "what the activation is of is made",
    ),
    "other values": (lambda m, x: F.silu(m.gate(x)) * m.up(x + 1), "the two linears read different values"),
    "broadcast": (lambda m, x: F.silu(m.gate(x)) * m.one(x), "one of them is broadcast over the other"),
    "another axis": (lambda m, x: F.glu(m.conv(x), -1), "what it halves is made by no linear or convolution"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_reason_is_given_when_it_is_none(name: str) -> None:
    function, reason = OTHERS[name]
    _, [unit] = found(function)
    assert isinstance(unit, Failed)
    assert unit.reason.startswith(reason)
