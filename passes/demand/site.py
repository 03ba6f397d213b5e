"""What a rule of the demand analysis gets and gives: a call, and the call that computes a part of its value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.demand.box import WHOLE, Box

SPLITS = (
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int",
)  # fmt: skip
"""Operators that cut a value into several; what they read is what the readers of the parts read."""


@dataclass(frozen=True)
class Read:
    """Stands, among the operands of a narrowed call, for a part of an operand of the call as it is.

    Attributes:
        place: Position of the operand; of a tensor in a list, the list's position and its own.
        box: The part.
    """

    place: tuple[int, ...]
    box: Box = WHOLE


@dataclass(frozen=True)
class Narrowing:
    """How a part of a call's value is computed.

    Attributes:
        gives: The part, at least what was asked for.
        target: The operator; None where the part is ``operands[0]`` itself.
        operands: In the order of its schema: ``Read`` where the call reads a node, a tensor that is to be stored, or
            a constant.
        reason: Why more is computed than was asked for; empty if it is not.
        uses: What is read beside the operands: that which says where the part lies.
    """

    gives: Box
    target: Any
    operands: tuple[Any, ...]
    reason: str = ""
    uses: tuple[Read, ...] = ()

    @property
    def reads(self) -> tuple[Read, ...]:
        """Every part that it reads."""
        return (*_reads(self.operands), *self.uses)


def _reads(operands: Iterable[Any]) -> Iterator[Read]:
    for operand in operands:
        if isinstance(operand, Read):
            yield operand
        elif isinstance(operand, list):
            yield from _reads(operand)


@dataclass(frozen=True)
class Site:
    """A call whose value is read in part.

    Attributes:
        program: It lies there.
        node: The call; of a part that a split makes, the access to that part.
    """

    program: Program
    node: Node

    @property
    def reader(self) -> Node:
        """The call whose operands are read: of a part, the split."""
        source = self.node.args[0] if self.node.args else None
        is_part = dialect.op_name(self.node) == "operator.getitem" and dialect.op_name(source) in SPLITS  # type: ignore[arg-type]
        return source if is_part and isinstance(source, Node) else self.node

    @cached_property
    def operands(self) -> tuple[Any, ...]:
        """Of the reader, in the order of its schema."""
        return dialect.operands(self.reader)

    @property
    def names(self) -> tuple[str, ...]:
        """What the schema calls its operands."""
        return dialect.operand_names(self.reader)

    def argument(self, *names: str) -> Any:
        """The first operand of one of ``names``, or None."""
        return next((value for name, value in zip(self.names, self.operands, strict=True) if name in names), None)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes of its value."""
        return shape_of(self.node)

    @property
    def rank(self) -> int:
        """Axes of its value."""
        return len(self.shape)

    def operand(self, *place: int) -> Any:
        """The operand at a place."""
        value = self.operands[place[0]]
        return value[place[1]] if len(place) > 1 else value

    def broadcast(self, asked: Box, *place: int) -> Box:
        """What a part of the value needs of an operand that is broadcast to its sizes."""
        own = shape_of(self.operand(*place))
        before = self.rank - len(own)
        drawn = asked.drawn
        if drawn is not None:
            varies = drawn.axis >= before and not is_one(own[drawn.axis - before])
            drawn = drawn.moved(drawn.axis - before, drawn.batch - before) if varies else None
        return Box(
            tuple(
                (axis - before, rows) for axis, rows in asked.axes if axis >= before and not is_one(own[axis - before])
            ),
            drawn,
        )

    def kept(self, gives: Box, boxes: Mapping[int, Box], settings: Mapping[int, Any] | None = None, *,
             asked: Box | None = None, reason: str = "") -> Narrowing:  # fmt: skip
        """The same operator on parts of its operands.

        Args:
            gives: The part that it computes.
            boxes: Position → the part of the operand there; others are read whole.
            settings: Position → a constant to put there.
            asked: What was asked for.
            reason: Why that is more than was asked for, where it is.
        """
        operands: list[Any] = [
            Read((place,), boxes.get(place, WHOLE)) if isinstance(value, Node) else self._listed(place, value)
            for place, value in enumerate(self.operands)
        ]
        for place, value in (settings or {}).items():
            operands[place] = value
        short = asked is not None and asked != gives
        return Narrowing(gives, self.reader.target, tuple(operands), self.because(reason) if short else "")

    def moved(self, asked: Box, axes: Mapping[int, int], settings: Mapping[int, Any] | None = None) -> Narrowing:
        """The same operator on a part of its first operand, where every axis of the value is an axis of it or mixed.

        Args:
            asked: What is read.
            axes: Axis of the value → axis of the operand, for those that are not mixed with others.
            settings: Position → a constant to put there.
        """
        gives = asked.on(axes)
        drawn = gives.drawn
        if drawn is not None:
            drawn = drawn.moved(axes[drawn.axis], axes[drawn.batch])
        read = Box(tuple(sorted((axes[axis], rows) for axis, rows in gives.axes)), drawn)
        return self.kept(gives, {0: read}, settings, asked=asked)

    def whole(self, asked: Box, reason: str = "") -> Narrowing:
        """The call as it is."""
        return self.kept(WHOLE, {}, asked=asked, reason=reason)

    def because(self, reason: str) -> str:
        """A reason; by default that the operator mixes what is read with the rest."""
        return reason or f"{dialect.plain_name(self.reader)} mixes the axis of which a part is read"

    def _listed(self, place: int, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not any(isinstance(each, Node) for each in value):
            return value
        return [Read((place, i)) if isinstance(each, Node) else each for i, each in enumerate(value)]


def shape_of(value: Any) -> tuple[Any, ...]:
    """Recorded sizes of a tensor's node; dynamic ones are symbols. No axes for anything else."""
    found = value.meta.get("val") if isinstance(value, Node) else None
    return tuple(found.shape) if isinstance(found, Tensor) else ()


def is_one(size: Any) -> bool:
    """Whether a size is 1, and not dynamic."""
    return isinstance(size, int) and size == 1
