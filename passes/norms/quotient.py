"""Reads a value divided by a root: ``n / √v``, ``n · rsqrt(v)``, ``n · (1 / (√v + c))``, ``w · rsqrt(v) · n`` …

From the call that takes the root the readers are followed, through reciprocals, axes of size 1 and products with stored
numbers and tensors, to the call where the numerator comes in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import as_number
from vlexport.passes.norms.moments import moment
from vlexport.passes.polynomial import LAYOUT

_MOST_STEPS = 12
_POWERS = ("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor")


@dataclass(frozen=True)
class Quotient:
    """A value divided by a root.

    Attributes:
        numerator: The value.
        result: The call where it meets the root.
        radicand: What the root is taken of; None where one operator computes a deviation or norm.
        offset: What is added to the root, outside of it.
        floor: What the root is at least, by a clamp outside of it.
        factor: A number that is multiplied in before the numerator.
        scales: Stored tensors that are multiplied in before the numerator.
        joined: The root, or its reciprocal, as it meets the first tensor: shape as of the radicand, maybe more axes.
        nodes: The calls from the root to ``result``, operands before readers.
    """

    numerator: Node
    result: Node
    radicand: Node | None
    offset: float
    floor: float
    factor: float
    scales: tuple[Node, ...]
    joined: Node
    nodes: tuple[Node, ...]


def quotient(program: Program, root: Node) -> Quotient | None:
    """What is divided by the root that ``root`` takes; None when nothing is, or ``root`` takes none."""
    start = _start(program, root)
    if start is None:
        return None
    radicand, inverted = start
    walk = _Walk(program, inverted, root, [root])
    current = root
    for _ in range(_MOST_STEPS):
        user = next((user for user in current.users if walk.take(current, user)), None)
        if user is None:
            return None
        walk.nodes.append(user)
        if not walk.scales and walk.numerator is None:
            walk.joined = user
        if walk.numerator is not None:
            return Quotient(
                walk.numerator, user, radicand, walk.offset, walk.floor, walk.factor, tuple(walk.scales), walk.joined,
                tuple(walk.nodes),
            )  # fmt: skip
        current = user
    return None


def _start(program: Program, node: Node) -> tuple[Node | None, bool] | None:
    """What a call takes the root of, and whether it takes the reciprocal of it."""
    name = dialect.op_name(node)
    operand: Any = node.args[0] if node.args else None
    if name in ("aten.rsqrt.default", "aten.sqrt.default"):
        return operand, name == "aten.rsqrt.default"
    if name in _POWERS and as_number(program, node.args[1]) in (0.5, -0.5) and isinstance(operand, Node):
        return operand, as_number(program, node.args[1]) == -0.5
    found = moment(program, node)
    return (None, False) if found is not None and found.kind in ("deviation", "norm") else None


@dataclass
class _Walk:
    """What was met on the way from the root to the numerator."""

    program: Program
    inverted: bool
    joined: Node
    nodes: list[Node]
    numerator: Node | None = None
    offset: float = 0.0
    floor: float = 0.0
    factor: float = 1.0
    scales: list[Node] = field(default_factory=list)

    def take(self, value: Node, user: Node) -> bool:
        """Follow one reader of ``value``; False, and nothing changed, when it leads nowhere."""
        name, args = dialect.op_name(user), dialect.operands(user)
        if name in LAYOUT:
            return not self.scales
        if name == "aten.reciprocal.default" or (name in _POWERS and as_number(self.program, args[1]) == -1.0):
            self.inverted = not self.inverted
            return not self.scales
        if name in ("aten.mul.Tensor", "aten.mul.Scalar"):
            return args[0] is not args[1] and self._multiply(args[1] if args[0] is value else args[0])
        if name in ("aten.div.Tensor", "aten.div.Scalar"):
            return self._divide(args, value)
        number = as_number(self.program, args[1] if args and args[0] is value else args[0]) if len(args) > 1 else None
        if number is None or self.inverted or self.scales:
            return False
        if name in ("aten.add.Tensor", "aten.add.Scalar"):
            self.offset += number * float(args[2])
            return True
        if name in ("aten.sub.Tensor", "aten.sub.Scalar") and args[0] is value:
            self.offset -= number * float(args[2])
            return True
        if name in _LOWER_LIMITS and (len(args) < 3 or args[2] is None):
            self.floor = max(self.floor, number)
            return True
        return False

    def _multiply(self, other: Any) -> bool:
        number = as_number(self.program, other)
        if number is not None:
            self.factor *= number if self.inverted else 1.0 / number if number else 0.0
            return True
        if not self.inverted or not isinstance(other, Node):
            return False
        return self._meet(other)

    def _meet(self, other: Node) -> bool:
        if self.program.tensor_of(other) is not None:
            self.scales.append(other)
        else:
            self.numerator = other
        return True

    def _divide(self, args: tuple[Any, ...], value: Node) -> bool:
        if args[0] is value:
            number = as_number(self.program, args[1])
            return number is not None and number != 0.0 and self._multiply(1.0 / number)
        if self.inverted or self.scales:
            return False
        number = as_number(self.program, args[0])
        if number is not None:
            self.inverted, self.factor = True, self.factor * number
            return True
        self.inverted = True
        return isinstance(args[0], Node) and self._meet(args[0])


_LOWER_LIMITS = ("aten.clamp_min.default", "aten.clamp.default", "aten.clip.default", "aten.maximum.default")
