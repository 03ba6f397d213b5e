"""Deliberately broken passes, and the small net that they break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, randomize
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Match, NearMiss, Pass

aten = torch.ops.aten
Rewrite = Callable[[Program, Node], Node]
_DONE = "rewritten"


class Rewriting(Pass[Program]):
    """Replaces every call of one operator, once, by what ``rewrite`` makes of it."""

    name = "break-something"
    stage = "normalize"

    def __init__(self, operator: str, rewrite: Rewrite, *, name: str = "break-something") -> None:
        super().__init__()
        self.operator, self.rewrite = operator, rewrite
        self.name = name  # type: ignore[misc]

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls(self.operator):
            if self.name not in node.meta.get(_DONE, ()):
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        where = provenance.module_path(match.node)
        done = match.node.meta.get(_DONE, ())
        new = self.rewrite(ir, match.node)
        new.meta[_DONE] = (*done, self.name)
        ir.replace(match.node, new)
        for node in ir.calls(self.operator):
            node.meta[_DONE] = (*node.meta.get(_DONE, ()), self.name)
        return Change(what="broken", where=(where,))


class Whole(Pass[Program]):
    """Does something to the whole program in place of matching."""

    name = "break-everything"
    stage = "normalize"

    def __init__(self, work: Callable[[Program], object], *, says: int = 1) -> None:
        super().__init__()
        self.work, self.says = work, says

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        return iter(())

    def apply(self, ir: Program, match: Match) -> Change:
        raise NotImplementedError

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        self.work(ir)
        return [Change(what="everything")] * self.says, []


def again(ir: Program, node: Node, *args: Any, target: Any = None) -> Node:
    """A call beside ``node`` that claims to compute its value."""
    return ir.add_call(target or node.target, args, dict(node.kwargs), before=node, value_of=node)


def with_tensor(ir: Program, node: Node, position: int, change: Callable[[Tensor], Tensor]) -> Node:
    """``node`` again, with a changed copy of the stored tensor at ``position``."""
    old = ir.tensor_of(node.args[position])
    assert old is not None
    new = ir.add_tensor("changed", change(old), before=node)
    return again(ir, node, *node.args[:position], new, *node.args[position + 1 :])


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.offset


class Mix(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1) @ tokens


class Net(nn.Module):
    """Convolution, relu, sub, softmax, a slice and a square linear, each at its own module path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.shift, self.mix = nn.Conv2d(3, 4, 3), nn.ReLU(), Shift(), Mix()
        self.head = nn.Linear(4, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.act(self.stem(image))
        tokens = self.mix(self.shift(features).flatten(2)[:, :, 1:33].transpose(1, 2))
        logits = self.head(tokens.mean(1))
        return {"logits": logits, "doubled": logits * 2.0}


def net_program() -> Program:
    """A fresh Program of :class:`Net`."""
    torch.manual_seed(0)
    return captured(randomize(Net()), torch.randn(1, 3, 8, 8))


def operator_of(node: Node) -> str:
    """``aten.relu.default``."""
    return dialect.op_name(node)
