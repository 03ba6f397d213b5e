"""Program → ExportedProgram → Program keeps everything, in memory and through a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from tests.harness import captured, content, randomize
from tests.ir.conftest import ZOO
from tests.strategies import programs
from vlexport.frontends.archive import read_archive, write_archive
from vlexport.ir import provenance
from vlexport.ir.exported import exported_from_program, program_from_exported
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, text
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.reparameterize import Reparameterize


def assert_same(found: Program, expected: Program) -> None:
    """Equal in text, weights, names, dims, ranges, kinds and provenance."""
    assert text(found) == text(expected)
    assert content(found) == content(expected)
    assert found.signature == expected.signature
    assert sorted(map(str, found.ranges.values())) == sorted(map(str, expected.ranges.values()))
    assert sorted(found.symbol_names().values()) == sorted(expected.symbol_names().values())
    assert found.kinds == {k: v for k, v in expected.kinds.items() if k in expected.used_tensors()}
    for a, b in zip(found.calls(), expected.calls(), strict=True):
        assert provenance.origins(a) == provenance.origins(b)
        assert provenance.module_path(a) == provenance.module_path(b)
        assert provenance.source_line(a) == provenance.source_line(b)
    assert all(map(torch.equal, found.example, expected.example))


def through_memory(program: Program) -> Program:
    return program_from_exported(exported_from_program(program), program.signature)


def through_file(program: Program, path: Path) -> Program:
    write_archive(exported_from_program(program), {"signature": program.signature.model_dump(mode="json")}, path)
    return program_from_exported(read_archive(path).exported_program(), program.signature)


@pytest.mark.parametrize("name", ZOO)
def test_program_survives_lifting_when_it_is_a_real_model(name: str, zoo: Callable[[str], Program]) -> None:
    program = zoo(name)
    assert any(provenance.module_path(n) for n in program.calls())
    assert_same(through_memory(program), program)


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "convnext_atto"])
def test_program_survives_a_file_when_it_is_a_real_model(
    name: str, zoo: Callable[[str], Program], tmp_path: Path
) -> None:
    program = zoo(name)
    Canonicalize().run(program)
    Reparameterize().run(program)
    back = through_file(program, tmp_path / "model.pt")
    assert_same(back, program)
    for batch in (1, 3):
        image = torch.randn(batch, 3, 64, 64)[:, :, :1, :1].expand(-1, -1, 224, 224).contiguous()
        assert torch.equal(back.run(image)[0], program.run(image)[0])


class Everything(nn.Module):
    """All kinds of tensors, two of them of one name once dots are gone, and awkward names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.a_weight = nn.Parameter(torch.randn(3))
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("passing", torch.randn(3), persistent=False)

    def forward(self, input: Tensor, relu: Tensor) -> dict[str, Tensor]:  # noqa: A002
        constant = torch.tensor([1.0, 2.0, 3.0])
        value = (self.a(input) * self.a_weight + self.kept - self.passing) * constant
        return {"same": input, "value": value.relu() + relu, "again": value}


def everything() -> Program:
    torch.manual_seed(0)
    model = randomize(Everything())
    rows = {0: ("rows", 2, 8)}
    return captured(model, (torch.randn(2, 3), torch.randn(2, 3)), dynamic={"input": rows, "relu": rows})


def test_program_survives_when_it_holds_every_kind_of_tensor(tmp_path: Path) -> None:
    program = everything()
    assert set(program.kinds.values()) == {"parameter", "buffer", "constant"}
    assert [s.name for s in program.signature.inputs] == ["input", "relu"]
    for back in (through_memory(program), through_file(program, tmp_path / "model.pt")):
        assert_same(back, program)
        assert all(map(torch.equal, back.run(*program.example), program.run(*program.example)))


def test_inputs_of_the_graph_are_ordered_by_kind_when_lifted() -> None:
    kinds = [str(s.kind).rpartition(".")[2] for s in exported_from_program(everything()).graph_signature.input_specs]
    order = ["PARAMETER", "BUFFER", "CONSTANT_TENSOR", "USER_INPUT"]
    assert kinds == sorted(kinds, key=order.index)
    assert set(kinds) == set(order)


def test_input_keeps_its_name_when_python_has_a_function_of_that_name() -> None:
    lifted = exported_from_program(captured(nn.Sequential(nn.Linear(3, 2)), torch.rand(2, 3)))
    node = next(n for n in lifted.graph.nodes if n.op == "placeholder" and n.target == "input")
    assert (node.name, lifted.graph_signature.user_inputs) == ("input", ("input",))
    assert lifted.run_decompositions({}).graph_signature.user_inputs == ("input",)


def test_node_names_come_from_operator_and_origin_when_lifted() -> None:
    program = everything()
    names = {n.name for n in exported_from_program(program).graph.nodes if n.op == "call_function"}
    assert "linear_0" in names
    Canonicalize().run(program)
    assert names == {n.name for n in exported_from_program(program).graph.nodes if n.op == "call_function"}


@settings(
    max_examples=25, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(programs(most=8))
def test_program_survives_lifting_when_it_is_random(program: Program) -> None:
    back = through_memory(program)
    assert_same(back, program)
    assert fingerprint(back) == fingerprint(program)
    values = torch.randn(3, *program.example[0].shape[1:], generator=torch.Generator().manual_seed(0))
    pairs = zip(back.run(values), program.run(values), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
