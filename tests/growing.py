"""A Program that grows by one operator at a time from a captured seed with a dynamic batch, without another capture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.fx import Node

from vlexport.core.artifact import Signature, TensorSpec
from vlexport.frontends.capture import capture
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.ir.text import size_text

MAX_ELEMENTS = 600
"""Elements of one sample beyond which no operator may grow the value further."""


class _Seed(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.relu(image)


@functools.cache
def seed_program(shape: tuple[int, ...]) -> Program:
    return capture(_Seed().eval(), torch.zeros(2, *shape)).program


@dataclass
class Grower:
    """A Program under construction, and the source of every choice."""

    program: Program
    draw: Callable[[st.SearchStrategy[Any]], Any]
    generator: torch.Generator
    count: int = 0
    dead: set[Node] = field(default_factory=set)
    seen: list[Node] = field(default_factory=list)

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return self.draw(st.sampled_from(options))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append a call."""
        read = [a for a in [*args, *(args[0] if isinstance(args[0], list) else [])] if isinstance(a, Node)]
        value_of = next((n for n in read[:1] if n.op == "call_function"), self.program.calls()[0])
        return self.program.add_call(target, args, kwargs, before=self.program.output, value_of=value_of)

    def tensor(self, *shape: int, positive: bool = False, kind: Any = "parameter") -> Node:
        """Append a stored tensor: normal, or uniform in [0.3, 2]. Never all zero."""
        value = torch.randn(shape, generator=self.generator)
        if positive:
            value = torch.rand(shape, generator=self.generator) * 1.7 + 0.3
        self.count += 1
        return self.program.add_tensor(f"t{self.count}", value, before=self.program.output, kind=kind)

    @staticmethod
    def shape(node: Node) -> list[Any]:
        """Sizes without the batch."""
        return list(node.meta["val"].shape[1:])

    def small(self, node: Node) -> bool:
        """Whether the value may still grow."""
        elements = 1
        for size in self.shape(node):
            elements *= int(size)
        return elements <= MAX_ELEMENTS // 2


def finished(program: Program, results: list[Node], dead: set[Node]) -> Program:
    """Let the Program return ``results``; what nobody reads goes, but for ``dead``."""
    program.output.args = (tuple(results),)
    for node in reversed(list(program.graph.nodes)):
        unread = node.op in ("call_function", "get_attr") and not node.users and node not in dead
        if unread and node in program.graph.nodes:  # an earlier one may have taken it along
            program.erase_dead(node)
    names = program.symbol_names()
    outputs = tuple(
        TensorSpec(
            name="output" if i == 0 else f"output_{i}",
            dtype=str(node.meta["val"].dtype).removeprefix("torch."),
            shape=tuple(s if isinstance(s, int) else size_text(s, names) for s in node.meta["val"].shape),
        )
        for i, node in enumerate(results)
    )
    provenance.stamp(program.graph)
    old = program.signature
    program.signature = Signature(inputs=old.inputs, outputs=outputs, dims=old.dims)
    return program
