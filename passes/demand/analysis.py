"""The backward demand analysis: which part of every value the outputs read, and where computing only that saves.

From the outputs upwards, every call is asked for boxes of its value by its readers; its rule says which boxes of its
operands these need. What several readers ask for is joined, so a value that one of them reads whole stays whole.

A call is computed in part only where that saves multiply-accumulates, of its own or of a call above it: moving a slice
up through cheap operators alone is no gain. Calls that hang together by such reads are a :class:`Region`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.cost import node_macs, shaped_macs
from vlexport.ir.program import Program
from vlexport.passes.demand.box import WHOLE, Box, hull, joined
from vlexport.passes.demand.rules import narrowing
from vlexport.passes.demand.site import SPLITS, Narrowing, Read, Site, shape_of


@dataclass(frozen=True)
class Region:
    """Calls that are computed in part, and those that read them.

    Attributes:
        pieces: Call → how each piece of its value is computed, in topological order.
        ends: Calls whose value stays as it is; all others go.
        unread: Further calls that nobody reads afterwards: splits, and what a narrowed cat drops.
        gaining: Calls that cost fewer multiply-accumulates afterwards.
        saved_macs: Multiply-accumulates that are saved.
    """

    pieces: Mapping[Node, tuple[Narrowing, ...]]
    ends: tuple[Node, ...]
    unread: tuple[Node, ...]
    gaining: tuple[Node, ...]
    saved_macs: int

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Everything that the rewrite consumes."""
        return (*self.pieces, *self.unread)


@dataclass(frozen=True)
class Stop:
    """A call of whose value a part is read, and that is computed whole.

    Attributes:
        node: The call.
        reason: Why.
    """

    node: Node
    reason: str


