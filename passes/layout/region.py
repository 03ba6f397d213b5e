"""Regions of operators that may all work on another layout, and what moving one costs in layout operators.

A region grows from a layout operator: forward over its readers, or backward over what it reads. At its edge

- an operand that a chain of layout operators makes may be made by a shorter one,
- a stored tensor is brought into the other layout now, at no cost,
- any other operand needs layout operators,
- a chain of layout operators that reads a value of the region may become shorter, and
- any other reader needs layout operators.

What does not pay is given back: from its edges inwards, every operator goes without which the region costs no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from vlexport.passes.layout.axis_maps import AxisMap, Permute, Step, permuted, reshaped, steps
from vlexport.passes.layout.axis_rules import Moved, keeps_shape, moved, resized
from vlexport.passes.layout.views import Chain, calls_of, chains_to, entries_of, is_layout, map_of, shape_of, together

LARGEST = 40
"""Operators of a region."""


@dataclass(frozen=True)
class Crossing:
    """Layout operators at the edge of a region.

    Attributes:
        value: What a region reads, or what others read of it.
        chain: The chain that goes, empty where none does.
        calls: What is written instead.
        gone: How many operators go.
    """

    value: Node
    chain: tuple[Node, ...]
    calls: tuple[Any, ...]
    gone: int

    @property
    def cost(self) -> int:
        """Operators more."""
        return len(self.calls) - self.gone


@dataclass
class Region:
    """Operators that work on another layout.

    Attributes:
        held: Operator → how it works there.
        maps: Value (of an operator, or of one of its several results) → the map from there to here.
    """

    held: dict[Node, Moved] = field(default_factory=dict)
    maps: dict[Node, AxisMap] = field(default_factory=dict)

    def add(self, node: Node, how: Moved) -> bool:
        """Take an operator in, unless it needs an operand otherwise than the region has it."""
        if any(self.maps.get(each, own) != own for each, own in how.operands.items()):
            return False
        self.held[node] = how
        if isinstance(how.result, tuple):
            for item in node.users:
                self.maps[item] = how.result[item.args[1]]  # type: ignore[index]
        else:
            self.maps[node] = how.result
        return True

    def without(self, node: Node) -> Region:
        """A region with one operator less."""
        left = Region({n: h for n, h in self.held.items() if n is not node}, dict(self.maps))
        for value in _values(node):
            left.maps.pop(value, None)
        return left

    def readers(self, value: Node) -> list[Node]:
        """Operators of the region that read a value."""
        return [user for user in value.users if user in self.held]


@dataclass(frozen=True)
class Plan:
    """A region and all that crosses its edge.

    Attributes:
        region: The operators.
        entries: Operand, and the map of it that is needed → how it is made.
        exits: Chains that read a value of the region.
        kept: Values of the region that others read as they are, made from it again.
        stored: Stored tensors that are brought into the other layout.
    """

    region: Region
    entries: dict[tuple[Node, AxisMap], Crossing]
    exits: tuple[Crossing, ...]
    kept: tuple[Crossing, ...]
    stored: tuple[tuple[Node, AxisMap], ...]

    @property
    def gain(self) -> int:
        """How many operators fewer."""
        return -sum(c.cost for c in (*self.entries.values(), *self.exits, *self.kept))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Everything that the move reads or changes."""
        found: dict[Node, None] = {}
        for node in self.region.held:
            found.update(dict.fromkeys((node, *_values(node))))
            found.update(dict.fromkeys(n for n in node.all_input_nodes if n.op == "call_function"))
        for crossing in (*self.entries.values(), *self.exits):
            found.update(dict.fromkeys(crossing.chain))
            found.update(dict.fromkeys(n for c in crossing.chain[:1] for n in c.all_input_nodes if n.op[0] == "c"))
        return tuple(found)


def _values(node: Node) -> list[Node]:
    """The nodes that hold what a call makes."""
    return list(node.users) if isinstance(node.meta["val"], (tuple, list)) else [node]


