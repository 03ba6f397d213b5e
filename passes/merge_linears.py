"""merge-linears: linears that read one value become one, whose result is split.

Before → after::

    %1 = linear(x, W, b)                        %1 = linear(x, [W; V; U], [b; c; 0])
    %2 = linear(x, V, c)                   →    %2 = split_with_sizes(%1, [m, n, k], -1)
    %3 = linear(x, U)                           %3, %4, %5 = %2[0], %2[1], %2[2]

Equation: the rows of a stacked weight compute what they compute alone. No multiplication more, none less.

Convolutions of one geometry without groups are merged likewise (1×1 ones above all), and products with stored weights.

Off unless asked for, with ``--set merge-linears.on=true``: one large product is faster than several small ones where
these are too small to fill the machine, and cutting its result costs a copy of it.

Does not apply when: only one such call reads the value; geometry, dtype or the width of the input differ; a convolution
has groups; a weight or bias is computed; a weight is read by another call (a second one would be stored). Those are
left out, and the others merged.

Numerical effect: exact up to rounding: a kernel may add in another order for another size.
Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2, where queries, keys and values are three products.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.artifact import Frozen
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.projections.projection import PROJECTIONS, Projection, emit, projection_of, why_shared

aten = torch.ops.aten
_PATTERN = "linears of one value"


class MergeLinearsOptions(Frozen):
    """Whether linears are merged.

    Attributes:
        on: Merge linears and convolutions that read one value.
    """

    on: bool = False


class MergeLinears(Pass[Program]):
    """Linears that read one value become one, whose result is split."""

    name: ClassVar[str] = "merge-linears"
    stage: ClassVar[Stage] = "reparameterize"
    effect: ClassVar[Effect] = "exact"
    Options: ClassVar[type[Frozen]] = MergeLinearsOptions

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        assert isinstance(self.options, MergeLinearsOptions)
        if not self.options.on:
            return
        for node in ir.graph.nodes:
            calls = _readers(node)
            if len(calls) < 2:
                continue
            groups, misses = _groups(ir, node, calls)
            yield from misses
            for group in groups:
                nodes = tuple(each.node for each in group)
                yield Match(nodes[0], nodes)

    def apply(self, ir: Program, match: Match) -> Change:
        before, parameters = len(ir.calls()), parameters_stored(ir)
        group = [_projection(ir, node) for node in match.nodes]
        where = tuple(dict.fromkeys(provenance.module_path(node) for node in match.nodes))
        what = f"{len(group)} {dialect.plain_name(match.node)}s of one value merged"
        _merge(ir, group)
        return Change(
            what=what, where=where, saved_nodes=before - len(ir.calls()),
            saved_parameters=parameters - parameters_stored(ir),
        )  # fmt: skip


def _readers(value: Node) -> list[Node]:
    """Projections that read a value, stored weight or not, in the order of the graph."""
    if value.op not in ("placeholder", "call_function") or len(value.users) < 2:
        return []
    calls = [user for user in value.users if dialect.op_name(user) in PROJECTIONS and _x(user) is value]
    if len(calls) < 2:
        return []
    order = {node: i for i, node in enumerate(value.graph.nodes)}
    return sorted(calls, key=order.__getitem__)


def _x(call: Node) -> Any:
    return dialect.operands(call)[1 if dialect.op_name(call) == "aten.addmm.default" else 0]


def _projection(ir: Program, node: Node) -> Projection:
    found = projection_of(ir, node)
    assert isinstance(found, Projection)
    return found


def _groups(ir: Program, value: Node, calls: list[Node]) -> tuple[list[list[Projection]], list[NearMiss]]:
    """Those that can be one call, and why the others cannot."""
    kinds: dict[Any, list[Projection]] = {}
    misses = []
    for call in calls:
        found = projection_of(ir, call)
        reason = found if isinstance(found, str) else _why_not(ir, value, found)
        if reason or isinstance(found, str):
            misses.append(NearMiss(_PATTERN, call, reason))
        else:
            kinds.setdefault(_kind(ir, found), []).append(found)
    for group in kinds.values():
        if len(group) == 1:
            reason = "another one of the same value has another geometry or dtype"
            misses += [NearMiss(_PATTERN, group[0].node, reason)] if len(kinds) > 1 else []
    return [group for group in kinds.values() if len(group) > 1], misses


def _why_not(ir: Program, value: Node, found: Projection) -> str:
    name = dialect.plain_name(found.node)
    if found.is_convolution and dialect.operands(found.node)[-1] != 1:
        return f"the {name} has groups"
    if [operand for operand in dialect.operands(found.node) if operand is value] != [value]:
        return f"the {name} reads the value twice"
    return why_shared(ir, found)


def _kind(ir: Program, found: Projection) -> Any:
    """What must be equal for two calls to be one: operator, geometry, the weight's shape but for its outputs, dtype."""
    tensor = found.tensor(ir)
    shape = tuple(size for axis, size in enumerate(tensor.shape) if axis != found.out_axis)
    named = (found.x, found.weight, found.bias)
    rest = tuple(
        tuple(operand) if isinstance(operand, (list, tuple)) else operand
        for place, operand in enumerate(dialect.operands(found.node))
        if place not in named
    )
    return dialect.op_name(found.node), shape, tensor.dtype, rest


def _merge(ir: Program, group: list[Projection]) -> None:
    first = group[0]
    nodes = [each.node for each in group]
    weight = torch.cat([each.tensor(ir) for each in group], first.out_axis)
    sizes = [each.outputs(ir) for each in group]
    axis = first.channel_axis
    call = emit(ir, first, weight, _bias(ir, group), value_of=nodes[-1], merges=nodes[1:], suffix="merged")
    cut = ir.add_call(
        aten.split_with_sizes.default, (call, sizes, axis), before=first.node, value_of=nodes[-1], merges=nodes
    )
    pieces = [ir.add_call(operator.getitem, (cut, i), before=first.node, value_of=node) for i, node in enumerate(nodes)]
    for node, piece in zip(nodes, pieces, strict=True):
        ir.replace(node, piece)


def _bias(ir: Program, group: list[Projection]) -> Tensor | None:
    found = [ir.tensor_of(each.operand(each.bias)) for each in group]
    if all(each is None for each in found):
        return None
    parts = [
        torch.zeros(projection.outputs(ir), dtype=projection.tensor(ir).dtype) if bias is None else bias
        for projection, bias in zip(group, found, strict=True)
    ]
    return torch.cat(parts)
