"""Reads a value as a polynomial in a few others, in whatever order and spelling its arithmetic is written.

``x * 0.5 * (1 + e)``, ``0.5 * (x * e + x)`` and ``addcmul(x / 2, x, e, value=0.5)`` are one polynomial in ``x`` and
``e``: 0.5·x + 0.5·x·e. So a pass asks once for the polynomial and not for each of its spellings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import Failed, as_number

Terms = Mapping[tuple[int, ...], float]
"""Exponent of each base → coefficient; none is 0."""

ROUNDING = 2.0**-22
"""Relative difference up to which two constants are the same: a number stored in float32 is off by 2⁻²⁴, and a
coefficient is a product of a few."""
_MOST_CALLS = 32
_HIGHEST_POWER = 4

LAYOUT = (
    "aten.unsqueeze.default", "aten.reshape.default", "aten.expand.default", "aten.squeeze.dim", "aten.squeeze.dims",
)  # fmt: skip
"""Operators that leave every element, and their order, as they are, where only axes of size 1 come and go."""


@dataclass(frozen=True)
class Polynomial:
    """A value in terms of its bases.

    Attributes:
        terms: Exponents of the bases, in their order → coefficient.
        nodes: The calls that compute it from the bases, operands before readers.
    """

    terms: Terms
    nodes: tuple[Node, ...]


def polynomial(
    program: Program, value: Any, bases: Sequence[Node], *, through: tuple[str, ...] = ()
) -> Polynomial | Failed:
    """``value`` as a polynomial in ``bases``; what else its arithmetic reads are numbers.

    Args:
        program: Holds stored numbers.
        value: A call, a base or a number.
        bases: Where reading stops.
        through: Operators with one tensor operand that count as that operand, such as :data:`LAYOUT`.

    Returns:
        The polynomial, or the call that is no such arithmetic.
    """
    reader = _Reader(program, tuple(bases), through)
    terms = reader.read(value)
    return terms if isinstance(terms, Failed) else Polynomial(terms, tuple(reader.nodes))


def bases_of(program: Program, value: Any, *, most: int = 24) -> list[Node]:
    """Values that arithmetic behind ``value`` is made from, nearest first, and ``value`` itself: each may be a base."""
    found: dict[Node, None] = {}
    pending = [value]
    while pending and len(found) < most:
        current = pending.pop(0)
        if not isinstance(current, Node) or current in found or as_number(program, current) is not None:
            continue
        found[current] = None
        if is_arithmetic(current):
            pending.extend(current.all_input_nodes)
    return list(found)


def is_arithmetic(node: Node) -> bool:
    """Whether a call is a sum, product or power that a polynomial may hold."""
    return dialect.op_name(node) in _RULES


def close(found: Terms, wanted: Terms) -> bool:
    """Whether two polynomials are the same up to the rounding of their constants to float32."""
    return found.keys() == wanted.keys() and all(
        math.isclose(found[key], wanted[key], rel_tol=ROUNDING) for key in wanted
    )


class _Reader:
    def __init__(self, program: Program, bases: tuple[Node, ...], through: tuple[str, ...]) -> None:
        self.program = program
        self.bases = bases
        self.through = through
        self.nodes: dict[Node, Terms] = {}

    def read(self, value: Any) -> Terms | Failed:
        if isinstance(value, Node) and value in self.bases:
            return {tuple(int(value is base) for base in self.bases): 1.0}
        number = as_number(self.program, value)
        if number is not None:
            return self.constant(number)
        if not isinstance(value, Node):
            return Failed(self.bases[0], f"{value!r} is no number", 0)
        if value in self.nodes:
            return self.nodes[value]
        rule = _RULES.get(dialect.op_name(value))
        if dialect.op_name(value) in self.through:
            rule = _first
        if rule is None or len(self.nodes) >= _MOST_CALLS:
            return Failed(value, f"{dialect.plain_name(value)} is no arithmetic with numbers", 0)
        if value.meta["val"].dtype is not self.bases[0].meta["val"].dtype:
            return Failed(value, f"{dialect.plain_name(value)} changes the dtype on the way", 0)
        terms = rule(self, dialect.operands(value))
        if terms is None:
            return Failed(value, f"{dialect.plain_name(value)} is no sum or product with numbers here", 0)
        if isinstance(terms, Failed):
            return terms
        self.nodes[value] = {key: coefficient for key, coefficient in terms.items() if coefficient != 0.0}
        return self.nodes[value]

    def constant(self, number: float) -> Terms:
        return {(0,) * len(self.bases): number} if number != 0.0 else {}


_Rule = Callable[[_Reader, tuple[Any, ...]], "Terms | Failed | None"]


def _first(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed:
    return reader.read(args[0])


def _sum(a: Terms, b: Terms, factor: float) -> Terms:
    return {key: a.get(key, 0.0) + factor * b.get(key, 0.0) for key in {**a, **b}}


def _product(a: Terms, b: Terms) -> Terms | None:
    made: dict[tuple[int, ...], float] = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(i + j for i, j in zip(left, right, strict=True))
            made[key] = made.get(key, 0.0) + x * y
    return made if all(max(key, default=0) <= _HIGHEST_POWER for key in made) else None


def _added(sign: float, *, swapped: bool = False) -> _Rule:
    def rule(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
        first, second = reader.read(args[0]), reader.read(args[1])
        alpha = as_number(reader.program, args[2]) if len(args) > 2 else 1.0
        if isinstance(first, Failed) or isinstance(second, Failed) or alpha is None:
            return first if isinstance(first, Failed) else second if isinstance(second, Failed) else None
        return _sum(second, first, sign * alpha) if swapped else _sum(first, second, sign * alpha)

    return rule


def _multiplied(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
    first, second = reader.read(args[0]), reader.read(args[1])
    if isinstance(first, Failed):
        return first
    return second if isinstance(second, Failed) else _product(first, second)


def _divided(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
    divisor = as_number(reader.program, args[1])
    if divisor is None or divisor == 0.0:
        return None
    dividend = reader.read(args[0])
    return dividend if isinstance(dividend, Failed) else {key: x / divisor for key, x in dividend.items()}


def _negated(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
    operand = reader.read(args[0])
    return operand if isinstance(operand, Failed) else {key: -x for key, x in operand.items()}


def _power(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
    exponent = as_number(reader.program, args[1])
    if exponent is None or exponent != int(exponent) or not 1 <= exponent <= _HIGHEST_POWER:
        return None
    operand = reader.read(args[0])
    made: Terms | None = operand if not isinstance(operand, Failed) else None
    for _ in range(int(exponent) - 1):
        made = _product(made, operand) if made is not None and not isinstance(operand, Failed) else None
    return operand if isinstance(operand, Failed) else made


def _squared(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
    return _power(reader, (args[0], 2))


def _added_product(reader: _Reader, args: tuple[Any, ...]) -> Terms | Failed | None:
    start, product = reader.read(args[0]), _multiplied(reader, args[1:3])
    value = as_number(reader.program, args[3])
    if isinstance(start, Failed) or isinstance(product, Failed):
        return start if isinstance(start, Failed) else product
    return _sum(start, product, value) if product is not None and value is not None else None


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("aten.add.Tensor", "aten.add.Scalar"), _added(1.0)),
    **dict.fromkeys(("aten.sub.Tensor", "aten.sub.Scalar"), _added(-1.0)),
    **dict.fromkeys(("aten.rsub.Tensor", "aten.rsub.Scalar"), _added(-1.0, swapped=True)),
    **dict.fromkeys(("aten.mul.Tensor", "aten.mul.Scalar"), _multiplied),
    **dict.fromkeys(("aten.div.Tensor", "aten.div.Scalar"), _divided),
    **dict.fromkeys(("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor"), _power),
    "aten.square.default": _squared,
    "aten.neg.default": _negated,
    "aten.addcmul.default": _added_product,
}
