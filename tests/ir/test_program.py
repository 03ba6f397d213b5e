"""Program: copies, the float64 twin, running, and the primitives that passes write with."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, content, randomize, worst_error
from tests.strategies import programs
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.text import text

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def net() -> Program:
    torch.manual_seed(0)
    return captured(randomize(Net()), torch.randn(2, 3, 6, 6))


def test_copy_shares_tensors_and_not_the_graph_when_made() -> None:
    program = net()
    before = content(program)
    twin = program.copy()
    assert text(twin) == text(program)
    assert all(twin.tensors[k] is program.tensors[k] for k in program.tensors)
    relu = twin.calls("aten.relu.default")[0]
    twin.replace(relu, relu.args[0])  # type: ignore[arg-type]
    twin.add_tensor("more", torch.ones(1), before=twin.output)
    provenance.inherit(twin.calls()[0], value_of=twin.calls()[1])
    assert content(program) == before
    assert "more" not in program.tensors
    assert provenance.origins(program.calls()[0]) == (0,)


def test_double_computes_in_float64_and_leaves_the_original_when_made() -> None:
    program = net()
    before = content(program)
    twin = program.double()
    found = twin.run(*twin.example)
    assert found[0].dtype is torch.float64
    assert {t.dtype for t in twin.tensors.values()} == {torch.float64}
    assert all(n.meta["val"].dtype is torch.float64 for n in twin.graph.nodes if "val" in n.meta)
    assert content(program) == before
    assert program.example[0].dtype is torch.float32
    # float32 rounds at 6e-8; three layers of some tens of products stay below 1e-5
    assert 0 < worst_error(program.run(*program.example), found) < 1e-5


def test_double_follows_every_dtype_when_the_graph_names_some() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            made = torch.full((4,), 0.1) + torch.arange(4, dtype=torch.float32) + torch.zeros(4) + torch.ones(4)
            half = x.to(torch.float16).to(torch.float32) @ torch.eye(4)
            return x @ torch.diag(made) + half, ids.float() @ torch.linspace(0, 1, 4), ids + torch.arange(4)

    program = captured(Casts(), (torch.randn(2, 4), torch.ones(2, 4, dtype=torch.int64)))
    twin = program.double()
    values = twin.run(*twin.example)
    assert [v.dtype for v in values] == [torch.float64, torch.float64, torch.int64]


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(programs(most=9))
def test_double_agrees_with_the_original_when_random(program: Program) -> None:
    twin = program.double()
    values = torch.randn(3, *program.example[0].shape[1:], generator=torch.Generator().manual_seed(1))
    found, expected = twin.run(values.double()), program.run(values)
    assert all(v.dtype is torch.float64 for v in found)
    # float32 rounding: 6e-8 an operation, some hundreds of operations, and normalisation of small values
    assert worst_error(tuple(v.float() for v in found), expected) < 1e-3


def test_run_frees_values_when_nobody_reads_them_any_more() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = torch.sin(x) + 1
            return x

    program = captured(Chain(), torch.randn(2, 64))
    alive: list[weakref.ref[Any]] = []
    most = 0

    def watch(node: Node, value: Any) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    program.run(torch.randn(3, 64), observe=watch)
    assert len(alive) == 12
    assert most == 2, "an operation needs its operand and its result"


def test_run_returns_each_output_when_values_are_shared_or_given_back() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            y = x * 2
            return y, x, y, self.weight

    model = Shared().eval()
    x = torch.randn(2, 3)
    found = captured(model, x).run(x)
    assert [torch.equal(a, b) for a, b in zip(found, (x * 2, x, x * 2, model.weight), strict=True)] == [True] * 4


def test_run_records_no_gradient_when_inputs_want_one() -> None:
    assert not net().run(torch.randn(2, 3, 6, 6, requires_grad=True))[0].requires_grad


def test_add_call_gives_symbolic_shape_and_provenance_when_a_pass_inserts() -> None:
    program = net()
    conv, norm, relu = program.calls()[:3]
    new = program.add_call(aten.sigmoid.default, (norm,), before=relu, value_of=relu, merges=(conv, norm))
    assert provenance.origins(new) == (0, 1, 2), "the value's own origin comes last"
    assert provenance.module_path(new) == "conv"
    assert provenance.source_line(new) == provenance.source_line(conv)
    program.replace(relu, new)
    assert "sigmoid(%1) -> f32[batch,4,4,4]" in text(program)


@pytest.mark.parametrize(
    ("target", "args", "shape"),
    [
        (aten.pad.default, ([1, 1], "constant", 0.0), "f32[batch,4,4,6]"),
        (aten.flatten.using_ints, (1,), "f32[batch,64]"),
        (aten.upsample_bilinear2d.vec, (None, False, [2.0, 2.0]), "f32[batch,4,8,8]"),
        (aten.softmax.int, (-1,), "f32[batch,4,4,4]"),
        (aten.adaptive_avg_pool2d.default, ([1, 1],), "f32[batch,4,1,1]"),
        (aten.roll.default, ([1], [2]), "f32[batch,4,4,4]"),
    ],
)
def test_add_call_keeps_the_batch_symbolic_when_the_operator_is_made_of_others(
    target: Any, args: tuple[Any, ...], shape: str
) -> None:
    program = net()
    relu = program.calls("aten.relu.default")[0]
    new = program.add_call(target, (relu, *args), before=program.output, value_of=relu)
    program.output.args = ((new,),)
    assert text(program).splitlines()[-2].endswith(f"-> {shape}")


def test_add_tensor_finds_a_free_name_when_the_wished_one_is_taken() -> None:
    program = net()
    names = [program.add_tensor("conv.weight", torch.ones(2, requires_grad=True), before=program.output).target]
    names.append(program.add_tensor("conv.weight", torch.zeros(2), before=program.output).target)
    assert names == ["conv.weight_1", "conv.weight_2"]
    assert not program.tensors["conv.weight_1"].requires_grad
    assert program.kinds["conv.weight_1"] == "parameter"


def test_replace_erases_upwards_and_counts_calls_when_nobody_reads_them() -> None:
    program = net()
    norm = program.calls("aten.batch_norm.default")[0]
    erased = program.replace(norm, program.placeholders[0])
    assert erased == 2
    assert dialect.op_name(program.calls()[0]) == "aten.relu.default"
    assert set(program.tensors) == set(program.kinds) == {"head.weight", "head.bias"}


def test_erase_dead_keeps_what_is_read_elsewhere_when_a_reader_goes() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            scaled = x * self.weight
            return scaled.relu() + scaled.sigmoid()

    program = captured(Fork(), torch.randn(2, 3))
    add = program.output.args[0][0]  # type: ignore[index]
    relu, sigmoid = add.args
    assert program.replace(add, relu) == 2, "the sum and the sigmoid; the product is still read"
    assert sigmoid not in program.calls()
    assert "weight" in program.tensors


def test_erase_dead_survives_when_two_dead_nodes_read_the_same_parameter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.weight - self.weight.abs())

    program = captured(Twice(), torch.randn(2, 3))
    add = program.output.args[0][0]  # type: ignore[index]
    program.replace(add, program.placeholders[0])
    assert program.calls() == []
    assert program.tensors == {}


def test_erase_dead_touches_nothing_when_the_node_is_read_or_is_an_input() -> None:
    program = net()
    before = content(program)
    program.erase_dead(program.calls()[0])
    program.erase_dead(program.placeholders[0])
    program.erase_dead(program.output)
    assert content(program) == before


def test_sizes_follow_the_dims_when_shapes_are_symbolic() -> None:
    program = captured(
        nn.Conv2d(3, 4, 3, stride=2), torch.randn(2, 3, 8, 8), dynamic={"input": {0: "batch", 2: ("height", 8, 64)}}
    )
    shape = program.calls()[0].meta["val"].shape
    assert program.sizes(shape, {}) == (1, 4, 3, 3), "each dim at its opt, the smallest"
    assert program.sizes(shape, {"batch": 5, "height": 17}) == (5, 4, 8, 3)


def test_size_bytes_counts_a_tensor_once_when_it_is_read_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).relu())

    assert captured(Tied(), torch.randn(2, 4)).size_bytes == 64
