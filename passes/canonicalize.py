"""canonicalize: one spelling of each idea, so that no later pass has to know two.

Before → after::

    transpose, t, mT, swapaxes, movedim      →  permute (dims ≥ 0)
    view, flatten, unflatten, view_as        →  reshape
    expand_as, broadcast_to                  →  expand
    reshape [%batch, 197, 192]               →  reshape [-1, 197, 192]   (one symbolic entry)
    reshape [%batch, 197, 3, -1]             →  reshape [-1, 197, 3, 64] (one symbolic size in the result)
    flatten, view_as … to two or more symbolic entries  →  reshape [sym_size, -1, 192]
    permute by the identity, reshape to the same shape, squeeze of a dim ≠ 1, cast to the same dtype  →  gone

Does not apply when: a reshape has two or more symbolic sizes (they stay as they are).
Numerical effect: none, bit for bit, but that an operator behind a removed ``contiguous`` may sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

aten = torch.ops.aten
_UNKNOWN = -1


@dataclass(frozen=True)
class _SizeOf:
    """Stands, in the operands of a call to be made, for a size that is read when the graph runs."""

    node: Node
    dim: int


_Rule = Callable[[Node], "tuple[Any, tuple[Any, ...]] | Node | None"]


class Canonicalize(Pass[Program]):
    """One spelling of each idea."""

    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[Stage] = "normalize"
    effect: ClassVar[Effect] = "exact"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            if _rewritten(node) is not None:
                yield Match(node, (node,))

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        was = dialect.plain_name(node)
        where = (provenance.module_path(node),)
        rewritten = _rewritten(node)
        if isinstance(rewritten, Node):
            saved = ir.replace(node, rewritten)
            return Change(what=f"{was} without effect removed", where=where, saved_nodes=saved)
        target, (source, entries) = rewritten
        sizes = [_read(ir, entry, node) for entry in entries]
        made = 1 + sum(isinstance(entry, _SizeOf) for entry in entries)
        new = ir.add_call(target, (source, sizes), before=node, value_of=node)
        saved = ir.replace(node, new) - made
        now = dialect.plain_name(new)
        what = f"{was} spelled as {now}" if now != was else f"sizes of {was} made plain"
        return Change(what=what, where=where, saved_nodes=saved)


def _read(ir: Program, entry: Any, node: Node) -> Any:
    if not isinstance(entry, _SizeOf):
        return entry
    return ir.add_call(aten.sym_size.int, (entry.node, entry.dim), before=node, value_of=node)


def _rewritten(node: Node) -> Any:
    """The operand that replaces ``node``, the call that does, or None."""
    rule = _RULES.get(dialect.op_name(node))
    return rule(node) if rule is not None else None


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.meta["val"].shape)


def _known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for certain; equal symbols are."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and int(a) == int(b)


def _permute(node: Node) -> Any:
    source: Any = node.args[0]
    rank = len(_shape(source))
    dims = _permutation(dialect.op_name(node), node.args, rank)
    if dims == list(range(rank)):
        return source
    given: Any = node.args[1] if len(node.args) > 1 else None
    if dialect.op_name(node) == "aten.permute.default" and dims == list(given):
        return None
    return aten.permute.default, (source, dims)


def _permutation(name: str, args: tuple[Any, ...], rank: int) -> list[int]:
    dims = list(range(rank))
    if name == "aten.permute.default":
        return [d % rank for d in args[1]]
    if name in ("aten.t.default", "aten.numpy_T.default", "aten.mT.default", "aten.adjoint.default"):
        if name in ("aten.mT.default", "aten.adjoint.default"):
            dims[-1], dims[-2] = dims[-2], dims[-1]
            return dims
        return dims[::-1]
    if name.startswith("aten.movedim"):
        sources, goals = ([a] if isinstance(a, int) else list(a) for a in args[1:3])
        places = {goal % rank: source % rank for source, goal in zip(sources, goals, strict=True)}
        rest = iter(d for d in range(rank) if d not in places.values())
        return [places[i] if i in places else next(rest) for i in range(rank)]
    first, second = args[1] % rank, args[2] % rank
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _reshape(node: Node) -> Any:
    source: Any = node.args[0]
    have, want = _shape(source), _shape(node)
    if len(have) == len(want) and all(map(_known_equal, have, want)):
        return source
    name = dialect.op_name(node)
    if name == "aten.reshape.default":
        given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        open_sizes = sum(isinstance(s, torch.SymInt) for s in want)
        if not any(isinstance(s, Node) for s in given) or open_sizes > 1:
            return None
        if 0 in given or 0 in want:  # leaves −1 undefined
            return None
        return aten.reshape.default, (source, [-1 if isinstance(s, torch.SymInt) else int(s) for s in want])
    entries = [e if isinstance(s, torch.SymInt) else int(s) for e, s in zip(_entries(node), want, strict=True)]
    symbolic = [i for i, e in enumerate(entries) if not isinstance(e, int) or e == _UNKNOWN]
    if symbolic and 0 not in entries:
        open_entry = next((i for i in symbolic if entries[i] == _UNKNOWN), symbolic[0])
        entries[open_entry] = _UNKNOWN
    return aten.reshape.default, (source, entries)


def _entries(node: Node) -> list[Any]:
    """For each dim of the result of a second spelling of reshape: where its size is read; −1 for a product."""
    source: Any = node.args[0]
    name = dialect.op_name(node)
    own = [_SizeOf(source, i) for i in range(len(_shape(source)))]
    if name in ("aten.view_as.default", "aten.reshape_as.default"):
        return [_SizeOf(node.args[1], i) for i in range(len(_shape(node)))]  # type: ignore[arg-type]
    if name == "aten.flatten.using_ints":
        given: list[Any] = [*node.args[1:], *(0, -1)[len(node.args) - 1 :]]
        first, last = (a % max(len(own), 1) for a in given)
        return [*own[:first], _UNKNOWN, *own[last + 1 :]]
    if name == "aten.unflatten.int":
        dim, sizes = cast("tuple[int, list[Any]]", node.args[1:3])
        dim %= len(own)
        return [*own[:dim], *sizes, *own[dim + 1 :]]
    return list(node.args[1])  # type: ignore[arg-type]


def _expand(node: Node) -> Any:
    source, other = node.args[:2]
    if dialect.op_name(node) == "aten.broadcast_to.default":
        return aten.expand.default, (source, list(other))  # type: ignore[arg-type]
    want, have = _shape(node), _shape(source)
    new = len(want) - len(have)
    sizes: list[Any] = []
    for i, size in enumerate(want):
        if not isinstance(size, torch.SymInt):
            sizes.append(int(size))
        elif i >= new and _known_equal(size, have[i - new]):
            sizes.append(-1)
        else:
            sizes.append(_SizeOf(other, i))  # type: ignore[arg-type]
    return aten.expand.default, (source, sizes)


def _operand(node: Node) -> Any:
    return node.args[0]


def _squeeze(node: Node) -> Any:
    return node.args[0] if len(_shape(node)) == len(_shape(node.args[0])) else None


def _cast(node: Node) -> Any:
    source: Any = node.args[0]
    if any(
        value is not None
        for key, value in node.kwargs.items()
        if key not in ("dtype", "device", "layout", "pin_memory", "non_blocking", "copy")
    ):
        return None
    return source if source.meta["val"].dtype == node.meta["val"].dtype else None


def _spelled(canonical: str, rule: _Rule) -> dict[str, _Rule]:
    return dict.fromkeys((canonical, *dialect.SECOND_SPELLINGS[canonical]), rule)


_RULES: dict[str, _Rule] = {
    **_spelled("aten.permute.default", _permute),
    **_spelled("aten.reshape.default", _reshape),
    **dict.fromkeys(dialect.SECOND_SPELLINGS["aten.expand.default"], _expand),
    **dict.fromkeys(dialect.COPIES, _operand),
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.squeeze.default": _squeeze,
    "aten._to_copy.default": _cast,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.type_as.default": _cast,
}
