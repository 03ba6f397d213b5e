"""How a rewrite of one call puts others in its place."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir.program import Program
from vlexport.passes.tokens.recorded import Recorded

aten = torch.ops.aten


@dataclass(frozen=True)
class Writer:
    """Writes calls in front of the one whose value they compute.

    Attributes:
        ir: The Program.
        at: The call that is rewritten.
        merges: Further calls that the new ones stand for.
    """

    ir: Program
    at: Node
    merges: Sequence[Node] = ()

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One call."""
        value = self._recorded.called(target, args, kwargs)
        return self.ir.add_call(
            target, args, kwargs, before=self.at, value_of=self.at, merges=self.merges, value=value
        )  # fmt: skip

    @cached_property
    def _recorded(self) -> Recorded:
        return Recorded(self.ir)

    def stored(self, name: str, tensor: Tensor) -> Node:
        """A constant."""
        return self.ir.add_tensor(name, tensor, before=self.at, kind="constant")

    def places(self, size: int, *, behind: int = 0) -> Node:
        """The numbers below ``size``, i64, with so many axes of size 1 behind."""
        return self.stored(f"places_{size}", torch.arange(size).reshape(size, *(1 for _ in range(behind))))

    def item(self, several: Node, which: int) -> Node:
        """One of several values."""
        return self(operator.getitem, several, which)


def shape_of(node: Node) -> tuple[Any, ...]:
    """The recorded sizes of a value; those that the input decides are symbolic."""
    return tuple(node.meta["val"].shape)


def wide(writer: Writer, index: Node, axis: int, like: Node) -> Node:
    """``index`` with one value for each element along ``axis``, the last but one of ``like``, as gather wants it.

    Args:
        writer: Where it is written.
        index: As ``like`` up to ``axis``.
        axis: Of ``like``, ≥ 0.
        like: Gives the sizes behind ``axis``, which are known.
    """
    behind = shape_of(like)[axis + 1 :]
    for _ in behind:
        index = writer(aten.unsqueeze.default, index, -1)
    return writer(aten.expand.default, index, [*(-1 for _ in range(axis + 1)), *behind]) if behind else index
