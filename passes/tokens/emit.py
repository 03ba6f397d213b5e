"""Writing calls in front of a node, all of them standing for one value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.recorded import Recorded

aten = torch.ops.aten
TO_THE_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Emit:
    """Writes calls.

    Attributes:
        program: It is changed.
        before: Where calls go.
        value_of: Whose provenance they carry.
        recorded: Knows the values of calls.
    """

    program: Program
    before: Node
    value_of: Node
    recorded: Recorded

    def __call__(self, target: Any, *operands: Any) -> Node:
        """A call; operands in the order of the schema."""
        args, kwargs = dialect.arguments(target, operands)
        return self._call(target, args, kwargs)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        value = self.recorded.called(target, args, kwargs)
        return self.program.add_call(
            target, args, kwargs, before=self.before, value_of=self.value_of, value=value
        )  # fmt: skip

    def stored(self, name: str, tensor: Tensor) -> Node:
        """A constant, stored once however often it is asked for under its name."""
        kept = self.program.tensors.get(name)
        if kept is not None and kept.dtype is tensor.dtype and torch.equal(kept, tensor):
            for node in self.program.graph.find_nodes(op="get_attr", target=name):
                if node < self.before:
                    found: Node = node
                    return found
        return self.program.add_tensor(name, tensor, before=self.before, kind="constant")

    def numbers(self, count: int) -> Node:
        """0 to count − 1, int64."""
        return self.stored(f"tokens_{count}", torch.arange(count))

    def item(self, values: Node, place: int) -> Node:
        """One of several values."""
        return self._call(operator.getitem, (values, place), {})

    def cut(self, value: Node, axis: int, start: int, end: int = TO_THE_END) -> Node:
        """A slice; the value itself where that is all of it."""
        if start == 0 and end == TO_THE_END:
            return value
        return self(aten.slice.Tensor, value, axis, start, end, 1)

    def every(self, value: Node, axis: int, start: int, step: int) -> Node:
        """Every so many."""
        return self(aten.slice.Tensor, value, axis, start, TO_THE_END, step)

    def joined(self, values: Sequence[Node], axis: int) -> Node:
        """Concatenated; the value itself where there is one."""
        return values[0] if len(values) == 1 else self(aten.cat.default, list(values), axis)

    def rows(self, value: Node, index: Node) -> Node:
        """Rows [batch, k, channels] of a value [batch, n, channels], at an index [batch, k]."""
        wide = self(aten.expand.default, self(aten.unsqueeze.default, index, -1), [-1, -1, size(value, 2)])
        return self(aten.gather.default, value, 1, wide)

    def one_hot(self, index: Node, count: int, like: Node) -> Node:
        """Rows [batch, k, count] that are 1 at an index [batch, k] and else 0, in the dtype of ``like``."""
        hit = self(aten.eq.Tensor, self(aten.unsqueeze.default, index, -1), self.numbers(count))
        return self.cast(hit, like)

    def cast(self, value: Node, like: Node) -> Node:
        """In the dtype of ``like``."""
        dtype = like.meta["val"].dtype
        return self._call(aten._to_copy.default, (value,), {"dtype": dtype})


def size(node: Node, axis: int) -> int:
    """A static size of a value."""
    return int(node.meta["val"].shape[axis])
