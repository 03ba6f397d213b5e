"""legalize-repeats: elements repeated a known number of times, in operators that every target has.

Before → after::

    repeat_interleave(x, 3, 1)            →    %1 = unsqueeze(x, 2)
                                               %2 = expand(%1, [-1,-1,3,-1])
                                               %3 = reshape(%2, [-1,3·n,m])
    repeat_interleave(x, @counts, 1)      →    index_select(x, 1, @counts_places)

Equation: ``y[n·i + k] = x[i]`` for ``k < n``; with a count for each element, ``y = x[p]`` where ``p`` holds every ``i``
as often as ``counts[i]`` says.

It stands before ``merge-layout``, which joins its reshape with what follows.

Does not apply when: the number of repeats, or the size of the axis where each element has its own, depends on the
input; two sizes of the result depend on the input; counts were given without ``output_size``, so that the size of the
result was captured as one that depends on data.
Numerical effect: none, bit for bit.
Source: coremltools 9.0 repeats by a number and along the first axis only (converters/mil/frontend/torch/ops.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

aten = torch.ops.aten
_BY_NUMBER, _BY_COUNTS = "aten.repeat_interleave.self_int", "aten.repeat_interleave.self_Tensor"
_PATTERN = "repeat_interleave"


class LegalizeRepeats(Pass[Program]):
    """Elements repeated a known number of times, in operators that every target has."""

    name: ClassVar[str] = "legalize-repeats"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls(_BY_NUMBER, _BY_COUNTS):
            reason = _why_not(ir, node)
            yield NearMiss(_PATTERN, node, reason) if reason else Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        before, where = len(ir.calls()), (provenance.module_path(node),)
        x, repeats, dim, _ = dialect.operands(node)
        if dim is None:
            x = x if x.meta["val"].ndim == 1 else _call(ir, node, aten.reshape.default, x, [-1])
            dim = 0
        dim %= x.meta["val"].ndim
        counts = ir.tensor_of(repeats)
        number = repeats if counts is None else int(counts) if counts.numel() == 1 else None
        if number is None:
            assert counts is not None
            places = torch.repeat_interleave(torch.arange(counts.numel()), counts)
            index = ir.add_tensor(f"{repeats.target}_places", places, before=node, kind="constant")
            new = _call(ir, node, aten.index_select.default, x, dim, index)
        else:
            rank = x.meta["val"].ndim
            wide = _call(ir, node, aten.unsqueeze.default, x, dim + 1)
            sizes = [number if axis == dim + 1 else -1 for axis in range(rank + 1)]
            new = _call(ir, node, aten.expand.default, wide, sizes)
            new = _call(ir, node, aten.reshape.default, new, _sizes(node))
        ir.replace(node, new)
        now = "index_select" if number is None else "expand"
        return Change(what=f"repeat_interleave written as {now}", where=where, saved_nodes=before - len(ir.calls()))


def _call(ir: Program, node: Node, target: Any, *args: Any) -> Node:
    return ir.add_call(target, args, before=node, value_of=node)


def _sizes(node: Node) -> list[int]:
    return [-1 if isinstance(size, torch.SymInt) else int(size) for size in node.meta["val"].shape]


def _why_not(ir: Program, node: Node) -> str:
    x, repeats, dim, _ = dialect.operands(node)
    shape = node.meta["val"].shape
    symbolic = sum(isinstance(size, torch.SymInt) for size in shape)
    if dialect.op_name(node) == _BY_NUMBER:
        if not isinstance(repeats, int):
            return "the number of repeats depends on the input"
        return "two sizes of its result depend on the input" if symbolic > 1 else _empty(shape)
    counts = ir.tensor_of(repeats)
    if counts is None:
        return "the number of repeats depends on the input"
    own = x.meta["val"].shape
    length: Any = own[dim] if dim is not None else own.numel()
    along = shape[0 if dim is None else dim]
    if isinstance(length, torch.SymInt) and counts.numel() > 1:
        return "the size of the repeated axis depends on the input"
    if isinstance(along, torch.SymInt) and not isinstance(length, torch.SymInt):
        return "its size was captured as one that depends on data: give repeat_interleave its output_size"
    return "two sizes of its result depend on the input" if symbolic > 1 else _empty(shape)


def _empty(shape: Any) -> str:
    return "its result is empty" if 0 in [s for s in shape if not isinstance(s, torch.SymInt)] else ""
