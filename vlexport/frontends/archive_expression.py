"""The closed grammar of shape expressions.

torch stores a symbolic size as a sympy ``srepr`` and reads it back with ``sympify``, which evaluates Python. Here::

    expression := "true" | "false" | "oo" | "-oo" | "int_oo" | "-int_oo"
                | "Symbol(" 'name' {", assumption=" True|False} ")"
                | "Integer(" int ")" | "Rational(" int ", " int ")" | "Float(" 'number' ", precision=" int ")"
                | FUNCTION "(" expression {", " expression} ")"

Length, depth, the size of integers and the degree are bounded, because sympy computes while it reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SYMBOL = re.compile(r"(?:zuf|zf|s|u)\d{1,5}")
"""Sizes and floats, backed and not; the bound matters, for torch counts up to an unbacked symbol's number."""

FUNCTIONS = frozenset(
    {"Add", "Mul", "Pow", "Max", "Min", "Abs", "floor", "ceiling"}
    | {"Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or", "Not"}
    | {"FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"}
    | {"LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"}
    | {"RoundToInt", "RoundDecimal", "ToFloat", "Identity", "IsNonOverlappingAndDenseIndicator"}
)
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})
_CONSTANTS = frozenset({"true", "false", "oo", "int_oo"})
_ASSUMPTIONS = frozenset(
    {"integer", "positive", "negative", "nonnegative", "nonpositive", "nonzero", "real", "finite", "zero", "even"}
)
_NUMBER = re.compile(r"-?\d{1,40}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?")
_TOKEN = re.compile(r"\s*(?:(?P<name>-?[A-Za-z_]\w*)|(?P<int>-?\d+)|'(?P<text>[^'\\]*)'|(?P<mark>[(),=]))")

MAX_LENGTH = 16_384
MAX_DEPTH = 48
MAX_INTEGER_BITS = 64
MAX_EXPONENT = 8
MAX_SHIFT = 62
MAX_RESULT_BITS = 4096
MAX_DEGREE = 32


class ExpressionError(ValueError):
    """The text does not fit the grammar; the message says where."""


@dataclass(frozen=True)
class _Bound:
    """What an expression can grow to: bits of its largest integer, degree in its symbols, its value if literal."""

    bits: int = 1
    degree: int = 0
    literal: int | None = None


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise ExpressionError(f"unexpected {text[position : position + 20]!r} at character {position}")
            self._tokens.append((match.lastgroup, match.group(match.lastgroup)))
            position = match.end()
        self._next = 0

    def whole(self) -> None:
        self._expression(0)
        if self._next != len(self._tokens):
            raise ExpressionError(f"unexpected {self._tokens[self._next][1]!r} after the expression")

    def _take(self, kind: str, value: str | None = None) -> str:
        found_kind, found = self._tokens[self._next] if self._next < len(self._tokens) else ("end", "the end")
        if found_kind != kind or (value is not None and found != value):
            raise ExpressionError(f"expected {value or kind}, found {found!r}")
        self._next += 1
        return found

    def _peek(self, value: str) -> bool:
        return self._next < len(self._tokens) and self._tokens[self._next] == ("mark", value)

    def _expression(self, depth: int) -> _Bound:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        name = self._take("name")
        if name.removeprefix("-") in _CONSTANTS and not (name.startswith("-") and "oo" not in name):
            return _Bound()
        self._take("mark", "(")
        bound = self._call(name, depth)
        self._take("mark", ")")
        if bound.bits > MAX_RESULT_BITS or bound.degree > MAX_DEGREE:
            raise ExpressionError(f"{name} grows beyond {MAX_RESULT_BITS} bits or degree {MAX_DEGREE}")
        return bound

    def _call(self, name: str, depth: int) -> _Bound:
        if name == "Symbol":
            return self._symbol()
        if name == "Integer":
            return self._integer()
        if name == "Rational":
            numerator = self._integer()
            self._take("mark", ",")
            return _Bound(numerator.bits + self._integer().bits)
        if name == "Float":
            return self._float()
        if name not in FUNCTIONS:
            raise ExpressionError(f"{name!r} is no function of shape expressions")
        arguments = [self._expression(depth + 1)]
        while self._peek(","):
            self._take("mark", ",")
            arguments.append(self._expression(depth + 1))
        return _grown(name, arguments)

    def _symbol(self) -> _Bound:
        name = self._take("text")
        if SYMBOL.fullmatch(name) is None:
            raise ExpressionError(f"{name!r} is no name of a symbol")
        while self._peek(","):
            self._take("mark", ",")
            if (assumption := self._take("name")) not in _ASSUMPTIONS:
                raise ExpressionError(f"{assumption!r} is no assumption about a symbol")
            self._take("mark", "=")
            if (value := self._take("name")) not in ("True", "False"):
                raise ExpressionError(f"an assumption is True or False, not {value!r}")
        return _Bound(degree=1)

    def _integer(self) -> _Bound:
        digits = self._take("int")
        if len(digits) > MAX_INTEGER_BITS or (value := int(digits)).bit_length() > MAX_INTEGER_BITS:
            raise ExpressionError(f"an integer of {len(digits)} digits is too large")
        return _Bound(bits=max(1, value.bit_length()), literal=value)

    def _float(self) -> _Bound:
        number = self._take("text")
        if _NUMBER.fullmatch(number) is None:
            raise ExpressionError(f"{number!r} is no number")
        self._take("mark", ",")
        self._take("name", "precision")
        self._take("mark", "=")
        if not 1 <= self._integer_value() <= 256:
            raise ExpressionError("a float's precision lies between 1 and 256 bits")
        return _Bound(bits=MAX_INTEGER_BITS)

    def _integer_value(self) -> int:
        value = self._integer().literal
        return 0 if value is None else value


def _grown(name: str, arguments: list[_Bound]) -> _Bound:
    bits, degree = sum(a.bits for a in arguments), sum(a.degree for a in arguments)
    if name in _POWERS:
        exponent = arguments[1].literal if len(arguments) == 2 else None
        if exponent is None or abs(exponent) > MAX_EXPONENT:
            raise ExpressionError(f"the exponent of {name} is an integer of at most {MAX_EXPONENT}")
        return _Bound(arguments[0].bits * max(1, abs(exponent)), arguments[0].degree * max(1, abs(exponent)))
    if name == "LShift":
        shift = arguments[1].literal if len(arguments) == 2 else None
        if shift is None or not 0 <= shift <= MAX_SHIFT:
            raise ExpressionError(f"a shift is an integer from 0 to {MAX_SHIFT}")
        return _Bound(arguments[0].bits + shift, degree)
    if name == "Mul":
        return _Bound(bits, degree)
    return _Bound(max(a.bits for a in arguments) + len(arguments), max(a.degree for a in arguments))


def check_expression(text: str) -> None:
    """Raises :class:`ExpressionError` unless ``text`` is a shape expression."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    _Parser(text).whole()
