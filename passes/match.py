"""The pattern matcher: a tree of operators is matched upwards from its root, and a failed match says where and why.

A pattern is data::

    linear = op("aten.linear.default", bind("x"), stored("weight"))
    pattern = op("aten.mul.Tensor", linear, number("scale"), commutes=True)

:func:`match` returns :class:`Found` (bindings, and the nodes that a rewrite consumes) or :class:`Failed` (the node at
which it stopped, and the reason). Of several ways to match, every one is tried; of their failures the farthest one is
returned, the one with most of the pattern matched before it.

What a rewrite consumes may have no reader outside the match. An operator of ``shared=True`` is kept, and with it
everything above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program


@dataclass(frozen=True)
class Bind:
    """Any operand that a test accepts, kept under a name. The same name twice means the same operand.

    Attributes:
        name: Where :class:`Found` keeps it.
        accepts: The test; None accepts all.
        otherwise: The reason when it does not.
    """

    name: str
    accepts: Callable[[Program, Any], bool] | None = None
    otherwise: str = ""


@dataclass(frozen=True)
class Op:
    """A call of one of some operators.

    Attributes:
        names: ``aten.NAME.OVERLOAD``, one or several.
        operands: Patterns for its first operands, in the order of its schema; further operands are not looked at.
        name: Binds the node itself.
        noun: What a message calls it (``a convolution or linear``).
        commutes: Try the first two operands in both orders.
        shared: Other readers are allowed; the rewrite keeps the node.
        check: A condition on the node, looked at before its operands; returns why not, or nothing.
    """

    names: tuple[str, ...]
    operands: tuple[Op | Bind, ...]
    name: str
    noun: str
    commutes: bool
    shared: bool
    check: Callable[[Program, Node], str] | None


Pattern = Op | Bind


@dataclass(frozen=True)
class Found:
    """A match.

    Attributes:
        bound: Name → node or constant. What is not among ``nodes`` may have been replaced by the time this match is
            applied, when others were applied before; then read it off the node that reads it.
        nodes: Calls that the rewrite consumes, each once, operands before readers.
    """

    bound: Mapping[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


@dataclass(frozen=True)
class Failed:
    """No match.

    Attributes:
        node: Where it stopped.
        reason: Why, in words a user can act on.
        depth: Operators and operands that had matched by then.
    """

    node: Node
    reason: str
    depth: int


@dataclass(frozen=True)
class _Path:
    """What matched so far on one of the ways to match."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    depth: int = 0

    def then(self, name: str, value: Any) -> _Path:
        return _Path({**self.bound, name: value} if name else self.bound, self.nodes, self.depth + 1)

    def consuming(self, node: Node) -> _Path:
        return self if node in self.nodes else _Path(self.bound, (*self.nodes, node), self.depth)


def op(names: str | Sequence[str], *operands: Pattern, name: str = "", noun: str = "", commutes: bool = False,
       shared: bool = False, check: Callable[[Program, Node], str] | None = None) -> Op:  # fmt: skip
    """An :class:`Op`; its noun is made from its names unless given."""
    names = (names,) if isinstance(names, str) else tuple(names)
    return Op(names, operands, name, noun or " or ".join(map(dialect.plain_name, names)), commutes, shared, check)


def match(program: Program, pattern: Op, root: Node) -> Found | Failed:
    """Match ``pattern`` with its root at ``root``."""
    search = _Search(program)
    for path in search.op(pattern, root, root, _Path(), kept=False):
        if search.is_private(path, root):
            return Found(path.bound, path.nodes)
    return search.farthest