class Demand:
    """The analysis of a Program as it is now."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known_sizes: dict[Node, tuple[int, ...]] = {}
        self._whole: set[Node] = set()
        while loose := self._analysed():
            self._whole |= loose

    def _analysed(self) -> set[Node]:
        """Analyse once, and find calls that would drop an operand (a piece of a cat) and are left as they are.

        Such a call goes on reading what it was thought to drop; the next analysis takes it as it is.
        """
        self._asked: dict[Node, list[tuple[Box, Node]]] = {}
        self._plans: dict[Node, tuple[Narrowing, ...]] = {}
        self._stops: list[Stop] = []
        self._dropped: dict[Node, set[Node]] = {}
        for node in reversed(self.program.graph.nodes):
            self._look_at(node)
        self._gains = {node: self._gain(node) for node in self._plans if self._is_narrowed(node)}
        for node, droppers in self._dropped.items():
            for dropper in droppers & set(self._gains):
                self._gains[dropper] += node_macs(self.program, node, {})
        self._kept: set[Node] = set()
        for node in self.program.calls():
            if node in self._gains and (self._gains[node] > 0 or any(n in self._kept for n, _ in self._parts(node))):
                self._kept.add(node)
        return set().union(*self._dropped.values()) - self._kept - self._whole

    def regions(self) -> Iterator[Region]:
        """Every region, by its first call."""
        order = {node: place for place, node in enumerate(self.program.calls())}
        for nodes in self._connected():
            ordered = sorted(nodes, key=order.__getitem__)
            gaining = tuple(node for node in ordered if self._gains.get(node, 0) > 0)
            unread = {Site(self.program, node).reader for node in ordered} - set(ordered)
            unread |= {node for node, droppers in self._dropped.items() if droppers & nodes}
            yield Region(
                pieces={node: self._plans[node] for node in ordered},
                ends=tuple(node for node in ordered if node not in self._kept),
                unread=tuple(sorted(unread, key=order.__getitem__)),
                gaining=gaining,
                saved_macs=sum(map(self._gain, ordered)) + sum(node_macs(self.program, node, {}) for node in unread),
            )

    def stops(self) -> Iterator[Stop]:
        """Where a part of a value is read and the value is computed whole, with the reason; readers before operands."""
        yield from self._stops
        for node in self.program.calls():
            passed = [n for n, _ in self._parts(node) if n in self._gains and n not in self._kept]
            if passed and not self._is_narrowed(node):
                yield Stop(node, "computing only the part that it reads saves no multiplication above it")

    def _look_at(self, node: Node) -> None:
        if node.op == "output":
            for result in self.program.results:
                self._ask(result, WHOLE, node)
        if node.op != "call_function" or (dialect.op_name(node) in SPLITS and _is_taken_apart(node)):
            return
        if node.users and node not in self._asked:
            self._dropped[node] = self._droppers(node)
            return
        plans = self._planned(node)
        self._plans[node] = plans
        for plan in plans:
            for operand, read in _operands(self.program, node, plan):
                self._ask(operand, read.box, node)

    def _droppers(self, node: Node) -> set[Node]:
        """The calls below ``node`` that read it, in the end, and need nothing of it."""
        found: set[Node] = set()
        for user in node.users:
            if user in self._plans:
                found.add(user)
            else:
                found |= self._dropped.get(user, set()) or self._droppers(user)
        return found

    def _ask(self, node: Node, box: Box, reader: Node) -> None:
        self._asked.setdefault(node, []).append((box, reader))

    def _planned(self, node: Node) -> tuple[Narrowing, ...]:
        """How the pieces of a value are computed: what is asked for, or the least more that its operator can give."""
        shape = shape_of(node)
        asked = self._asked.get(node, [(WHOLE, node)])  # nobody reads it: it is there for what it checks
        pieces = joined([box for box, _ in asked], shape, self._sizes(node))
        reasons: list[str] = []
        if pieces == (WHOLE,):
            reasons += self._whole_reader(asked)
        site = Site(self.program, node)
        if node in self._whole:
            return (site.whole(WHOLE),)
        while True:
            plans = tuple(narrowing(site, piece) for piece in pieces)
            reasons += [plan.reason for plan in plans if plan.reason]
            given = joined([plan.gives for plan in plans], shape, self._sizes(node))
            if given == pieces and self._pays(node, plans):
                break
            pieces = given if given != pieces else (hull(pieces, shape),)
        if reasons and all(plan.gives.is_whole for plan in plans):
            self._stops.append(Stop(node, reasons[0]))
        return plans

    def _pays(self, node: Node, plans: Sequence[Narrowing]) -> bool:
        """Whether several pieces cost no more than the smallest box around them."""
        if len(plans) == 1:
            return True
        together = narrowing(Site(self.program, node), hull([plan.gives for plan in plans], shape_of(node)))
        return sum(self._macs(node, plan) for plan in plans) <= self._macs(node, together)

    def _whole_reader(self, asked: Sequence[tuple[Box, Node]]) -> list[str]:
        """Why a value is computed whole though a part of it is read: another reader needs all of it."""
        if all(box.is_whole for box, _ in asked):
            return []
        whole = [reader for box, reader in asked if box.is_whole]
        return [f"its value is also read whole, by {dialect.plain_name(reader)}" for reader in whole[:1]]

    def _is_narrowed(self, node: Node) -> bool:
        return any(not plan.gives.is_whole for plan in self._plans[node])

    def _parts(self, node: Node) -> list[tuple[Node, Read]]:
        """Operands of which it reads a part."""
        plans = self._plans.get(node, ())
        found = [each for plan in plans for each in _operands(self.program, node, plan)]
        return [(operand, read) for operand, read in found if not read.box.is_whole]

    def _gain(self, node: Node) -> int:
        return node_macs(self.program, node, {}) - sum(self._macs(node, plan) for plan in self._plans[node])

    def _macs(self, node: Node, plan: Narrowing) -> int:
        row = dialect.info(node)
        if row is None or row.macs is None:
            return 0
        site = Site(self.program, node)
        shapes: list[Sequence[int]] = [
            read.box.sizes(self._sizes(site.operand(*read.place)))
            for read in plan.reads
            if shape_of(site.operand(*read.place))
        ]
        return shaped_macs(node, shapes, plan.gives.sizes(self._sizes(node)), plan.operands)

    def _sizes(self, node: Node) -> tuple[int, ...]:
        if node not in self._known_sizes:
            self._known_sizes[node] = self.program.sizes(shape_of(node), {})
        return self._known_sizes[node]

    def _connected(self) -> list[set[Node]]:
        """Kept calls and the readers of their parts, in groups that share no call."""
        groups: dict[Node, set[Node]] = {}
        for node in self.program.calls():
            mine = {node}
            for operand, _ in self._parts(node):
                if operand in self._kept:
                    mine |= groups[operand]
            if len(mine) > 1 or node in self._kept:
                for each in mine:
                    groups[each] = mine
        for droppers in self._dropped.values():
            together = set().union(*(groups[each] for each in droppers if each in groups))
            for each in together:
                groups[each] = together
        unique = {id(group): group for group in groups.values()}
        return list(unique.values())


def _is_taken_apart(node: Node) -> bool:
    return all(dialect.op_name(user) == "operator.getitem" for user in node.users) and bool(node.users)


def _operands(program: Program, node: Node, plan: Narrowing) -> Iterator[tuple[Node, Read]]:
    """The nodes that a narrowed call reads, with the part."""
    site = Site(program, node)
    for read in plan.reads:
        yield site.operand(*read.place), read
