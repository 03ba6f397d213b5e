"""Between which bounds the elements of a value lie: what an operator that treats elements apart makes of bounds.

``0 · x`` is taken for 0, so x for finite. A number that a comparison with NaN would decide is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect

DROWNED = -1000.0
"""What is added to a score so that it gets no weight in a softmax: exp underflows unless scores are 900 apart."""

RAISED = 100.0
"""What is surely as large may lift such a score out of its depth."""


@dataclass(frozen=True)
class Bounds:
    """The least and the largest that an element can be; of booleans 0 and 1.

    Attributes:
        low: The least.
        high: The largest.
        drowned: Whatever it is, a softmax gives it no weight.
    """

    low: float = -math.inf
    high: float = math.inf
    drowned: bool = False

    @property
    def constant(self) -> float | None:
        """What every element is, where that is known."""
        return self.low if self.low == self.high else None

    @property
    def weightless(self) -> bool:
        """Whether a softmax gives it no weight."""
        return self.drowned or self.high <= DROWNED

    def within(self, other: Bounds) -> Bounds:
        """What both say."""
        return Bounds(max(self.low, other.low), min(self.high, other.high), self.drowned or other.drowned)

    def or_(self, other: Bounds) -> Bounds:
        """What holds where either does."""
        return Bounds(min(self.low, other.low), max(self.high, other.high), self.weightless and other.weightless)


ANY = Bounds()
ZERO = Bounds(0.0, 0.0)
ONE = Bounds(1.0, 1.0)
EITHER = Bounds(0.0, 1.0)
POSITIVE = Bounds(0.0, math.inf)
_MONOTONE = {
    "sigmoid", "relu", "relu6", "exp", "tanh", "hardtanh", "hardsigmoid", "clamp", "clamp_min", "clamp_max", "clip",
    "floor", "ceil", "round", "trunc", "sign", "erf", "softplus", "log1p", "expm1",
}  # fmt: skip
_OF_BOOLEANS = {
    "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not", "__and__": "logical_and",
    "__or__": "logical_or", "mul": "logical_and",
}  # fmt: skip
_OPPOSITE = {"gt": "le", "ge": "lt", "lt": "ge", "le": "gt"}


def of_number(value: float | bool) -> Bounds:
    """Of a plain number."""
    return Bounds(float(value), float(value))


def of_tensor(value: torch.Tensor) -> Bounds:
    """Of a stored tensor; nothing is known of one that holds NaN."""
    if not value.numel() or value.dtype.is_complex:
        return ANY
    low, high = float(value.min()), float(value.max())
    return ANY if math.isnan(low) or math.isnan(high) else Bounds(low, high)


def left_out_by(node: Node) -> tuple[Node, Bounds] | None:
    """The score of a comparison with a number, and what it is where the comparison is false."""
    name = dialect.plain_name(node)
    if name not in _OPPOSITE or not isinstance(node.args[0], Node) or not isinstance(node.args[1], (int, float)):
        return None
    bound = float(node.args[1])
    return node.args[0], Bounds(-math.inf, bound) if name in ("gt", "ge") else Bounds(bound, math.inf)


def computed(node: Node, given: Sequence[Any]) -> Bounds:
    """Of a call that treats elements apart.

    Args:
        node: The call.
        given: Its operands in the order of the schema, tensors as :class:`Bounds`.
    """
    name = dialect.plain_name(node)
    operands = [of_number(g) if isinstance(g, (int, float)) else g for g in given]
    if node.meta["val"].dtype is torch.bool:
        name = _OF_BOOLEANS.get(name, name)
    if name in _RULES:
        found = _RULES[name](operands)
    elif dialect.is_cast(node):
        found = _cast(operands[0], node.meta["val"].dtype)
    elif name in _MONOTONE:
        found = _monotone(node, given)
    else:
        found = ANY
    return found.within(EITHER) if node.meta["val"].dtype is torch.bool else found


def _monotone(node: Node, given: Sequence[Any]) -> Bounds:
    if any(isinstance(each, Bounds) for each in given[1:]):
        return ANY
    target: Any = node.target
    args, kwargs = dialect.arguments(target, (torch.tensor([given[0].low, given[0].high]), *given[1:]))
    return of_tensor(target(*args, **kwargs))


def _cast(value: Bounds, dtype: torch.dtype) -> Bounds:
    if dtype is torch.bool:
        return _truth(value)
    if dtype.is_floating_point:
        return value
    ends = [math.trunc(end) if math.isfinite(end) else end for end in (value.low, value.high)]
    return Bounds(ends[0], ends[1], value.drowned)


def _truth(value: Bounds) -> Bounds:
    if value.constant == 0.0:
        return ZERO
    return ONE if value.low > 0.0 or value.high < 0.0 else EITHER


def _sum(left: Bounds, right: Bounds) -> Bounds:
    low, high = left.low + right.low, left.high + right.high
    return Bounds(
        -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high,
        (left.weightless and right.low < RAISED) or (right.weightless and left.low < RAISED),
    )  # fmt: skip


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0.0 or b == 0.0 else a * b


def _product(left: Bounds, right: Bounds) -> Bounds:
    ends = [_times(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
    return Bounds(min(ends), max(ends))


def _quotient(left: Bounds, right: Bounds) -> Bounds:
    if left.constant == 0.0:
        return ZERO
    if right.low <= 0.0 or math.isinf(right.high):
        return POSITIVE if left.low >= 0.0 and right.low > 0.0 else ANY
    return _product(left, Bounds(1.0 / right.high, 1.0 / right.low))


def _negative(value: Bounds) -> Bounds:
    return Bounds(-value.high, -value.low)


def _scaled(operands: Sequence[Any], place: int) -> Bounds:
    """``alpha`` of add and sub times the operand that it stands for."""
    value: Bounds = operands[place]
    return _product(value, operands[2]) if len(operands) > 2 and isinstance(operands[2], Bounds) else value


def _less(left: Bounds, right: Bounds, *, strictly: bool) -> Bounds:
    if left.high < right.low or (not strictly and left.high <= right.low):
        return ONE
    return ZERO if left.low > right.high or (strictly and left.low >= right.high) else EITHER


def _and(a: Bounds, b: Bounds) -> Bounds:
    a, b = _truth(a), _truth(b)
    return Bounds(min(a.low, b.low), min(a.high, b.high))


def _or(a: Bounds, b: Bounds) -> Bounds:
    a, b = _truth(a), _truth(b)
    return Bounds(max(a.low, b.low), max(a.high, b.high))


def _not(value: Bounds) -> Bounds:
    truth = _truth(value)
    return Bounds(1.0 - truth.high, 1.0 - truth.low)


def _chosen(condition: Bounds, yes: Bounds, no: Bounds) -> Bounds:
    truth = _truth(condition)
    return yes if truth.constant == 1.0 else no if truth.constant == 0.0 else yes.or_(no)


def _power(operands: Sequence[Any]) -> Bounds:
    value, exponent = operands[0], operands[1].constant if isinstance(operands[1], Bounds) else None
    if value.constant == 0.0 and exponent is not None and exponent > 0:
        return ZERO
    return POSITIVE if exponent is not None and (exponent % 2 == 0 or value.low >= 0.0) else ANY


_RULES: Mapping[str, Callable[[Sequence[Any]], Bounds]] = {
    "add": lambda o: _sum(o[0], _scaled(o, 1)),
    "sub": lambda o: _sum(o[0], _negative(_scaled(o, 1))),
    "rsub": lambda o: _sum(o[1], _negative(_scaled(o, 0))),
    "mul": lambda o: _product(o[0], o[1]),
    "div": lambda o: _quotient(o[0], o[1]) if len(o) < 3 else ANY,
    "neg": lambda o: _negative(o[0]),
    "abs": lambda o: ZERO if o[0].constant == 0.0 else POSITIVE,
    "square": lambda o: ZERO if o[0].constant == 0.0 else POSITIVE,
    "pow": _power,
    "sqrt": lambda o: ZERO if o[0].constant == 0.0 else POSITIVE,
    "gelu": lambda o: ZERO if o[0].constant == 0.0 else ANY,
    "silu": lambda o: ZERO if o[0].constant == 0.0 else ANY,
    "lt": lambda o: _less(o[0], o[1], strictly=True),
    "le": lambda o: _less(o[0], o[1], strictly=False),
    "gt": lambda o: _less(o[1], o[0], strictly=True),
    "ge": lambda o: _less(o[1], o[0], strictly=False),
    "eq": lambda o: ONE if o[0].constant is not None and o[0].constant == o[1].constant else _apart(o[0], o[1]),
    "ne": lambda o: _not(_RULES["eq"](o)),
    "logical_and": lambda o: _and(o[0], o[1]),
    "logical_or": lambda o: _or(o[0], o[1]),
    "logical_not": lambda o: _not(o[0]),
    "maximum": lambda o: Bounds(max(o[0].low, o[1].low), max(o[0].high, o[1].high)),
    "minimum": lambda o: Bounds(min(o[0].low, o[1].low), min(o[0].high, o[1].high)),
    "where": lambda o: _chosen(*o),
    "masked_fill": lambda o: _chosen(o[1], o[2], o[0]),
}


def _apart(left: Bounds, right: Bounds) -> Bounds:
    return ZERO if left.high < right.low or right.high < left.low else EITHER