class _Search:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.farthest: Failed = Failed(program.output, "", -1)

    def fail(self, node: Node, reason: str, path: _Path) -> None:
        if path.depth > self.farthest.depth:
            self.farthest = Failed(node, reason, path.depth)

    def is_private(self, path: _Path, root: Node) -> bool:
        for node in path.nodes:
            others = [user for user in node.users if user not in path.nodes]
            if node is not root and others:
                self.fail(node, f"the {dialect.plain_name(node)}'s output is used by {len(others)} other(s)", path)
                return False
        return True

    def operand(self, pattern: Pattern, value: Any, reader: Node, path: _Path, *, kept: bool) -> Iterator[_Path]:
        if isinstance(pattern, Op):
            yield from self.op(pattern, value, reader, path, kept=kept)
        elif pattern.accepts is not None and not pattern.accepts(self.program, value):
            self.fail(reader, pattern.otherwise, path)
        elif self.agrees(pattern.name, value, reader, path):
            yield path.then(pattern.name, value)

    def op(self, pattern: Op, value: Any, reader: Node, path: _Path, *, kept: bool) -> Iterator[_Path]:
        if not isinstance(value, Node) or dialect.op_name(value) not in pattern.names:
            self.fail(reader, _mismatch(value, pattern.noun, is_root=value is reader), path)
            return
        reason = pattern.check(self.program, value) if pattern.check is not None else ""
        if reason:
            self.fail(value, reason, path)
            return
        if not self.agrees(pattern.name, value, reader, path):
            return
        kept = kept or pattern.shared
        operands = dialect.operands(value)[: len(pattern.operands)]
        orders = [operands]
        if pattern.commutes:
            orders.append((operands[1], operands[0], *operands[2:]))
        for order in orders:
            start = path.then(pattern.name, value)
            for done in self.sequence(pattern.operands, order, value, start, kept=kept):
                yield done if kept else done.consuming(value)

    def sequence(
        self, patterns: tuple[Pattern, ...], values: tuple[Any, ...], reader: Node, path: _Path, *, kept: bool
    ) -> Iterator[_Path]:
        if not patterns:
            yield path
            return
        for first in self.operand(patterns[0], values[0], reader, path, kept=kept):
            yield from self.sequence(patterns[1:], values[1:], reader, first, kept=kept)

    def agrees(self, name: str, value: Any, reader: Node, path: _Path) -> bool:
        if not name or name not in path.bound or same(path.bound[name], value):
            return True
        self.fail(reader, f"{name} is not the same value in both places", path)
        return False


def same(a: Any, b: Any) -> bool:
    """Whether two operands mean the same: the same node, or equal constants of one type (1 is not 1.0, nor True)."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (type(a) is type(b) and not isinstance(a, Node) and repr(a) == repr(b))


def _mismatch(value: Any, noun: str, *, is_root: bool) -> str:
    if not isinstance(value, Node):
        return f"its operand is the constant {value!r}, not made by {noun}"
    found = dialect.op_name(value).removeprefix("aten.")
    return f"it is {found}, not {noun}" if is_root else f"its operand is made by {found}, not by {noun}"


def bind(name: str) -> Bind:
    """Any operand."""
    return Bind(name)


def stored(name: str, otherwise: str = "", *, optional: bool = False) -> Bind:
    """A tensor that the Program stores; with ``optional`` also None, as where a bias is left out."""
    return Bind(
        name,
        lambda program, value: (optional and value is None) or program.tensor_of(value) is not None,
        otherwise or f"its {name} is computed, not stored",
    )


def number(name: str, otherwise: str = "") -> Bind:
    """A Python number, or a stored tensor of one element."""

    def accepts(program: Program, value: Any) -> bool:
        return as_number(program, value) is not None

    return Bind(name, accepts, otherwise or f"its {name} is no constant number")


def as_number(program: Program, value: Any) -> float | None:
    """The number that an operand is: a Python number, or a stored tensor of one element; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = program.tensor_of(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for certain; sizes that the input decides are when their symbols are."""
    return len(a) == len(b) and all(map(_same_size, a, b))


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and int(a) == int(b)


def privacy(nodes: Sequence[Node], root: Node) -> Failed | None:
    """The first of ``nodes`` but the root that somebody else reads, or None when a rewrite may consume them all."""
    inside = set(nodes)
    for depth, node in enumerate(nodes):
        others = [user for user in node.users if user not in inside]
        if node is not root and others:
            return Failed(node, f"the {dialect.plain_name(node)}'s output is used by {len(others)} other(s)", depth)
    return None


@dataclass(frozen=True)
class Place:
    """An operand of a call that a rewrite consumes: what stands there when the rewrite is applied may be new by then.

    Attributes:
        reader: The call.
        position: Of the operand, in the order of the schema.
        entry: Of the operand within a list that stands there, as of a cat; None where it stands there itself.
    """

    reader: Node
    position: int
    entry: int | None = None

    @property
    def value(self) -> Any:
        """What stands there now."""
        found = dialect.operands(self.reader)[self.position]
        return found if self.entry is None else found[self.entry]


def place_of(value: Node, nodes: Iterable[Node]) -> Place:
    """Where one of ``nodes`` reads ``value``."""
    return next(place for node in nodes for place in _places(node) if place.value is value)


def _places(node: Node) -> Iterator[Place]:
    for i, operand in enumerate(dialect.operands(node)):
        yield Place(node, i)
        if isinstance(operand, (list, tuple)):
            yield from (Place(node, i, entry) for entry in range(len(operand)))


def constant(name: str, *allowed: Any) -> Bind:
    """One of some constants, type included."""
    shown = " or ".join(map(repr, allowed))
    return Bind(name, lambda _, value: any(same(value, each) for each in allowed), f"its {name} is not {shown}")
