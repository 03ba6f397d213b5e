"""canonicalize: one spelling of each idea, so that no later pass has to know two.

Before → after::

    transpose, t, mT, swapaxes, movedim      →  permute (dims ≥ 0)
    view, flatten, unflatten, view_as        →  reshape
    expand_as                                →  expand
    reshape [%batch, 197, 192]               →  reshape [-1, 197, 192]   (one symbolic entry)
    permute by the identity, reshape to the same shape, squeeze of a dim ≠ 1, cast to the same dtype  →  gone

Does not apply when: a reshape has two or more symbolic entries (they stay as they are), or a dim's size is not known.
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage

aten = torch.ops.aten
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
        was = _plain_name(node)
        where = (provenance.module_path(node),)
        rewritten = _rewritten(node)
        if isinstance(rewritten, Node):
            ir.replace(node, rewritten)
            return Change(what=f"{was} without effect removed", where=where, saved_nodes=1)
        target, args = rewritten
        new = ir.add_call(target, args, before=node, value_of=node)
        ir.replace(node, new)
        now = _plain_name(new)
        return Change(what=f"{was} spelled as {now}" if now != was else f"sizes of {was} made plain", where=where)


def _plain_name(node: Node) -> str:
    return dialect.op_name(node).removeprefix("aten.").partition(".")[0]


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
        sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        symbolic = [i for i, s in enumerate(sizes) if isinstance(s, Node)]
        if len(symbolic) != 1 or -1 in sizes:
            return None
        sizes[symbolic[0]] = -1
        return aten.reshape.default, (source, sizes)
    symbolic = [i for i, s in enumerate(want) if isinstance(s, torch.SymInt)]
    if len(symbolic) > 1:
        return None
    return aten.reshape.default, (source, [-1 if i in symbolic else int(s) for i, s in enumerate(want)])


def _expand_as(node: Node) -> Any:
    want = _shape(node)
    if any(isinstance(s, torch.SymInt) for s in want):
        return None
    return aten.expand.default, (node.args[0], [int(s) for s in want])


def _operand(node: Node) -> Any:
    return node.args[0]


def _squeeze(node: Node) -> Any:
    return node.args[0] if len(_shape(node)) == len(_shape(node.args[0])) else None


def _cast(node: Node) -> Any:
    source: Any = node.args[0]
    if any(
        value is not None
        for key, value in node.kwargs.items()
        if key not in ("dtype", "device", "non_blocking", "copy")
    ):
        return None
    return source if source.meta["val"].dtype == node.meta["val"].dtype else None


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            "aten.permute.default", "aten.transpose.int", "aten.t.default", "aten.numpy_T.default", "aten.mT.default",
            "aten.swapaxes.default", "aten.swapdims.default", "aten.movedim.int", "aten.movedim.intlist",
        ),
        _permute,
    ),
    **dict.fromkeys(
        (
            "aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int",
            "aten._unsafe_view.default", "aten.view_as.default", "aten.reshape_as.default",
        ),
        _reshape,
    ),
    "aten.expand_as.default": _expand_as,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.squeeze.default": _squeeze,
    "aten._to_copy.default": _cast,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.type_as.default": _cast,
    "aten.clone.default": _operand,
    "aten.contiguous.default": _operand,
}  # fmt: skip
