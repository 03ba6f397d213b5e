"""Faults planted in the passes themselves: each must be caught, and the test says by what.

- ``gate``: the runner's numeric gate (VLX0401).
- ``runner``: the runner's check of the program (VLX0403).
- ``shapes``: the shape propagation of a new call.
- ``harness``: nothing of the product sees it; :func:`check_pass` does, with the words given.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured, check_pass, randomize
from vlexport.core.errors import GateError, InternalError
from vlexport.ir.program import Program
from vlexport.passes import (
    canonicalize,
    eliminate_dead,
    eliminate_layout,
    eliminate_round_trips,
    fold_constants,
    legalize_repeats,
    merge_duplicates,
    merge_pieces,
)
from vlexport.passes.base import Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import make_probes

aten = torch.ops.aten
F = nn.functional


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in the source of ``module``; ``subject`` makes a program on which it matters."""

    module: types.ModuleType
    old: str
    new: str
    subject: Callable[[], Program]
    caught_by: str
    words: str = ""


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Stored(nn.Module):
    """``function(x, b)`` with a stored tensor of 4 × 4."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(2)
        self.stored = nn.Parameter(torch.randn(4, 4, generator=generator))

    def forward(self, x: Tensor) -> Any:
        return self.function(x * 2, self.stored)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def made_by(function: Callable[..., Any], *shape: int) -> Callable[[], Program]:
    return lambda: captured(Lambda(function), image(*shape))


def layers(*modules: nn.Module, shape: tuple[int, ...] = (1, 4, 5, 5)) -> Callable[[], Program]:
    def build() -> Program:
        torch.manual_seed(0)
        for module in modules:
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        return captured(randomize(nn.Sequential(*modules)), image(*shape))

    return build


def random_constant() -> Program:
    """Attention over a stored table that drops half of its weights, added to the input."""
    program = captured(Lambda(lambda x: x * 2), image(2, 4))
    table = program.add_tensor("table", image(4, 4), before=program.output)
    drop = (table, table, table, None, 0.5)
    value = program.results[0]
    mixed = program.add_call(
        aten.scaled_dot_product_attention.default, drop, before=program.output, value_of=value
    )  # fmt: skip
    total = program.add_call(aten.matmul.default, (value, mixed), before=program.output, value_of=value)
    program.output.args = ((total,),)
    return program


def asserting() -> Program:
    """Refuses an empty batch."""
    program = captured(Lambda(lambda x: x.exp()), image(2, 4))
    at = {"before": program.output, "value_of": program.results[0]}
    size = program.add_call(aten.sym_size.int, (program.placeholders[0], 0), **at)
    holds = program.add_call(operator.ge, (size, 1), **at)
    program.add_call(aten._assert_scalar.default, (holds, "an empty batch"), **at)
    return program


def dead_chain() -> Program:
    program = captured(Lambda(lambda x: x.exp()), image(2, 4))
    at = {"before": program.output, "value_of": program.results[0]}
    program.add_call(aten.sin.default, (program.add_call(aten.cos.default, (program.results[0],), **at),), **at)
    return program


FAULTS = {
    "a permutation is wrong": Fault(
        canonicalize, "places[i] if i in places", "places[i - 1] if i - 1 in places",
        made_by(lambda x: x.movedim((1, 2), (2, 1)) * 2, 2, 3, 3, 3), "gate",
    ),
    "a squeeze of a dim of size 1 goes": Fault(
        canonicalize, "return node.args[0] if len(_shape(node)) == len(_shape(node.args[0])) else None",
        "return node.args[0]", made_by(lambda x: x.squeeze(1).softmax(-1), 2, 1, 3), "gate",
    ),
    "-1 stands one place too early": Fault(
        canonicalize, "entries[open_entry] = _UNKNOWN", "entries[open_entry - 1] = _UNKNOWN",
        made_by(lambda x: x.flatten(0, 1) * 2, 2, 3, 4), "shapes", "only one dimension can be inferred",
    ),
    "calls that differ in a keyword are merged": Fault(
        merge_duplicates, "_frozen(dialect.operands(node), same)", "_frozen(node.args, same)",
        made_by(lambda x: F.gelu(x) - 2 * F.gelu(x, approximate="tanh"), 2, 4), "gate",
    ),
    "1 and 1.0 are merged": Fault(
        merge_duplicates, "return (type(value).__name__, repr(value))", "return value",
        made_by(lambda x: {"whole": x.long() * 1, "real": x.long() * 1.0}, 2, 4), "gate",
    ),
    "random calls are merged": Fault(
        merge_duplicates, " or dialect.is_random(node)", "",
        lambda: twice_random(), "gate",
    ),
    "a random call is folded": Fault(fold_constants, " or dialect.is_random(node)", "", random_constant, "gate"),
    "a fold sees other values": Fault(
        fold_constants, "return value.clone(", "return value.half().to(value.dtype).clone(",
        made_by(lambda x: x * torch.linspace(0.1, 1.7, 4).exp(), 2, 4), "gate",
    ),
    "an assertion goes": Fault(
        eliminate_dead, " and not dialect.checks_at_run_time(node)", "", asserting, "harness",
        "what the program refuses at run time has changed",
    ),
    "a pad that shifts goes": Fault(
        eliminate_layout, "isinstance(a, int) and a == 0 for a in amounts", "sum(amounts) == 0 for a in amounts",
        made_by(lambda x: F.pad(x, (1, -1)) * 2, 2, 3, 4), "gate",
    ),
    "a slice of a slice ends one too early": Fault(
        merge_pieces, "places.start, places[-1] + 1, places.step", "places.start, places[-1], places.step",
        made_by(lambda x: x.narrow(2, 1, 5).narrow(2, 1, 3).mean(2), 2, 3, 6), "gate",
    ),
    "a class token is read off the wrong operand": Fault(
        merge_pieces, "if start <= first and last < start + length:", "if last < start + length:",
        made_by(lambda x: torch.cat([x.tanh(), x], 1).narrow(1, 2, 2) * 2, 2, 3, 4), "gate",
    ),
    "a stored operand keeps its layout": Fault(
        eliminate_round_trips, "if value.shape == tensor.shape and axes.in_order:", "if value.numel():",
        lambda: captured(Stored(lambda x, b: (x.permute(0, 2, 1) + b).permute(0, 2, 1)), image(2, 4, 4)), "gate",
    ),
    "repeats are tiles": Fault(
        legalize_repeats, "aten.unsqueeze.default, x, dim + 1)", "aten.unsqueeze.default, x, dim)",
        made_by(lambda x: x.repeat_interleave(2, 1) * 2, 2, 3, 4), "shapes",
    ),
    "savings are counted wrong": Fault(
        eliminate_dead, "saved_nodes=saved.calls", "saved_nodes=1", dead_chain, "harness", "saved_nodes",
    ),
}  # fmt: skip


def twice_random() -> Program:
    program = random_constant()
    product = program.results[0]
    first = product.args[1]
    at = {"before": program.output, "value_of": product}
    second = program.add_call(first.target, first.args, **at)
    total = program.add_call(
        aten.matmul.default, (product, program.add_call(aten.sub.Tensor, (first, second), **at)), **at
    )
    program.output.args = ((total,),)
    return program


def planted(fault: Fault) -> Pass[Program]:
    """The pass of a copy of the module in which the fault was planted."""
    source = inspect.getsource(fault.module)
    assert source.count(fault.old) == 1, "the fault must hit one place"
    twin = types.ModuleType(fault.module.__name__)
    exec(compile(source.replace(fault.old, fault.new), str(fault.module.__file__), "exec"), twin.__dict__)
    return next(
        each() for each in vars(twin).values()
        if isinstance(each, type) and issubclass(each, Pass) and each is not Pass
    )  # fmt: skip


def caught_by(applied: Pass[Program], program: Program) -> tuple[str, str]:
    """Which mechanism refuses, and its words; ``nothing`` if none does."""
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    try:
        run_pass(applied, program, gate=gate)
    except GateError as error:
        return "gate", error.message
    except InternalError as error:
        return "runner", error.message
    except RuntimeError as error:
        return "shapes", str(error)
    try:
        check_pass(applied, program)
    except AssertionError as error:
        return "harness", str(error)
    return "nothing", ""


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught_by_its_mechanism_when(name: str) -> None:
    fault = FAULTS[name]
    mechanism, words = caught_by(planted(fault), fault.subject())
    assert mechanism == fault.caught_by, words
    assert fault.words in words
    if mechanism == "gate":
        assert planted(fault).name in words, "the pass is named"


@pytest.mark.parametrize("name", [n for n in FAULTS if "random" not in n])
def test_nothing_is_caught_when_the_pass_is_sound(name: str) -> None:
    fault = FAULTS[name]
    unchanged = Fault(fault.module, fault.old, fault.old, fault.subject, "nothing")
    assert caught_by(planted(unchanged), fault.subject()) == ("nothing", "")


@pytest.mark.parametrize("name", [n for n in FAULTS if "random" in n])
def test_random_calls_stay_when_the_pass_is_sound(name: str) -> None:
    fault = FAULTS[name]
    changes, _ = planted(Fault(fault.module, fault.old, fault.old, fault.subject, "nothing")).run(fault.subject())
    assert changes == []
