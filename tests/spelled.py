"""Programs that are written call by call in float64, so that a spelling costs no capture.

:class:`Writer` draws where a spelling has a choice: the order of operands, a number or a stored tensor of one element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from vlexport.frontends.capture import capture
from vlexport.ir.program import Program
from vlexport.passes.base import Match, NearMiss, Pass
from vlexport.passes.pipeline import verify

aten = torch.ops.aten
EXACT = 1e-12
"""Relative error in float64 of two spellings that are equal in exact arithmetic."""


def examples(count: int) -> settings:
    """Always the same examples, without a limit of time for one: other work on the machine decides nothing."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate])


class _Seed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@functools.cache
def _seed(shape: tuple[int, ...]) -> Program:
    return capture(_Seed().eval(), torch.zeros(2, *shape)).program.double()


class Writer:
    """A Program of one input ``x`` (a dynamic batch, then ``shape``) under construction, and the source of choices.

    Args:
        shape: Sizes without the batch.
        draw: Hypothesis' own; None takes the first of all options.
    """

    def __init__(self, shape: tuple[int, ...], draw: Callable[..., Any] | None = None) -> None:
        self.program = _seed(shape).copy()
        self.draw = draw
        self.generator = torch.Generator().manual_seed(0)
        self.x = self.program.placeholders[0]
        self._relu = self.program.calls()[0]

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return self.draw(st.sampled_from(options)) if self.draw is not None else options[0]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append a call."""
        return self.program.add_call(target, args, kwargs, before=self.program.output, value_of=self._relu)

    def tensor(self, *shape: int) -> Node:
        """Store a tensor of normal values."""
        return self.stored(torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def stored(self, value: Tensor) -> Node:
        """Store a tensor."""
        return self.program.add_tensor("stored", value.double(), before=self.program.output)

    def number(self, value: float) -> Any:
        """A number, or a stored tensor of one element."""
        kind = self.pick("plain", "plain", "no dims", "one dim")
        if kind == "plain":
            return value
        return self.stored(torch.tensor(value if kind == "no dims" else [value], dtype=torch.float64))

    def commuted(self, target: Any, a: Any, b: Any) -> Node:
        """``a`` and ``b`` in either order; a plain number stays behind."""
        swap = isinstance(b, Node) and self.pick(False, True)
        return self.call(target, b, a) if swap or not isinstance(a, Node) else self.call(target, a, b)

    def times(self, a: Node, factor: float) -> Node:
        """``a`` times a number, or divided by its reciprocal."""
        if self.pick(False, True):
            return self.call(aten.div.Tensor, a, self.number(1.0 / factor))
        return self.commuted(aten.mul.Tensor, a, self.number(factor))

    def plus(self, a: Node, number: float) -> Node:
        """``a`` and a number."""
        if self.pick(False, True):
            return self.call(aten.sub.Tensor, a, self.number(-number))
        return self.commuted(aten.add.Tensor, a, self.number(number))

    def product(self, a: Node, b: Node) -> Node:
        """``a`` times ``b`` in either order."""
        return self.commuted(aten.mul.Tensor, a, b)

    def sum(self, a: Node, b: Node) -> Node:
        """``a`` and ``b`` in either order."""
        return self.commuted(aten.add.Tensor, a, b)

    def square(self, a: Node) -> Node:
        """``a`` times itself."""
        spelling = self.pick("pow", "square", "mul")
        if spelling == "pow":
            return self.call(aten.pow.Tensor_Scalar, a, self.pick(2, 2.0))
        return self.call(aten.square.default, a) if spelling == "square" else self.call(aten.mul.Tensor, a, a)

    def finished(self, result: Node) -> Program:
        """The Program that returns ``result``."""
        self.program.output.args = ((result,),)
        while unread := [n for n in self.program.graph.nodes if n.op in ("call_function", "get_attr") and not n.users]:
            self.program.erase_dead(unread[-1])
        return self.program


def raised(applied: Pass[Program], program: Program) -> tuple[list[str], float]:
    """Operators after the pass (``aten.`` and ``.default`` left out), and the relative error of the result."""
    after = program.copy()
    applied.run(after)
    verify(after, made_by=applied.name)
    assert not [f for f in applied.find(after) if isinstance(f, Match)], "no fixed point"
    sizes = tuple(int(s) for s in program.placeholders[0].meta["val"].shape[1:])
    x = torch.randn(3, *sizes, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2
    want, have = program.run(x)[0], after.run(x)[0]
    assert have.shape == want.shape
    error = float((have - want).abs().max() / want.abs().max())
    return [str(n.target).removeprefix("aten.").removesuffix(".default") for n in after.calls()], error


def left(applied: Pass[Program], program: Program) -> list[str]:
    """Why the pass leaves a program as it is, provided that it does."""
    found = list(applied.find(program))
    assert not [f for f in found if isinstance(f, Match)], "it matches"
    return [f.reason for f in found if isinstance(f, NearMiss)]