def regions_from(node: Node) -> Iterator[Region]:
    """Regions that may grow from a layout operator."""
    for last in _last_maps(node):
        region = Region()
        _grow_forward(region, node, last)
        if region.held:
            yield region
    operand = node.args[0]
    if isinstance(operand, Node) and operand.op == "call_function" and not is_layout(operand):
        own = map_of(node)
        if own is not None:
            region = Region()
            _grow_backward(region, operand, own.inverse())
            if region.held:
                yield region


def _last_maps(node: Node) -> Iterator[AxisMap]:
    """Maps of the last operator of a chain, in each of its shortest spellings."""
    seen: set[AxisMap] = set()
    for chain in chains_to(node):
        for spelling in chain.spellings:
            own = _last_step(chain, spelling)
            if own is not None and own not in seen:
                seen.add(own)
                yield own


def _last_step(chain: Chain, spelling: tuple[Step, ...]) -> AxisMap | None:
    if chain.axes is None or not spelling:
        return None
    sizes = chain.axes.before
    last: AxisMap | None = None
    for step in spelling:
        if isinstance(step, Permute):
            last = permuted(sizes, step.dims)
            sizes = tuple(sizes[d] for d in step.dims)
        else:
            last = reshaped(sizes, step.sizes)
            sizes = step.sizes
    return last


def _grow_forward(region: Region, start: Node, axes: AxisMap) -> None:
    pending: list[tuple[Node, AxisMap]] = [(start, axes)]
    while pending and len(region.held) < LARGEST:
        value, own = pending.pop(0)
        for reader in value.users:
            if reader.op != "call_function" or reader in region.held or is_layout(reader) or _is_item(reader):
                continue
            how = moved(reader, value, own)
            if isinstance(how, Moved) and how.operands.get(value) == own and region.add(reader, how):
                pending.extend((v, m) for v in _values(reader) if not (m := region.maps[v]).is_identity)


def _grow_backward(region: Region, start: Node, axes: AxisMap) -> None:
    """Upwards over what keeps its shape, and over the cut that pieces come from."""
    pending: list[tuple[Node, AxisMap]] = [(start, axes)]
    while pending and len(region.held) < LARGEST:
        value, own = pending.pop(0)
        if value.op != "call_function" or value in region.held or is_layout(value):
            continue
        if _is_item(value):
            _take_cut(region, value, own)
            continue
        if not keeps_shape(value):
            continue
        first = value.args[0] if isinstance(value.args[0], Node) else value.all_input_nodes[0]
        how = next((h for n in (first, *value.all_input_nodes) if isinstance(h := moved(value, n, own), Moved)), None)
        if how is not None and how.result == own and region.add(value, how):
            pending.extend(how.operands.items())


def _take_cut(region: Region, item: Node, own: AxisMap) -> None:
    cut = item.args[0]
    if not isinstance(cut, Node) or cut in region.held:
        return
    value = cut.args[0]
    if not isinstance(value, Node):
        return
    sizes, whole = shape_of(item), shape_of(value)
    dims = [d for d in range(len(whole)) if sizes[d] != whole[d]] if len(sizes) == len(whole) else []
    axes = resized(own, dims[0], whole[dims[0]]) if len(dims) == 1 else None
    how = moved(cut, value, axes) if axes is not None else ""
    if isinstance(how, Moved):
        region.add(cut, how)


def _is_item(node: Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload)


def plan_of(region: Region) -> Plan | None:
    """What a region costs; None where something that it needs cannot be written."""
    entries: dict[tuple[Node, AxisMap], Crossing] = {}
    stored: dict[tuple[Node, AxisMap], None] = {}
    for how in region.held.values():
        for operand, axes in how.operands.items():
            if operand in region.maps:
                if region.maps[operand] != axes:
                    return None
            elif operand.op == "get_attr":
                stored[operand, axes] = None
            elif (operand, axes) not in entries:
                entry = _entry(region, operand, axes)
                if entry is None:
                    return None
                entries[operand, axes] = entry
    exits: list[Crossing] = []
    kept: list[Crossing] = []
    for value, axes in region.maps.items():
        others = [user for user in value.users if user not in region.held]
        found = [_exit(region, user, axes) if is_layout(user) else None for user in others]
        if any(each is None for each in found):
            calls = _written(axes, axes.before)
            if calls is None:
                return None
            kept.append(Crossing(value, (), calls, 0))
            found = [each for each in found if each is not None and each.cost < 0]
        exits.extend(each for each in found if each is not None)
    return Plan(region, entries, tuple(exits), tuple(kept), tuple(stored))


