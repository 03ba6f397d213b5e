"""merge-duplicates: what counts as the same, what only looks like it, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.text import text
from vlexport.passes.base import Match
from vlexport.passes.merge_duplicates import MergeDuplicates

aten = torch.ops.aten
F = nn.functional
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """``function(x, a, b)``; ``a`` and ``b`` are equal in content and stored twice."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Parameter(torch.linspace(-1, 1, 16).reshape(4, 4))
        self.b = nn.Parameter(self.a.detach().clone())

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.a, self.b)


def calls(program: Program) -> list[str]:
    return [dialect.plain_name(n) for n in program.calls()]


@pytest.mark.parametrize(
    ("function", "changes", "left"),
    [
        (lambda x, a, b: x.exp() + x.exp(), 1, ["exp", "add"]),
        (lambda x, a, b: x.exp().sin() + x.exp().sin() * x.exp().sin(), 4, ["exp", "sin", "mul", "add"]),
        (lambda x, a, b: x @ a + x @ b, 2, ["matmul", "add"]),
        (lambda x, a, b: F.linear(x, a).tanh() + F.linear(x, b).tanh(), 3, ["linear", "tanh", "add"]),
        (lambda x, a, b: x.chunk(2, -1)[0] + x.chunk(2, -1)[1], 1, ["chunk", "getitem", "getitem", "add"]),
        (lambda x, a, b: x.softmax(-1) + F.softmax(x, dim=-1, dtype=None), 1, ["softmax", "add"]),
    ],
)
def test_duplicates_become_one_when_operator_and_operands_are_equal(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], changes: int, left: list[str]
) -> None:
    checked = check_pass(MergeDuplicates(), Model(function), ROWS, expect_changes=changes)
    assert calls(checked.after) == left


def test_savings_are_counted_when_a_linear_and_its_weight_are_duplicates() -> None:
    checked = check_pass(MergeDuplicates(), Model(lambda x, a, b: F.linear(x, a) + F.linear(x, b)), ROWS)
    saved = {c.what: (c.saved_nodes, c.saved_parameters, c.saved_macs) for c in checked.changes}
    assert saved == {"duplicate tensor merged": (0, 16, 0), "duplicate linear merged": (1, 0, 16)}
    assert list(checked.after.tensors) == ["a"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: F.gelu(x) + F.gelu(x, approximate="tanh"),
        lambda x, a, b: x.softmax(-1) + x.softmax(0),
        lambda x, a, b: (x * 1) + (x * 1.0),
        lambda x, a, b: x.clamp(0.0) + x.clamp(-0.0),
        lambda x, a, b: x.mean(1) + x.mean(1, keepdim=True)[:, 0],
        lambda x, a, b: x.mean(1) + x.mean(1, dtype=torch.float64).float(),
        lambda x, a, b: torch.add(x, a[0], alpha=2) + torch.add(x, a[0], alpha=3),
        lambda x, a, b: x @ a + x @ a.exp(),
        lambda x, a, b: (x - a[0]) * (a[0] - x),
    ],
)
def test_calls_stay_apart_when_an_operand_or_keyword_differs(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    program = captured(Model(function), ROWS)
    kept = {dialect.op_name(n) for n in program.results[0].all_input_nodes}
    checked = check_pass(MergeDuplicates(), program)
    assert len(checked.after.results[0].all_input_nodes) == 2, f"{kept} were merged"


ONES = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ONES, ONES.double()),
        (ONES, torch.ones(2, 8)),
        (ONES, torch.ones(4, 4).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(1.0 + 2**-20))),
        (ONES * 0.0, ONES * -0.0),
    ],
)
def test_tensors_stay_apart_when_dtype_shape_or_content_differ(first: Tensor, second: Tensor) -> None:
    program = captured(Model(lambda x, a, b: x + a.sum() + b.sum()), ROWS)
    program.tensors.update(a=first, b=second)
    assert not [m for m in MergeDuplicates().find(program) if isinstance(m, Match) and m.node.op == "get_attr"]


def test_tensors_stay_apart_when_one_is_a_buffer() -> None:
    program = captured(Model(lambda x, a, b: x @ a + x @ b), ROWS)
    program.kinds["b"] = "buffer"
    check_pass(MergeDuplicates(), program, expect_changes=0)


