"""The matcher finds what a pattern says, tries every way, and reports how far it got and why it stopped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import Failed, Found, Op, bind, constant, match, number, op, same, stored


class Model(nn.Module):
    """``function(x, weight, scale)`` with two stored tensors."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).reshape(4, 4))
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.scale)


def program_of(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Program:
    return captured(Model(function), torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))


def matched(pattern: Op, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Found | Failed, Program]:
    """Match at the call that is returned."""
    program = program_of(function)
    return match(program, pattern, program.results[0]), program


def names(nodes: tuple[Node, ...]) -> list[str]:
    return [dialect.plain_name(n) for n in nodes]


LINEAR = op("aten.linear.default", bind("x"), stored("weight"), name="linear")
SCALED = op("aten.mul.Tensor", LINEAR, number("scale"), commutes=True)


def test_pattern_is_found_and_binds_nodes_and_constants_when_it_is_there() -> None:
    found, program = matched(SCALED, lambda x, w, s: nn.functional.linear(x, w) * 0.25)
    assert isinstance(found, Found)
    assert names(found.nodes) == ["linear", "mul"], "operands before readers"
    assert found["x"] is program.placeholders[0]
    assert found["linear"] is program.calls()[0]
    assert found["scale"] == 0.25
    assert found["weight"].target == "weight"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, s: nn.functional.linear(x, w) * s,
        lambda x, w, s: s * nn.functional.linear(x, w),
    ],
)
def test_operands_are_found_in_both_orders_when_the_operator_commutes(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    found, _ = matched(SCALED, function)
    assert isinstance(found, Found)
    assert found["scale"].target == "scale"


def test_operands_keep_their_order_when_the_operator_does_not_commute() -> None:
    pattern = op("aten.sub.Tensor", LINEAR, number("scale"))
    failed, program = matched(pattern, lambda x, w, s: s - nn.functional.linear(x, w))
    assert isinstance(failed, Failed)
    assert failed.reason == "its operand is made by get_attr, not by linear"
    assert failed.node is program.results[0]


def test_an_earlier_choice_is_taken_back_when_a_later_operand_needs_it() -> None:
    """The inner product fits in its first order too; only the second lets ``y`` be the same in both places."""
    product = op("aten.mul.Tensor", bind("x"), bind("y"), commutes=True)
    pattern = op("aten.add.Tensor", product, bind("y"))
    found, program = matched(pattern, lambda x, w, s: (x * s) + x)
    assert isinstance(found, Found)
    assert found["y"] is program.placeholders[0]


def test_same_name_fails_when_the_operands_differ() -> None:
    pattern = op("aten.add.Tensor", op("aten.mul.Tensor", bind("x"), bind("x")), bind("y"))
    failed, program = matched(pattern, lambda x, w, s: (x * s) + x)
    assert isinstance(failed, Failed)
    assert (failed.node, failed.reason) == (program.calls()[0], "x is not the same value in both places")


def test_same_name_holds_for_an_operator_as_for_an_operand_when_both_have_it() -> None:
    pattern = op("aten.add.Tensor", bind("y"), op("aten.exp.default", bind("x"), name="y"))
    assert isinstance(matched(pattern, lambda x, w, s: (y := x.exp()) + y)[0], Found)
    failed, _ = matched(pattern, lambda x, w, s: x.sin() + x.exp())
    assert isinstance(failed, Failed)
    assert failed.reason == "y is not the same value in both places"


def test_node_is_consumed_once_when_two_operands_of_a_pattern_are_the_same_node() -> None:
    exp = op("aten.exp.default", bind("x"))
    found, _ = matched(op("aten.add.Tensor", exp, exp), lambda x, w, s: (y := x.exp()) + y)
    assert isinstance(found, Found)
    assert names(found.nodes) == ["exp", "add"]


def test_farthest_failure_is_reported_when_the_operator_commutes() -> None:
    """In the first order nothing fits; in the second the linear fits, and only the number does not."""
    failed, program = matched(SCALED, lambda x, w, s: x * nn.functional.linear(x, w))
    assert isinstance(failed, Failed)
    assert failed.reason == "its scale is no constant number"
    assert failed.node is program.results[0]
    assert failed.depth == 4, "mul, linear, its input and its weight had matched"


def test_failure_names_the_inner_node_when_its_operand_is_wrong() -> None:
    failed, program = matched(SCALED, lambda x, w, s: nn.functional.linear(x, w.tanh()) * 2.0)
    assert isinstance(failed, Failed)
    assert (failed.node, failed.reason) == (
        program.calls("aten.linear.default")[0],
        "its weight is computed, not stored",
    )


@pytest.mark.parametrize(
    ("pattern", "function", "reason"),
    [
        (
            op("aten.exp.default", noun="an exponential"),
            lambda x, w, s: x.sin(),
            "it is sin.default, not an exponential",
        ),
        (
            op("aten.mul.Tensor", bind("x"), op(("aten.exp.default", "aten.sin.default"), bind("y"))),
            lambda x, w, s: x * 2.0,
            "its operand is the constant 2.0, not made by exp or sin",
        ),
        (
            op("aten.exp.default", op("aten.sin.default", bind("x"))),
            lambda x, w, s: x.exp(),
            "its operand is made by placeholder, not by sin",
        ),
        (
            op("aten.softmax.int", bind("x"), constant("dim", -1)),
            lambda x, w, s: x.softmax(0),
            "its dim is not -1",
        ),
        (
            op("aten.exp.default", bind("x"), check=lambda program, node: "because" if node.users else ""),
            lambda x, w, s: x.exp(),
            "because",
        ),
    ],
)
def test_reason_says_what_is_wrong_when(
    pattern: Op, function: Callable[[Tensor, Tensor, Tensor], Tensor], reason: str
) -> None:
    failed, _ = matched(pattern, function)
    assert isinstance(failed, Failed)
    assert failed.reason == reason


CHAIN = op("aten.exp.default", op("aten.sin.default", op("aten.cos.default", bind("x"))))


def twice_read(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    y = x.cos().sin()
    return y.exp() + y


def inner_of(program: Program, pattern: Op) -> Found | Failed:
    return match(program, pattern, program.calls("aten.exp.default")[0])


def test_match_fails_when_a_consumed_value_has_another_reader() -> None:
    program = program_of(twice_read)
    failed = inner_of(program, CHAIN)
    assert isinstance(failed, Failed)
    assert failed.reason == "the sin's output is used by 1 other(s)"
    assert failed.node is program.calls("aten.sin.default")[0]


def test_shared_node_and_what_is_above_it_are_kept_when_others_read_it() -> None:
    program = program_of(twice_read)
    shared = op("aten.exp.default", op("aten.sin.default", op("aten.cos.default", bind("x")), name="y", shared=True))
    found = inner_of(program, shared)
    assert isinstance(found, Found)
    assert names(found.nodes) == ["exp"]
    assert found["y"] is program.calls("aten.sin.default")[0]


def test_other_readers_are_looked_for_when_the_root_itself_is_kept() -> None:
    kept = op("aten.exp.default", op("aten.sin.default", bind("x")), shared=True)
    program = program_of(lambda x, w, s: (y := x.sin()).exp() + y)
    found = inner_of(program, kept)
    assert isinstance(found, Found)
    assert found.nodes == (), "nothing is consumed where the root is kept"


def test_operand_is_found_when_it_is_given_by_keyword() -> None:
    program = program_of(lambda x, w, s: nn.functional.linear(x, w) * 2.0)
    node = program.calls("aten.linear.default")[0]
    node.kwargs = {"weight": node.args[1]}
    node.args = node.args[:1]
    with_bias = op("aten.linear.default", bind("x"), stored("weight"), stored("bias", optional=True))
    found = match(program, with_bias, node)
    assert isinstance(found, Found)
    assert found["weight"].target == "weight"
    assert found["bias"] is None


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [(1, 1, True), (1, 1.0, False), (1, True, False), (0.0, -0.0, False), ([1, 2], (1, 2), True), ([1, 2], [1], False)],
)
def test_constants_are_the_same_when_type_and_value_are(a: object, b: object, equal: bool) -> None:
    assert same(a, b) is equal


@pytest.mark.parametrize(
    ("value", "accepted"), [(1, True), (0.5, True), (True, False), (None, False), ("none", False), ([1], False)]
)
def test_number_accepts_numbers_alone_when_the_operand_is_a_constant(value: object, accepted: bool) -> None:
    program = program_of(lambda x, w, s: x * s)
    test = number("scale").accepts
    assert test is not None
    assert test(program, value) is accepted


def test_number_accepts_a_stored_tensor_when_it_has_one_element() -> None:
    program = program_of(lambda x, w, s: x * s + x * w[0].exp() + x @ w)
    test = number("scale").accepts
    assert test is not None
    stored_nodes = {str(n.target): n for n in program.graph.nodes if n.op == "get_attr"}
    assert test(program, stored_nodes["scale"])
    assert not test(program, stored_nodes["weight"])