def _written(axes: AxisMap, before: tuple[Any, ...], entries: Any = None) -> tuple[Any, ...] | None:
    for spelling in steps(axes):
        calls = calls_of(spelling, before, entries)
        if calls is not None:
            return tuple(calls)
    return None


def _entry(region: Region, operand: Node, axes: AxisMap) -> Crossing | None:
    """The cheapest way to make an operand of the region."""
    back = axes.inverse()
    if len(back.source) != len(shape_of(operand)):  # a broadcast operand of lower rank
        lifted = _lifted(operand, back)
        if lifted is None:
            return None
        back = lifted
    calls = _written(back, shape_of(operand))
    best = Crossing(operand, (), calls, 0) if calls is not None else None
    goes = all(user in region.held for user in operand.users)
    for chain in chains_to(operand) if is_layout(operand) else ():
        if any(n in region.maps for n in (chain.source, *chain.nodes)):
            break
        whole = together(chain.axes, back)
        calls = _written(whole, shape_of(chain.source)) if whole is not None else None
        if calls is not None:
            each = Crossing(operand, chain.nodes, calls, min(chain.private, len(chain.nodes)) if goes else 0)
            best = each if best is None or each.cost < best.cost else best
    return best


def _lifted(operand: Node, back: AxisMap) -> AxisMap | None:
    """A map from the sizes that an operand has, without the axes of size 1 that broadcasting puts before them."""
    extra = len(back.source) - len(shape_of(operand))
    if extra < 0 or any(back.source[:extra]):
        return None
    return AxisMap(back.source[extra:], back.target)


def _exit(region: Region, first: Node, axes: AxisMap) -> Crossing | None:
    """A chain of layout operators that reads a value of the region, as far as it pays best."""
    nodes: tuple[Node, ...] = ()
    best: Crossing | None = None
    node = first
    while is_layout(node):
        nodes = (*nodes, node)
        if any(user in region.held for user in node.users):
            break
        chain = next((c for c in chains_to(node) if len(c.nodes) == len(nodes)), None)
        whole = together(axes, chain.axes) if chain is not None else None
        calls = _written(whole, axes.before, entries_of(node)) if whole is not None else None
        if calls is not None:
            each = Crossing(nodes[0].args[0], nodes, calls, len(nodes))  # type: ignore[arg-type]
            best = each if best is None or each.cost < best.cost else best
        if len(node.users) != 1:
            break
        node = next(iter(node.users))
    return best


def cheapest(region: Region) -> Plan | None:
    """The plan of a region after everything is given back that does not pay."""
    plan = plan_of(region)
    goes = sum(-c.cost for c in plan.entries.values() if c.cost < 0) if plan is not None else 0
    if plan is not None and goes <= 1 and not plan.exits and all(c.cost for c in plan.kept):
        return None  # one layout operator would only stand elsewhere
    changed = True
    while changed and region.held:
        changed = False
        order = [*reversed(region.held), *region.held]
        for node in order:
            if node not in region.held or not _is_at_edge(region, node):
                continue
            smaller = region.without(node)
            other = plan_of(smaller)
            if other is not None and (plan is None or other.gain >= plan.gain):
                region, plan, changed = smaller, other, True
    return plan if plan is not None and region.held else None


def _is_at_edge(region: Region, node: Node) -> bool:
    below = any(user in region.held for value in _values(node) for user in value.users)
    above = any(operand in region.maps for operand in region.held[node].operands)
    return not (below and above)
