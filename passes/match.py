"""The pattern matcher: a tree of operators is matched upwards from its root, and a failed match says where and why.

A pattern is data::

    linear = op("aten.linear.default", Bind("x"), Bind("weight", stored()))
    pattern = op("aten.mul.Tensor", linear, Bind("scale", number()), commutes=True)

:func:`match` returns :class:`Found` (bindings, and the nodes that a rewrite consumes) or :class:`Failed` (the node at
which it stopped, the reason, and how many operators had matched). The farther a failure got, the better a near miss it
is; of the two operand orders of a commuting operator the farther one is reported.

Every operator but the root must have no reader outside the match, unless ``shared=True``: a rewrite consumes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

Reason = str
"""Why something does not fit; empty when it does."""
Check = Callable[[Program, Any], Reason]


@dataclass(frozen=True)
class Bind:
    """Any operand that a check accepts, kept under a name. The same name twice means the same operand."""

    name: str
    check: Check | None = None


@dataclass(frozen=True)
class Op:
    """A call of one of some operators.

    Attributes:
        names: ``aten.NAME.OVERLOAD``, one or several.
        operands: Patterns for its first operands, in order; further operands are not looked at.
        name: Binds the node itself.
        commutes: Try the first two operands in both orders.
        shared: Other readers are allowed; the rewrite keeps the node.
        check: A last condition on the node.
    """

    names: str | tuple[str, ...]
    operands: tuple[Pattern, ...] = ()
    name: str = ""
    commutes: bool = False
    shared: bool = False
    check: Check | None = None


Pattern = Op | Bind


@dataclass(frozen=True)
class Found:
    """A match.

    Attributes:
        bound: Name → node or constant.
        nodes: Calls that the rewrite consumes, operands before readers.
    """

    bound: dict[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


@dataclass(frozen=True)
class Failed:
    """No match.

    Attributes:
        node: Where it stopped.
        reason: Why, in words a user can act on.
        depth: Operators that had matched by then.
    """

    node: Node
    reason: Reason
    depth: int


@dataclass
class _State:
    program: Program
    bound: dict[str, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def copy(self) -> _State:
        return _State(self.program, dict(self.bound), list(self.nodes))

    def become(self, other: _State) -> None:
        self.bound, self.nodes = other.bound, other.nodes


def op(names: str | Sequence[str], *operands: Pattern, name: str = "", commutes: bool = False, shared: bool = False,
       check: Check | None = None) -> Op:  # fmt: skip
    """An :class:`Op` without the tuple brackets."""
    return Op(names if isinstance(names, str) else tuple(names), operands, name, commutes, shared, check)


def match(program: Program, pattern: Op, root: Node) -> Found | Failed:
    """Match ``pattern`` with its root at ``root``."""
    state = _State(program)
    failed = _match_op(state, pattern, root, reader=None)
    if failed is not None:
        return failed
    inside = set(state.nodes)
    for node in state.nodes[:-1]:
        others = [user for user in node.users if user not in inside]
        if others:
            return Failed(node, f"its value is also read by {_short(others[0])}", len(state.nodes))
    return Found(state.bound, tuple(state.nodes))


def _match(state: _State, pattern: Pattern, value: Any, reader: Node) -> Failed | None:
    if isinstance(pattern, Op):
        return _match_op(state, pattern, value, reader)
    if pattern.name in state.bound:
        if state.bound[pattern.name] is value or (not isinstance(value, Node) and state.bound[pattern.name] == value):
            return None
        return Failed(reader, f"{pattern.name} is not the same value in both places", len(state.nodes))
    reason = pattern.check(state.program, value) if pattern.check is not None else ""
    if reason:
        return Failed(reader, f"{pattern.name} {reason}", len(state.nodes))
    state.bound[pattern.name] = value
    return None


def _match_op(state: _State, pattern: Op, value: Any, reader: Node | None) -> Failed | None:
    names = (pattern.names,) if isinstance(pattern.names, str) else pattern.names
    if not isinstance(value, Node) or dialect.op_name(value) not in names:
        wanted = " or ".join(n.removeprefix("aten.").partition(".")[0] for n in names)
        where = reader if reader is not None else value
        return Failed(where, f"{wanted} is wanted, {_short(value)} is there", len(state.nodes))
    if len(value.args) < len(pattern.operands):
        return Failed(value, "an operand is given by keyword or left out", len(state.nodes))
    orders = [tuple(range(len(pattern.operands)))]
    if pattern.commutes and len(pattern.operands) >= 2:
        orders.append((1, 0, *range(2, len(pattern.operands))))
    worst: Failed | None = None
    for order in orders:
        attempt = state.copy()
        failed = _match_operands(attempt, pattern, value, order)
        if failed is None:
            state.become(attempt)
            if not pattern.shared:
                state.nodes.append(value)
            if pattern.name:
                state.bound[pattern.name] = value
            return None
        if worst is None or failed.depth > worst.depth:
            worst = failed
    return worst


def _match_operands(state: _State, pattern: Op, node: Node, order: tuple[int, ...]) -> Failed | None:
    for each, position in zip(pattern.operands, order, strict=True):
        failed = _match(state, each, node.args[position], node)
        if failed is not None:
            return (
                failed if failed.depth > len(state.nodes) else Failed(failed.node, failed.reason, len(state.nodes) + 1)
            )
    reason = pattern.check(state.program, node) if pattern.check is not None else ""
    return Failed(node, reason, len(state.nodes) + 1) if reason else None


def _short(value: Any) -> str:
    return dialect.op_name(value).removeprefix("aten.") if isinstance(value, Node) else f"the constant {value!r}"


# -- checks ----------------------------------------------------------------------------------------------------------


def stored() -> Check:
    """A tensor that the Program stores."""
    return lambda program, value: "" if program.tensor_of(value) is not None else "is computed, not stored"


def stored_or_none() -> Check:
    """A stored tensor, or nothing."""
    return lambda program, value: (
        "" if value is None or program.tensor_of(value) is not None else "is computed, not stored"
    )


def number() -> Check:
    """A Python number, or a stored tensor of one element."""

    def check(program: Program, value: Any) -> Reason:
        tensor = program.tensor_of(value)
        if isinstance(value, (int, float)) or (tensor is not None and tensor.numel() == 1):
            return ""
        return "is no constant number"

    return check


def constant(*allowed: Any) -> Check:
    """One of some constants."""
    shown = " or ".join(map(repr, allowed))
    return lambda program, value: "" if value in allowed and not isinstance(value, Node) else f"is {value}, not {shown}"


def tensor_of_rank(rank: int) -> Check:
    """A value of a given rank."""

    def check(program: Program, value: Any) -> Reason:
        fake = value.meta["val"] if isinstance(value, Node) else None
        if isinstance(fake, torch.Tensor) and fake.ndim == rank:
            return ""
        return f"has rank {fake.ndim if isinstance(fake, torch.Tensor) else 'none'}, not {rank}"

    return check
