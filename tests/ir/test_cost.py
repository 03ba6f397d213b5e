"""MACs against numbers worked out by hand, and against published ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.cost import cost, saving
from vlexport.ir.program import Program


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.parametrize(
    ("model", "inputs", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), torch.ones(1, 3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), torch.ones(1, 3, 9, 9), 4 * 4 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), torch.ones(1, 8, 6, 6), 4 * 4 * 8 * 9),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same"), torch.ones(1, 4, 5, 5), 5 * 5 * 6 * 2 * 9),
        (nn.Conv1d(3, 4, 5), torch.ones(1, 3, 9), 5 * 4 * 3 * 5),
        (nn.Conv3d(2, 3, 2, padding="same"), torch.ones(1, 2, 4, 4, 4), 64 * 3 * 2 * 8),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), torch.ones(1, 3, 5, 5), 25 * 3 * 8 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.ones(1, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(7, 5), torch.ones(1, 7), 35),
        (nn.Linear(7, 5), torch.ones(1, 11, 7), 11 * 35),
        (Product(), (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 5)), 2 * 3 * 4 * 5),
        (Attention(), (torch.ones(1, 2, 6, 4), torch.ones(1, 2, 9, 4), torch.ones(1, 2, 9, 8)), 2 * 6 * 9 * (4 + 8)),
        (nn.LayerNorm(5), torch.ones(1, 5), 0),
        (nn.Sequential(nn.ReLU(), nn.Softmax(-1), nn.MaxPool2d(2)), torch.ones(1, 3, 4, 4), 0),
    ],
)
def test_macs_equal_the_worked_out_number_when_one_layer(model: nn.Module, inputs: Any, macs: int) -> None:
    program = captured(model, inputs)
    assert program.signature.dims, "counted at a symbolic batch"
    assert cost(program).macs == macs
    assert cost(program, {"batch": 3}).macs == 3 * macs
    assert cost(program).opaque == ()


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [("resnet18", 1.82e9, 11.69e6), ("deit_tiny_patch16_224", 1.26e9, 5.72e6)],
)
def test_macs_and_parameters_are_the_published_ones_when_a_known_model(
    name: str, macs: float, parameters: float, zoo: Callable[[str], Program]
) -> None:
    found = cost(zoo(name))
    assert found.macs == pytest.approx(macs, rel=0.02)
    # batch norm's running statistics are stored tensors too: 9600 in resnet18
    assert found.parameters == pytest.approx(parameters, rel=0.002)
    assert found.size_bytes == 4 * found.parameters
    assert found.opaque == ()


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        ("b i j, b j k", [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 6 * 5),
        ("...ij,jk->...ik", [(2, 7, 3, 4), (4, 5)], 2 * 7 * 3 * 4 * 5),
        ("...i,...i->...", [(2, 1, 3), (7, 3)], 2 * 7 * 3),
        ("bi,ij,j->b", [(2, 3), (3, 4), (4,)], 2 * 3 * 4),
        ("ii,ij->j", [(3, 3), (3, 4)], 3 * 4),
        ("bij->bji", [(2, 3, 4)], 0),
        ("bij->b", [(2, 3, 4)], 0),
    ],
)
def test_macs_of_einsum_are_the_product_of_all_index_sizes_when_several_operands(
    equation: str, shapes: list[tuple[int, ...]], macs: int
) -> None:
    program = captured(Einsum(equation), tuple(torch.randn(s) for s in shapes), dynamic=False)
    assert [str(n.target) for n in program.calls()] == ["aten.einsum.default"]
    assert cost(program).macs == macs


def test_saving_is_what_the_erased_nodes_cost_when_some_of_them_are_shared() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.own = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("ids", torch.tensor([1, 0]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.shared(x)
            return y, self.own(y)[:, self.ids]

    program = captured(Branch(), torch.randn(1, 4))
    indexed = program.results[1]
    saved = saving(program, indexed)
    assert (saved.macs, saved.parameters) == (8, 10), "the shared linear stays, integers do not count"
    before, calls = cost(program), len(program.calls())
    program.output.args = ((program.results[0],),)
    program.erase_dead(indexed)
    after = cost(program)
    assert calls - len(program.calls()) == saved.calls
    assert (before.macs - after.macs, before.parameters - after.parameters) == (saved.macs, saved.parameters)


def test_opaque_operators_are_named_and_not_guessed_when_present() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x * 2)

    found = cost(captured(Opaque(), torch.randn(1, 3, 4), dynamic=False))
    assert found.macs == 0
    assert found.opaque, "its work is unknown and said to be"


def test_parameters_leave_out_integers_and_bytes_count_them() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.register_buffer("ids", torch.arange(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(self.ids)

    found = cost(captured(Positions(), torch.randn(1, 3, 4)))
    assert (found.parameters, found.size_bytes) == (20, 20 * 4 + 3 * 8)
