"""Origins, module paths and source lines: set at capture, inherited, and free of the machine's paths."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured, randomize
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.reparameterize import Reparameterize


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y.transpose(1, 2) * 2


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + 1


def outer() -> Program:
    torch.manual_seed(0)
    return captured(randomize(Outer()), torch.randn(1, 3, 3, 3))


def test_nodes_carry_ordinal_path_and_line_when_captured() -> None:
    calls = outer().calls()
    assert [provenance.origins(n) for n in calls] == [(i,) for i in range(len(calls))]
    assert [provenance.module_path(n) for n in calls] == [
        "blocks.0.conv", "blocks.0.norm", "blocks.0", "blocks.0", "blocks.1.conv", "blocks.1.norm", "blocks.1",
        "blocks.1", "",
    ]  # fmt: skip
    lines, start = inspect.getsourcelines(Outer.forward)
    assert provenance.source_line(calls[-1]) == f"test_provenance.py:{start + len(lines) - 1}"
    lines, start = inspect.getsourcelines(Inner.forward)
    assert provenance.source_line(calls[0]) == f"test_provenance.py:{start + 1}", "the user's line, not torch's"
    assert provenance.describe(calls[3]) == f"aten.mul.Tensor in blocks.0 (test_provenance.py:{start + 2})"


def test_origins_cover_the_captured_graph_when_passes_ran() -> None:
    program = outer()
    everything = {o for n in program.calls() for o in provenance.origins(n)}
    Canonicalize().run(program)
    Reparameterize().run(program)
    found = [provenance.origins(n) for n in program.calls()]
    assert {o for origins in found for o in origins} == everything
    assert len({origins[-1] for origins in found}) == len(found), "the last origin tells values apart"


def test_no_metadata_names_the_machine_when_a_model_was_captured(zoo: Callable[[str], Program]) -> None:
    for program in (outer(), zoo("convnext_atto")):
        for node in program.graph.nodes:
            shown = repr({k: v for k, v in node.meta.items() if k != "val"})
            assert str(Path(__file__).resolve().parents[2]) not in shown
            assert str(Path.home()) not in shown
            assert "site-packages" not in shown
            assert "stack_trace" not in node.meta
            assert not provenance.source_line(node).startswith(("/", "\\"))


def test_source_names_the_library_file_when_the_model_comes_from_one(zoo: Callable[[str], Program]) -> None:
    sources = {provenance.source_line(n).partition(":")[0] for n in zoo("convnext_atto").calls()}
    assert "timm/models/convnext.py" in sources


def test_is_stamped_tells_when_a_node_lost_its_record() -> None:
    program = outer()
    assert provenance.is_stamped(program.graph)
    program.calls()[2].meta.pop("custom")
    assert not provenance.is_stamped(program.graph)


def test_other_custom_metadata_survives_when_stamped() -> None:
    program = outer()
    program.calls()[0].meta["custom"]["theirs"] = 1
    provenance.inherit(program.calls()[0], value_of=program.calls()[1])
    assert program.calls()[0].meta["custom"]["theirs"] == 1
    assert provenance.origins(program.calls()[0]) == (1,)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("blocks.0", 4), ("blocks.0.conv", 1), ("blocks.*.norm", 2), ("blocks", 8), ("*", 9), ("block", 0), ("conv", 0)],
)
def test_modules_are_found_when_a_pattern_names_them_or_what_holds_them(pattern: str, count: int) -> None:
    assert sum(provenance.lies_in(n, pattern) for n in outer().calls()) == count


def test_decision_stays_with_the_node_when_the_program_is_copied() -> None:
    program = outer()
    provenance.remember(program.calls()[0], "stays: it is the first")
    again = program.copy().calls()
    assert [provenance.decision(n) for n in again[:2]] == ["stays: it is the first", ""]
    assert (provenance.origins(again[0]), provenance.module_path(again[0])) == ((0,), "blocks.0.conv")
