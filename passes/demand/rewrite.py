"""The rewrite of a region: every call in it is made again for the pieces that are read."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.demand.analysis import Region
from vlexport.passes.demand.box import Box, Drawn, Rows
from vlexport.passes.demand.drawn import compute_first, drawn_out
from vlexport.passes.demand.site import Narrowing, Read, Site

aten = torch.ops.aten
_NARROWED = re.compile(r"_narrowed(?=\.|$)")


class Rewrite:
    """One region's rewrite, in place.

    Args:
        program: It is changed.
        region: Found in the program as it is, or as it was before other regions were rewritten.
    """

    def __init__(self, program: Program, region: Region) -> None:
        self.program = program
        self.region = region
        self._made: dict[Node, list[tuple[Box, Node]]] = {}
        self._cut: dict[tuple[Node, Box], Node] = {}
        self._stored: dict[tuple[str, Box], Node] = {}

    def run(self) -> None:
        """Make the narrowed calls, let the rest of the graph read them, and erase what nobody reads any more."""
        for drawn in self._drawn():
            compute_first(self.program, drawn.samples, drawn.places)
        for node, pieces in self.region.pieces.items():
            self._made[node] = [(each.gives, self._call(node, each)) for each in pieces]
        for node in self.region.ends:
            ((_, new),) = self._made[node]
            self.program.replace(node, new)

    def _drawn(self) -> set[Drawn]:
        """The rows that the input decides, which are read before all others."""
        reads = (read for pieces in self.region.pieces.values() for each in pieces for read in each.reads)
        return {read.box.drawn for read in reads if read.box.drawn is not None}

    def _call(self, node: Node, narrowing: Narrowing) -> Node:
        site = Site(self.program, node)
        if narrowing.target is aten.select.int:
            return self._selected(site, *narrowing.operands)
        operands = [self._operand(site, each) for each in narrowing.operands]
        if narrowing.target is None:
            found: Node = operands[0]
            return found
        args, kwargs = dialect.arguments(narrowing.target, operands)
        return self.program.add_call(narrowing.target, args, kwargs, before=node, value_of=node)

    def _selected(self, site: Site, read: Any, axis: int, row: Any) -> Node:
        """A select reads its row where it lies: no slice of one row is made for it."""
        if not isinstance(row, int) or read.box.drawn is not None or (read.box.rows(axis) is None and row != 0):
            args = tuple(self._operand(site, each) for each in (read, axis, row))
            return self.program.add_call(aten.select.int, args, before=site.node, value_of=site.node)
        source, box = self._source(site.operand(*read.place), read.box)
        row = (box.rows(axis) or (0,))[0]
        others = box.on(a for a, _ in box.axes if a != axis)
        source = self._slice(source, others, site.node)
        return self.program.add_call(aten.select.int, (source, axis, row), before=site.node, value_of=site.node)

    def _operand(self, site: Site, operand: Any) -> Any:
        if isinstance(operand, list):
            return [self._operand(site, each) for each in operand]
        if isinstance(operand, Tensor):
            return self.program.add_tensor("narrowed", operand, before=site.node, kind="constant")
        if isinstance(operand, Read):
            return self._part(site.operand(*operand.place), operand.box, site.node)
        return operand

    def _part(self, node: Node, box: Box, reader: Node) -> Node:
        """The part ``box`` of the value of ``node``, to be read where ``reader`` stands."""
        if not box.is_whole and (tensor := self.program.tensor_of(node)) is not None:
            if box.axes:
                node = self._narrowed_tensor(str(node.target), tensor, box.known(), reader)
            return self._slice(node, Box((), box.drawn), reader)
        source, box = self._source(node, box)
        return self._slice(source, box, reader)

    def _source(self, node: Node, box: Box) -> tuple[Node, Box]:
        """The narrowed call that computes a part of the value of ``node``, and where in its value that part lies."""
        for gives, made in self._made.get(node, []):
            if gives.contains(box):
                return made, box.within(gives)
        return node, box

    def _slice(self, node: Node, box: Box, reader: Node) -> Node:
        for axis, rows in box.axes:
            part = Box(((axis, rows),))
            if (node, part) not in self._cut:
                self._cut[node, part] = self._cut_out(node, axis, rows, reader)
            node = self._cut[node, part]
        if box.drawn is not None:
            part = Box((), box.drawn)
            if (node, part) not in self._cut:
                value_of = node if node.op == "call_function" else reader
                self._cut[node, part] = drawn_out(self.program, node, box.drawn, before=reader, value_of=value_of)
            node = self._cut[node, part]
        return node

    def _cut_out(self, node: Node, axis: int, rows: Rows, reader: Node) -> Node:
        value_of = node if node.op == "call_function" else reader
        step = _step(rows)
        if step is not None:
            args: tuple[Any, ...] = (node, axis, rows[0], rows[-1] + 1, *((step,) if step > 1 else ()))
            return self.program.add_call(aten.slice.Tensor, args, before=reader, value_of=value_of)
        index = self.program.add_tensor("narrowed_rows", torch.tensor(rows), before=reader, kind="constant")
        return self.program.add_call(aten.index_select.default, (node, axis, index), before=reader, value_of=value_of)

    def _narrowed_tensor(self, name: str, tensor: Tensor, box: Box, reader: Node) -> Node:
        if (name, box) not in self._stored:
            part = tensor
            for axis, rows in box.axes:
                part = part.index_select(axis, torch.tensor(rows, device=part.device))
            new = self.program.add_tensor(
                _narrowed_name(name), part.clone(), before=reader, kind=self.program.kinds[name]
            )
            self._stored[name, box] = new
        return self._stored[name, box]


def _step(rows: Rows) -> int | None:
    """The distance between indices; None where it is not the same everywhere."""
    steps = {b - a for a, b in itertools.pairwise(rows)} or {1}
    return steps.pop() if len(steps) == 1 else None


def _narrowed_name(name: str) -> str:
    """``blocks.11.mlp.fc1_narrowed.weight`` for a module's weight: it lies beside the module, not below the tensor."""
    parent, _, leaf = _NARROWED.sub("", name).rpartition(".")
    return f"{parent}_narrowed.{leaf}" if parent else f"{leaf}_narrowed"
