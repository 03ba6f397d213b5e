"""Rebuilding a Program call by call: where new calls are made, and how the forms of a value turn into each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.tokens.values import HIDDEN, CannotFreeze, Slots, Value

aten = torch.ops.aten


class Rebuild:
    """A Program that is being rebuilt, in place: the new calls stand behind the old ones.

    Args:
        program: Whose inputs all have the batch in front.
        places: Call that makes a mask → K.

    Attributes:
        exact_zeros_read: A softmax over tokens is read by more than the products that it weighs for: what follows may
            be infinite at places that are not live (``log 0``), and is no longer left out by a weight of 0.
    """

    def __init__(self, program: Program, places: Mapping[Node, int]) -> None:
        self.program = program
        self.places = places
        self.values: dict[Node, Any] = {}
        self.current: Node = program.output
        self.joined: dict[tuple[Any, ...], Slots] = {}
        self.by_size: dict[Any, Slots] = {}
        self.selections: dict[tuple[Node, Any], Any] = {}
        self.truncated: list[Node] = []
        self.inputs: list[Node] = program.placeholders
        self.exact_zeros_read = False
        self._made: dict[Any, Node] = {}

    # -- making calls --------------------------------------------------------------------------------------------

    def call(self, target: Any, *given: Any) -> Node:
        """A call that computes (part of) the value of the current one; ``given`` in the order of the schema.

        The same call is made once.
        """
        given = tuple([self.number(e) for e in g] if isinstance(g, (list, tuple)) else self.number(g) for g in given)
        args, kwargs = dialect.arguments(target, given) if isinstance(target, torch._ops.OpOverload) else (given, {})
        key = (target, *map(_key, (*args, *kwargs.items())))
        if key not in self._made:
            self._made[key] = self.program.add_call(
                target, args, kwargs, before=self.program.output, value_of=self.current
            )
        return self._made[key]

    def stored(self, name: str, tensor: torch.Tensor) -> Node:
        """A new stored tensor; one of that name and shape is stored once."""
        key = (name, tuple(tensor.shape))
        if key not in self._made:
            self._made[key] = self._stored(name, tensor)
        return self._made[key]

    def _stored(self, name: str, tensor: torch.Tensor) -> Node:
        return self.program.add_tensor(name, tensor, before=self.program.output, kind="constant")

    def batch_size(self) -> Any:
        """B, as an operand."""
        source = self.inputs[0]
        size = source.meta["val"].shape[0]
        return self.call(aten.sym_size.int, source, 0) if isinstance(size, torch.SymInt) else int(size)

    def reshaped(self, node: Node, sizes: Sequence[int]) -> Node:
        """A tensor with the batch in front, with other sizes behind it."""
        front = node.meta["val"].shape[0]
        return self.call(aten.reshape.default, node, [-1 if isinstance(front, torch.SymInt) else int(front), *sizes])

    # -- forms ---------------------------------------------------------------------------------------------------

    def with_batch(self, value: Value) -> Value:
        """A constant repeated for every sample, in hidden form; others as they are."""
        if value.batch is not None:
            return value
        wide = self.call(aten.unsqueeze.default, value.node, 0)
        return value.become(self.call(aten.expand.default, wide, [self.batch_size(), *value.sizes]), batch=HIDDEN)

    def hidden(self, value: Value) -> Value:
        """The batch in front of the old shape; a constant stays one."""
        if value.batch is None or value.batch == HIDDEN:
            return value
        node, axis = value.node, value.batch
        if axis:
            node = self.call(aten.permute.default, node, [axis, *(a for a in range(value.rank) if a != axis)])
        return value.become(self.call(aten.unsqueeze.default, node, axis + 1), batch=HIDDEN)

    def front(self, value: Value) -> Value:
        """The batch at axis 0 in place of a 1; a constant stays one.

        Raises:
            CannotFreeze: Where the old shape does not begin with 1.
        """
        if value.batch in (0, None):
            return value
        if not value.rank or value.old[0] is None or isinstance(value.old[0], torch.SymInt) or value.old[0] != 1:
            raise CannotFreeze("its operand has no batch axis in front")
        hidden = self.hidden(value)
        return value.become(self.call(aten.squeeze.dim, hidden.node, 1), batch=0)

    def free_of(self, value: Value, axes: Sequence[int]) -> Value:
        """In a form in which none of these axes of the old shape holds the batch."""
        return self.hidden(value) if value.batch in axes else value

    def aligned(self, values: Sequence[Value], shape: Sequence[Any], *, tail: int = 0) -> tuple[list[Node], int | None]:
        """Values that broadcast against each other in the new Program as they did in the old one.

        Args:
            values: Operands.
            shape: The old shape of the result; the last ``tail`` axes do not broadcast.
            tail: See there.

        Returns:
            Their nodes, and ``batch`` of the result.
        """
        rank = len(shape)
        batched = [v for v in values if v.batch is not None]
        if not batched:
            return [v.node for v in values], None
        places = {rank - v.rank + int(v.batch or 0) for v in batched if v.batch != HIDDEN}
        shy = [v for v in batched if v.batch == HIDDEN]
        if len(places) == 1 and rank:
            place = next(iter(places))
            free = not isinstance(shape[place], torch.SymInt) and shape[place] == 1 and place < rank - tail
            if free and not shy:
                return [v.node for v in values], place
            if free and place == 0 and all(v.rank < rank for v in shy):
                return [self._padded(v, rank - 1) if v.batch == HIDDEN else v.node for v in values], 0
        return [self._padded(self.hidden(v), rank) if v.batch is not None else v.node for v in values], HIDDEN

    def _padded(self, value: Value, rank: int) -> Node:
        """A value in hidden form with axes of size 1 behind the batch, up to ``rank`` axes behind it."""
        missing = rank - value.rank
        return self.reshaped(value.node, [*[1] * missing, *value.sizes]) if missing > 0 else value.node

    # -- slots ---------------------------------------------------------------------------------------------------

    def valid_on(self, value: Value, axis: int) -> Node:
        """Which places on an axis are live: bool, of a shape that broadcasts against ``value.node``."""
        valid = value.slots[axis].valid
        rank = value.rank + (value.batch == HIDDEN)
        batch = 0 if value.batch in (None, HIDDEN) else int(value.batch or 0)
        place = value.at(axis)
        if value.batch is None and axis == 0:
            raise CannotFreeze("its tokens are a constant's, and no axis is left for the batch")
        if batch > place:
            valid = self.call(aten.permute.default, valid, [1, 0])
        sizes: list[Any] = [1] * rank
        sizes[place] = value.slots[axis].size
        front = value.slots[axis].valid.meta["val"].shape[0]
        sizes[batch] = -1 if isinstance(front, torch.SymInt) else int(front)
        return self.call(aten.reshape.default, valid, sizes)

    def filled(self, value: Value, axes: Sequence[int], fill: float) -> Value:
        """A value whose places that are not live hold ``fill``."""
        for axis in axes:
            if fill == 0.0 and axis in value.zero:
                continue
            value = self.with_batch(value) if value.batch is None else value
            lived = self.valid_on(value, axis)
            blank = self.call(aten.logical_not.default, lived)
            value = value.become(self.call(aten.masked_fill.Scalar, value.node, blank, fill))
        return value

    def slots_of(self, old: Sequence[Any]) -> dict[int, Slots]:
        """Slots of a made value (``arange``, a slice of a stored tensor), by the sizes that it had.

        Raises:
            CannotFreeze: Where the size is no known count, or its places are not in order.
        """
        found = {}
        for axis, size in enumerate(old):
            if isinstance(size, torch.SymInt):
                slots = self.by_size.get(size.node.expr)
                if slots is None or not slots.compact:
                    raise CannotFreeze("it counts tokens in a way that no rule knows")
                found[axis] = slots
        return found

    def know(self, size: Any, slots: Slots) -> None:
        """Remember that an old size is K places now."""
        if isinstance(size, torch.SymInt):
            self.by_size.setdefault(size.node.expr, slots)

    def number(self, value: Any) -> Any:
        """A size as it is now: old sizes that the data decided are counts of places."""
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise CannotFreeze("it computes with the number of tokens in a way that no rule knows")
        if isinstance(value, torch.SymInt):
            slots = self.by_size.get(value.node.expr)
            if slots is not None:
                return slots.size
            known = {symbol: each.size for symbol, each in self.by_size.items() if symbol.is_Symbol}
            found = value.node.expr.subs(known)
            if not found.is_number:
                raise CannotFreeze("it takes a size that the data decides, in a way that no rule knows")
            return int(found)
        return value


def _key(operand: Any) -> Any:
    """An operand as part of a key; 1, 1.0 and True are three."""
    if isinstance(operand, (list, tuple)):
        return tuple(map(_key, operand))
    return operand if isinstance(operand, Node) else (type(operand), operand)


def merged(values: Sequence[tuple[Value, int]]) -> dict[int, Slots]:
    """Slots of a result whose axes are those of several values.

    Args:
        values: Each with how far its axes move (``rank of the result − its rank``).

    Raises:
        CannotFreeze: Where two selections meet on one axis.
    """
    found: dict[int, Slots] = {}
    for value, shift in values:
        for axis, slots in value.slots.items():
            if found.setdefault(axis + shift, slots) is not slots:
                raise CannotFreeze("tokens of two selections meet on one axis")
    return found
