"""eliminate-round-trips: a layout operator and one that undoes it meet across the operators between, and go.

Before → after::

    %1 = permute(x, [0,2,3,1])                       %1 = gelu(x)
    %2 = gelu(%1)                              →     %2 = add(%1, @b_moved: f32[64,1,1])
    %3 = add(%2, @b: f32[64])
    %4 = permute(%3, [0,3,1,2])                      (gone)

    %1 = reshape(x, [-1,3136,96])                    %1 = layer_norm(x, [96])
    %2 = layer_norm(%1, [96])                  →     %2 = linear(%1, W)
    %3 = linear(%2, W)
    %4 = reshape(%3, [-1,56,56,384])                 (gone)

    chunk(x, 3, 2), and a permute of each piece  →   chunk(permute(x), 3, 3)

A region of operators works on the other layout: elementwise ones on operands that lie otherwise, softmax, mean, cat and
split along another axis, norms and linear where their axis is last in both (``passes/layout/axis_rules``). At its
edge layout operators come, go or merge (``passes/layout/region``). It is moved only if fewer of them are left, so that
nothing moves for nothing and the pass ends.

Equation: ``f ∘ P = P ∘ f'`` where ``f'`` is ``f`` along the axes that ``P`` takes to those of ``f``; ``P⁻¹ ∘ P = 1``.

It stands behind the other layout passes, which make chains short before any is compared with another.

Does not apply when: an operator between works along an axis that is no whole axis in the other layout, or needs it at
a place (a convolution; the last axis of a norm that a permute brought there); other readers between need the layout
as it is, so that as many layout operators would come as go; a merged reshape would need two sizes that depend on the
input; a stored tensor that others read would have to be stored a second time, with more than 4096 elements.
Multiply-accumulates stay the same.
Numerical effect: none but that sums may run in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.layout.axis_maps import AxisMap, Permute, steps
from vlexport.passes.layout.axis_rules import Moved, moved
from vlexport.passes.layout.region import Crossing, Plan, cheapest, regions_from
from vlexport.passes.layout.views import chains_to, emit, is_layout, map_of, shape_of, together

_PATTERN = "layout → … → layout"
COPY_LIMIT = 4096
"""Elements of a stored tensor that may be stored a second time."""


class EliminateRoundTrips(Pass[Program]):
    """A layout operator and one that undoes it meet across the operators between, and go."""

    name: ClassVar[str] = "eliminate-round-trips"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if not is_layout(node):
                continue
            plans = [p for r in regions_from(node) if (p := cheapest(r)) is not None and p.gain > 0]
            best = max(plans, key=lambda p: p.gain, default=None)
            if best is not None and _stores_little(ir, best):
                yield Match(node, best.nodes, best)
            elif best is not None:
                yield NearMiss(_PATTERN, node, "a large stored tensor that others read would be stored a second time")
            else:
                yield from _blocked(node)

    def apply(self, ir: Program, match: Match) -> Change:
        plan: Plan = match.data
        calls, elements = len(ir.calls()), _elements(ir)
        where = tuple(provenance.module_path(n) for n in plan.region.held)
        crossed = [dialect.plain_name(n) for c in (*plan.entries.values(), *plan.exits) for n in c.chain]
        what = " and ".join(sorted(set(crossed)))
        _Move(ir, plan).run()
        return Change(
            what=f"{what} met across other operators", where=where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=elements - _elements(ir),
        )  # fmt: skip


class _Move:
    """One move in progress.

    Attributes:
        made: Value in this layout → what was made of it in the other.
    """

    def __init__(self, ir: Program, plan: Plan) -> None:
        self.ir = ir
        self.plan = plan
        self.made: dict[tuple[Node, AxisMap], Node] = {}

    def run(self) -> None:
        region = self.plan.region
        order = [n for n in self.ir.graph.nodes if n in region.held]
        for node in order:
            self.move(node, region.held[node])
        for crossing in self.plan.exits:
            last = crossing.chain[-1]
            source = self.value(crossing.value)
            new = emit(self.ir, crossing.calls, source, before=last, value_of=last, merges=crossing.chain[:-1])
            if not crossing.calls:
                provenance.inherit(new, value_of=crossing.value, merges=(new, *crossing.chain))
            last.replace_all_uses_with(new)
        for crossing in self.plan.kept:
            value = crossing.value
            new = emit(self.ir, crossing.calls, self.value(value), before=value, value_of=value)
            value.replace_all_uses_with(new)
        dead = [c.chain[-1] for c in self.plan.exits] + [v for n in reversed(order) for v in (*n.users, n)]
        for node in dict.fromkeys(dead):
            if node in self.ir.graph.nodes:
                self.ir.erase_dead(node)

    def value(self, value: Node) -> Node:
        return self.made[value, self.plan.region.maps[value]]

    def move(self, node: Node, how: Moved) -> None:
        """Insert ``node`` on the other layout before it."""
        swapped = {each: self.operand(each, own, node) for each, own in how.operands.items()}
        given = list(dialect.operands(node)[: max([len(node.args), *(p + 1 for p in how.arguments)])])
        for place, argument in how.arguments.items():
            given[place] = argument
        args, kwargs = map_arg((tuple(given), dict(node.kwargs)), lambda n: swapped.get(n, n))
        new = self.ir.add_call(node.target, args, kwargs, before=node, value_of=node)  # type: ignore[arg-type]
        if not isinstance(how.result, tuple):
            self.made[node, how.result] = new
            return
        for item in list(node.users):
            index = cast("int", item.args[1])
            piece = self.ir.add_call(item.target, (new, index), before=item, value_of=item)  # type: ignore[arg-type]
            self.made[item, how.result[index]] = piece

    def operand(self, operand: Node, axes: AxisMap, reader: Node) -> Node:
        """What the region reads in place of an operand."""
        key = operand, axes
        if key not in self.made:
            crossing = self.plan.entries.get(key)
            if crossing is None:
                self.made[key] = self.stored(operand, axes, reader)
            else:
                self.made[key] = self.entry(crossing, reader)
        return self.made[key]

    def entry(self, crossing: Crossing, reader: Node) -> Node:
        value = crossing.value
        source = cast("Node", crossing.chain[0].args[0]) if crossing.chain else value
        if not crossing.calls:
            return source
        of = value if value.op == "call_function" else reader
        return emit(self.ir, crossing.calls, source, before=reader, value_of=of, merges=crossing.chain[:-1])

    def stored(self, operand: Node, axes: AxisMap, reader: Node) -> Node:
        old = self.ir.tensors[str(operand.target)]
        new = _in_other_layout(old, axes)
        if new is None:
            return operand
        return self.ir.add_tensor(
            f"{operand.target}_moved", new, before=reader, kind=self.ir.kinds[str(operand.target)]
        )


def _in_other_layout(tensor: torch.Tensor, axes: AxisMap) -> torch.Tensor | None:
    """A stored tensor as the other layout broadcasts it; None where that is the tensor itself."""
    value = tensor.reshape((1,) * (len(axes.target) - tensor.ndim) + tuple(tensor.shape))
    for step in steps(axes.inverse())[0]:
        value = value.permute(step.dims) if isinstance(step, Permute) else value.reshape([int(s) for s in step.sizes])
    while value.ndim > tensor.ndim and value.shape[0] == 1:
        value = value[0]
    if value.shape == tensor.shape and axes.in_order:
        return None
    return value.clone(memory_format=torch.contiguous_format)


def _stores_little(ir: Program, plan: Plan) -> bool:
    """Whether stored tensors that others read as well are small."""
    large = 0
    for node, axes in plan.stored:
        tensor = ir.tensors[str(node.target)]
        shared = any(user not in plan.region.held for user in node.users)
        if shared and _in_other_layout(tensor, axes) is not None:
            large = max(large, tensor.numel())
    return large <= COPY_LIMIT


def _elements(ir: Program) -> int:
    return sum(t.numel() for t in ir.used_tensors().values() if t.is_floating_point())


def _blocked(node: Node) -> Iterator[NearMiss]:
    """Where one operator stands between two that would meet: why it cannot be moved."""
    own = map_of(node)
    for reader in node.users if own is not None else ():
        if reader.op != "call_function" or is_layout(reader) or not isinstance(reader.meta["val"], torch.Tensor):
            continue
        meets = [u for u in reader.users if is_layout(u) and shape_of(reader) == shape_of(node)]
        chains = [chains_to(u)[0] for u in meets]
        wholes: list[Any] = [together(own, c.axes) for c in chains]
        if any(w is not None and len(steps(w)[0]) < 2 for w in wholes):
            how = moved(reader, node, cast("AxisMap", own))
            reason = how if isinstance(how, str) else "as many layout operators would come as go"
            yield NearMiss(_PATTERN, node, reason)
            return
