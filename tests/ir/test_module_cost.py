"""Rows by module add up to the whole, whatever the Program."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir.cost import cost
from vlexport.ir.module_cost import ModuleCost, cost_by_module


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Stages(nn.Module):
    """Two stages that share their second layer, and a table that lies in no module."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = Stage(), Stage()
        self.tail.second = self.body.second
        self.table = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x)) + self.table


PATHS = ("", "a", "a.b", "a.c", "b.a.d", "b.a")
PROGRAM = captured(Stages(), torch.randn(3, 4), dynamic=False)


@settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(
    st.lists(st.sampled_from(PATHS), min_size=len(PROGRAM.calls()), max_size=len(PROGRAM.calls())), st.integers(1, 3)
)
def test_rows_add_up_to_the_whole_when_modules_are_random(paths: list[str], depth: int) -> None:
    program = PROGRAM.copy()
    for node, path in zip(program.calls(), paths, strict=True):
        record = node.meta["custom"]["vlexport"]
        node.meta["custom"] = {"vlexport": {**record, "path": path}}
    whole, rows = cost(program), cost_by_module(program, depth=depth)
    assert set(rows) <= {".".join(path.split(".")[:depth]) for path in PATHS}
    assert sum(row.macs for row in rows.values()) == whole.macs
    assert sum(row.parameters for row in rows.values()) == whole.parameters
    assert sum(row.size_bytes for row in rows.values()) == whole.size_bytes
    assert sum(row.calls for row in rows.values()) == len(program.calls())


def test_shared_tensor_counts_for_the_first_module_that_reads_it() -> None:
    program = captured(Stages(), torch.randn(3, 4), dynamic=False)
    rows = cost_by_module(program)
    assert list(rows) == ["body", "tail", ""]
    assert rows["body"] == ModuleCost(calls=3, macs=3 * 64, parameters=76, size_bytes=304)
    assert (rows["tail"].macs, rows["tail"].parameters) == (3 * 64, 40), "the second layer is the body's"
    assert (rows[""].macs, rows[""].parameters) == (0, 4)
    deeper = cost_by_module(program, depth=2)
    assert (deeper["body.first"].macs, deeper["tail"].calls) == (96, 1), "the relu lies in the stage itself"
    assert cost_by_module(captured(Stages(), torch.randn(3, 4)), dims={"batch": 5})["body"].macs == 5 * 64
