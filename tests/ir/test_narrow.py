"""Narrowing dims: the numbers stay, sizes become constants, nothing of the input Program changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.artifact import DimRange
from vlexport.ir.exported import exported_from_program
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint
from vlexport.passes.pipeline import verify

ONE = DimRange(min=1, max=1, opt=1)


class Tokens(nn.Module):
    """Sizes of both dims are read, multiplied and expanded: what narrowing must find."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cls, self.head = nn.Embedding(7, 4), nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        batch, length = ids.shape
        tokens = torch.cat([self.cls.expand(batch, -1, -1), self.table(ids)], 1)
        flat = self.head(tokens).reshape(batch * (length + 1), 3)
        return {"flat": flat, "first": tokens[:, 0] + torch.arange(length).sum()}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return captured(Tokens(), torch.randint(0, 7, (2, 5)), dynamic={"ids": {0: ("batch", 1, 8), 1: ("length", 2, 16)}})


def symbols(program: Program) -> int:
    values = [n.meta.get("val") for n in program.graph.nodes]
    return sum(isinstance(s, torch.SymInt) for v in values if isinstance(v, Tensor) for s in v.shape)


def same(a: Program, b: Program, ids: Tensor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.run(ids), b.run(ids), strict=True))


def test_no_symbol_is_left_when_every_dim_is_fixed(program: Program) -> None:
    before = fingerprint(program)
    found = narrowed(program, {"batch": ONE, "length": DimRange(min=6, max=6, opt=6)})
    verify(found, made_by="narrowing")
    assert symbols(found) == 0
    assert not found.calls("aten.sym_size.int")
    assert found.ranges == {}
    assert found.signature.dims == {}
    assert [s.shape for s in found.signature.inputs] == [(1, 6)]
    assert [s.shape for s in found.signature.outputs] == [(7, 3), (1, 4)]
    assert found.example[0].shape == (1, 6)
    assert same(program, found, torch.randint(0, 7, (1, 6), generator=torch.Generator().manual_seed(1)))
    assert fingerprint(program) == before
    assert exported_from_program(found).range_constraints == {}


def test_other_dim_stays_dynamic_when_one_is_fixed(program: Program) -> None:
    found = narrowed(program, {"batch": ONE})
    verify(found, made_by="narrowing")
    assert list(found.signature.dims) == ["length"]
    assert found.signature.inputs[0].shape == (1, "length")
    assert len(found.ranges) == 1
    for length in (2, 5, 16):
        assert same(program, found, torch.randint(0, 7, (1, length)))


def test_range_is_smaller_and_graph_the_same_when_a_dim_is_restricted(program: Program) -> None:
    wanted = DimRange(min=3, max=4, opt=3)
    found = narrowed(program, {"batch": wanted})
    assert [n.target for n in found.calls()] == [n.target for n in program.calls()]
    assert symbols(found) == symbols(program)
    assert same(program, found, torch.randint(0, 7, (4, 5)))
    assert found.signature.dims["batch"] == wanted
    assert found.example[0].shape == (3, 5)
    limits: Any = next(r for s, r in found.ranges.items() if found.symbol_names()[s] == "batch")
    assert (int(limits.lower), int(limits.upper)) == (3, 4)
    assert program.signature.dims["batch"] == DimRange(min=1, max=8, opt=program.signature.dims["batch"].opt)


def test_example_is_repeated_when_the_size_is_larger(program: Program) -> None:
    found = narrowed(program, {"batch": DimRange(min=5, max=5, opt=5)})
    assert torch.equal(found.example[0], program.example[0][[0, 1, 0, 1, 0]])
    assert same(program, found, found.example[0])


def test_graph_can_be_traced_on_when_the_data_decides_a_size_behind_the_narrowed_one() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x.sum(-1) > 0].sum(0)

    whole = captured(Positive(), torch.randn(2, 5, 4))
    found = narrowed(whole, {"batch": ONE})
    traced = exported_from_program(found).run_decompositions({})  # as every exporter does
    x = torch.randn(1, 5, 4)
    torch.testing.assert_close(traced.module()(x)[0], whole.run(x)[0])
