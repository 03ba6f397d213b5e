"""What part of a value is read: a box, that is on some axes a few indices and on the others all of them.

Along one axis a box may hold one row a sample, which the input decides (the end-of-text token of a text tower).

The boxes that several readers ask for are joined wherever their union is a box itself; where it is not (queries of one
token, keys of all), a value has several pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

Rows = tuple[int, ...]
"""Indices along an axis: at least one, ascending, each once."""
MOST_PIECES = 4
"""Pieces in which one value is computed at most; beyond, all that is read is computed at once."""


@dataclass(frozen=True)
class Drawn:
    """One row a sample, which the input decides: ``value[samples, places]``, with an axis of size 1 kept.

    Attributes:
        axis: Of the rows.
        batch: Of the samples.
        samples: 0, 1, 2 … as many as samples.
        places: The row of each sample; never negative.
    """

    axis: int
    batch: int
    samples: Node
    places: Node

    def moved(self, axis: int, batch: int) -> Drawn:
        """The same rows where they lie along other axes."""
        return Drawn(axis, batch, self.samples, self.places)


@dataclass(frozen=True)
class Box:
    """A part of a value.

    Attributes:
        axes: (axis, indices), by axis; an axis that is not listed is read whole.
        drawn: Along its axis, one row a sample.
    """

    axes: tuple[tuple[int, Rows], ...] = ()
    drawn: Drawn | None = None

    @property
    def is_whole(self) -> bool:
        """Whether everything is read."""
        return not self.axes and self.drawn is None

    def rows(self, axis: int) -> Rows | None:
        """The indices read along ``axis``; None for all."""
        return dict(self.axes).get(axis)

    def on(self, axes: Iterable[int]) -> Box:
        """This box along ``axes``, whole along the others."""
        kept = set(axes)
        drawn = self.drawn if self.drawn is not None and {self.drawn.axis, self.drawn.batch} <= kept else None
        return Box(tuple((axis, rows) for axis, rows in self.axes if axis in kept), drawn)

    def known(self) -> Box:
        """This box without the rows that the input decides: all rows in their place."""
        return Box(self.axes)

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the part, of a value of sizes ``shape``."""
        rows = dict(self.axes)
        if self.drawn is not None:
            rows[self.drawn.axis] = (0,)
        return tuple(len(rows[axis]) if axis in rows else size for axis, size in enumerate(shape))

    def contains(self, other: Box) -> bool:
        """Whether all of ``other`` is part of it."""
        if self.drawn is not None and self.drawn != other.drawn:
            return False
        return all((rows := other.rows(axis)) is not None and set(rows) <= set(mine) for axis, mine in self.axes)

    def within(self, outer: Box) -> Box:
        """Where this box lies in the part ``outer``, which contains it."""
        found = {}
        for axis, rows in self.axes:
            among = outer.rows(axis)
            if among is None:
                found[axis] = rows
            elif among != rows:
                found[axis] = tuple(among.index(row) for row in rows)
        return Box(tuple(found.items()), self.drawn if outer.drawn is None else None)


WHOLE = Box()


def box_of(rows: Mapping[int, Iterable[int]], shape: Sequence[Any]) -> Box:
    """The box of some indices per axis; an axis of known size of which all are named is whole.

    Args:
        rows: Axis → indices, in any order.
        shape: Sizes of the value, dynamic ones among them.
    """
    found = {axis: tuple(sorted(set(named))) for axis, named in sorted(rows.items())}
    return Box(
        tuple(
            (axis, named)
            for axis, named in found.items()
            if not isinstance(shape[axis], int) or len(named) < shape[axis]
        )
    )


def joined(boxes: Sequence[Box], shape: Sequence[Any], sizes: Sequence[int]) -> tuple[Box, ...]:
    """The pieces in which a value is best computed, if ``boxes`` are read: as few as read nothing twice.

    Two boxes are joined if the smallest box around both is no larger than both together.

    Args:
        boxes: What is asked for.
        shape: Sizes of the value, dynamic ones among them.
        sizes: The same with a number for each dynamic one.
    """
    pieces = list(dict.fromkeys(boxes))
    while (pair := _joinable(pieces, shape, sizes)) is not None:
        first, second, both = pair
        pieces = [both, *(piece for piece in pieces if piece not in (first, second, both))]
    if len(pieces) > MOST_PIECES:
        pieces = [hull(pieces, shape)]
    return tuple(sorted(pieces, key=lambda piece: (piece.axes, piece.drawn is not None)))


def hull(boxes: Sequence[Box], shape: Sequence[Any]) -> Box:
    """The smallest box around all."""
    shared = [axis for axis, _ in boxes[0].axes if all(box.rows(axis) is not None for box in boxes)]
    found = box_of({axis: [row for box in boxes for row in box.rows(axis) or ()] for axis in shared}, shape)
    return Box(found.axes, boxes[0].drawn if len({box.drawn for box in boxes}) == 1 else None)


def _joinable(pieces: list[Box], shape: Sequence[Any], sizes: Sequence[int]) -> tuple[Box, Box, Box] | None:
    for place, first in enumerate(pieces):
        for second in pieces[place + 1 :]:
            both = hull((first, second), shape)
            if _volume(both, sizes) <= _volume(first, sizes) + _volume(second, sizes):
                return first, second, both
    return None


def _volume(box: Box, sizes: Sequence[int]) -> int:
    return math.prod(box.sizes(sizes))
