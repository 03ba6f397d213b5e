"""What is known of a value while a Program is rebuilt for many samples, each with its own number of live tokens.

A Program captured at batch 1 is rebuilt so that every sample selects for itself. A value of the old Program (shape
``old``, batch 1 somewhere in it or nowhere) becomes a value of the new one in one of three forms:

- a constant: the same shape, for it does not depend on the inputs;
- *explicit*: the same shape, but for the batch that stands at axis ``batch`` instead of the 1;
- *hidden*: the batch in front of the old shape, ``(B, *old)``, where the old Program dropped its batch axis.

An axis whose length the data decided has K slots now. :class:`Slots` says which of them are live; the others repeat a
live token, and whatever mixes the axis leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch.fx import Node

HIDDEN: Final = -1
"""``batch`` of a value in hidden form."""


class CannotFreeze(Exception):  # noqa: N818  not an error of the user's yet: the pass turns it into one
    """A value for which no rule is known.

    Attributes:
        node: The call of the old Program; None where the rebuild fills it in.
        reason: Why not, in words a user can act on.
    """

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True, eq=False)
class Slots:
    """K places on an axis, of which each sample fills some.

    Attributes:
        size: K.
        valid: bool[B, K]: which places are live. The first live one is never missing.
        lead: So many places at the front are live in every sample.
        compact: The live places stand in front of all others, in the order that the tokens had.
    """

    size: int
    valid: Node
    lead: int
    compact: bool


@dataclass(frozen=True)
class Value:
    """A value of the new Program, and what it stands for.

    Attributes:
        node: It.
        old: The shape it had in the old Program.
        batch: Axis of the batch in the new shape, :data:`HIDDEN`, or None for a constant.
        slots: Axis of ``old`` → its slots, where the data decided its length.
        zero: Those of them on which places that are not live hold exact zeros.
        index: It holds positions from 0 on, never negative ones.
    """

    node: Node
    old: tuple[Any, ...]
    batch: int | None = None
    slots: Mapping[int, Slots] = field(default_factory=dict)
    zero: frozenset[int] = frozenset()
    index: bool = False

    @property
    def rank(self) -> int:
        """Axes of the old shape."""
        return len(self.old)

    def size(self, axis: int) -> int:
        """Places on an axis of the old shape, as they are now."""
        if axis in self.slots:
            return self.slots[axis].size
        size = self.old[axis]
        if isinstance(size, torch.SymInt):
            raise CannotFreeze("the length of one of its axes is decided by the data, in a way that no rule knows")
        return int(size)

    @property
    def sizes(self) -> list[int]:
        """All of them."""
        return [self.size(axis) for axis in range(self.rank)]

    def at(self, axis: int) -> int:
        """Where an axis of the old shape stands in the new one."""
        return axis + 1 if self.batch == HIDDEN else axis

    def become(self, node: Node, **changes: Any) -> Value:
        """Another value that is like this one but for ``changes``."""
        return replace(self, node=node, **changes)


@dataclass(frozen=True)
class Parts:
    """A call of several values: each is like ``each``, once it is taken out."""

    node: Node
    each: tuple[Value, ...]


@dataclass(frozen=True)
class Flat:
    """What ``masked_select`` keeps of a tensor, in one row; a reshape gives it its axes back.

    Attributes:
        picked: The tokens that were kept, as a mask index would have given them.
        axis: That of the slots in ``picked``.
    """

    picked: Value
    axis: int