def test_readers_of_one_stored_tensor_are_no_duplicates_when_nothing_else_is() -> None:
    """The text prints a tensor where it is read, so there is nothing to change."""
    program = captured(Model(lambda x, a, b: x @ a + a[0]), ROWS)
    product = program.calls("aten.matmul.default")[0]
    with program.graph.inserting_before(product):
        again = program.graph.create_node("get_attr", "a")
    again.meta = dict(product.args[1].meta)
    product.args = (product.args[0], again)
    check_pass(MergeDuplicates(), program, expect_changes=0)


def left_of_two(target: Any, *arguments: Any) -> int:
    """How many are left of two equal calls; ``"x"`` stands for the input."""
    program = captured(Model(lambda x, a, b: x * 2), torch.randn(2, 4, 4))
    x, product = program.placeholders[0], program.results[0]
    operands = tuple(x if a == "x" else a for a in arguments)
    pair = [program.add_call(target, operands, before=program.output, value_of=product) for _ in range(2)]
    program.output.args = ((program.add_call(aten.sub.Tensor, tuple(pair), before=program.output, value_of=product),),)
    MergeDuplicates().run(program)
    return len(program.calls(dialect.op_name(pair[0])))


@pytest.mark.parametrize(
    ("target", "arguments", "left"),
    [
        (aten.exp.default, ("x",), 1),
        (aten.scaled_dot_product_attention.default, ("x", "x", "x"), 1),
        (aten.scaled_dot_product_attention.default, ("x", "x", "x", None, 0.5), 2),
        (aten.rand_like.default, ("x",), 2),
        (aten.bernoulli.p, ("x", 0.5), 2),
        (aten.empty_like.default, ("x",), 2),
        (aten.cdist.default, ("x", "x"), 2),
    ],
)
def test_calls_are_merged_only_when_their_value_is_always_the_same(
    target: Any, arguments: tuple[Any, ...], left: int
) -> None:
    """Nothing is known of an opaque call (cdist), so it stays as well."""
    assert left_of_two(target, *arguments) == left


def test_a_default_spelled_out_is_the_same_when_the_other_leaves_it_out() -> None:
    program = captured(Model(lambda x, a, b: x.softmax(-1) + x.softmax(-1).exp()), ROWS)
    first, second = program.calls("aten.softmax.int")
    first.args, second.args = (first.args[0], -1), (second.args[0], -1, None)
    checked = check_pass(MergeDuplicates(), program, expect_changes=1)
    assert calls(checked.after) == ["softmax", "exp", "add"]


def test_all_go_in_one_sweep_when_there_are_more_duplicates_than_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed point must not take as many sweeps as there are duplicates."""
    monkeypatch.setattr("vlexport.passes.base.MAX_SWEEPS", 2)
    checked = check_pass(MergeDuplicates(), Model(lambda x, a, b: sum(x.exp() for _ in range(9))), ROWS)
    assert calls(checked.after).count("exp") == 1


def test_outputs_keep_their_names_when_they_become_the_same_value() -> None:
    model = Model(lambda x, a, b: {"left": x.exp(), "right": x.exp()})
    checked = check_pass(MergeDuplicates(), model, ROWS, expect_changes=1)
    assert [s.name for s in checked.after.signature.outputs] == ["left", "right"]
    assert checked.after.results[0] is checked.after.results[1]


def test_origins_of_both_are_kept_and_the_place_is_the_first_ones_when_merged() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.GELU(), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x) * 2

    checked = check_pass(MergeDuplicates(), Two(), ROWS, expect_changes=1)
    first = checked.after.calls()[0]
    assert (provenance.origins(first), provenance.module_path(first)) == ((1, 0), "left")
    assert checked.changes[0].where == ("right",)
    assert provenance.origins(checked.before.calls()[0]) == (0,), "the input Program keeps its own"


def test_text_is_golden_when_twins_lie_in_chains() -> None:
    function = lambda x, a, b: (x @ a).tanh() + (x @ b).tanh() * (x @ a).softmax(-1)  # noqa: E731
    check_pass(MergeDuplicates(), Model(function), ROWS, golden="merge_duplicates")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=4, including=("duplicates", "near duplicates")))
def test_values_are_equal_and_no_line_is_written_twice_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(MergeDuplicates(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert checked.record.gate.worst == 0.0
    lines = [line.partition(" = ")[2] for line in text(checked.after).splitlines() if " = " in line]
    assert len(lines) == len(set(lines))
