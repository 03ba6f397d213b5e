"""merge-pieces: pieces of pieces become one, and what was only cut to be joined again is not cut.

Before → after::

    slice(slice(x, 1, 2, 9), 1, 1, 4)           →  slice(x, 1, 3, 6)
    select(slice(x, 1, 2, 9), 1, 0)             →  select(x, 1, 2)
    slice(cat([a, b], 1), 1, 0, size of a)      →  a
    split(cat([a, b], 1), [3, 5], 1)[1]         →  b
    cat(split(x, [3, 5], 1), 1)                 →  x      (all pieces, in order; also of slices, chunk, unbind → stack)
    cat([cat([a, b], 1), c], 1)                 →  cat([a, b, c], 1)

Equation: a slice ``a : b : s`` of a slice ``c : d : t`` takes index ``c + t · (a + s · i)``; a piece of a cat is the
operand that fills its place.

Does not apply when: the program would not have fewer operators, because another one reads the inner piece; sizes
along the axis depend on the input; a piece of a cat lies across two operands, or is only a part of one that has to be
cut anyway; pieces are joined in another order, or not all of them.
Numerical effect: none, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.layout.views import shape_of

aten = torch.ops.aten
_SLICE, _NARROW, _SELECT, _CAT, _STACK = (
    "aten.slice.Tensor", "aten.narrow.default", "aten.select.int", "aten.cat.default", "aten.stack.default",
)  # fmt: skip
_CUTS = (_SLICE, _NARROW, _SELECT)
_UNBIND, _ITEM = "aten.unbind.int", "operator.getitem"
_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")


@dataclass(frozen=True)
class Piece:
    """What a call takes of another value along one axis.

    Attributes:
        of: The value.
        dim: The axis, ≥ 0.
        places: Indices along it.
        drops: The axis goes, as with select and unbind.
    """

    of: Node
    dim: int
    places: range
    drops: bool = False


class MergePieces(Pass[Program]):
    """Pieces of pieces become one, and what was only cut to be joined again is not cut."""

    name: ClassVar[str] = "merge-pieces"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls():
            yield from _found(node)

    def apply(self, ir: Program, match: Match) -> Change:
        node = match.node
        where = (provenance.module_path(node),)
        # Found again: what the inner piece reads may have been replaced since.
        what, call = next(each.data for each in _found(node) if isinstance(each, Match))
        if isinstance(call, Node):
            return Change(what=what, where=where, saved_nodes=ir.replace(node, call))
        target, args = call
        new = ir.add_call(target, args, before=node, value_of=node)
        return Change(what=what, where=where, saved_nodes=ir.replace(node, new) - 1)


def _found(node: Node) -> Iterator[Match | NearMiss]:
    name = dialect.op_name(node)
    if name in (_CAT, _STACK):
        yield from _joined(node)
        return
    piece = piece_of(node)
    if piece is None:
        return
    if dialect.op_name(piece.of) == _CAT:
        yield from _piece_of_cat(node, piece)
    elif name in _CUTS:
        yield from _piece_of_piece(node, piece)


def piece_of(node: Node) -> Piece | None:
    """What ``node`` takes of its operand; None where it takes no piece, or sizes along the axis depend on the input."""
    name = dialect.op_name(node)
    if name in _CUTS:
        value, dim, *rest = dialect.operands(node)
        length = _length(value, dim)
        if length is None or any(isinstance(r, Node) for r in rest):
            return None
        dim %= len(shape_of(value))
        if name == _SLICE:
            return Piece(value, dim, range(length)[slice(*rest)])
        if name == _NARROW:
            return Piece(value, dim, range(length)[rest[0] :][: rest[1]])
        index = rest[0] % length
        return Piece(value, dim, range(index, index + 1), drops=True)
    if name != _ITEM:
        return None
    several, index = cast("tuple[Node, int]", node.args)
    name = dialect.op_name(several)
    if name not in (*_SPLITS, _UNBIND):
        return None
    value, *rest = dialect.operands(several)
    dim = rest[-1]
    length = _length(value, dim)
    if length is None:
        return None
    dim %= len(shape_of(value))
    if name == _UNBIND:
        return Piece(value, dim, range(index % length, index % length + 1), drops=True)
    sizes = [int(v.shape[dim]) for v in several.meta["val"]]
    start = sum(sizes[: index % len(sizes)])
    return Piece(value, dim, range(start, start + sizes[index]))


def _length(value: Any, dim: int) -> int | None:
    size = value.meta["val"].shape[dim]
    return None if isinstance(size, torch.SymInt) else int(size)


def _private(node: Node) -> bool:
    return len(node.users) == 1


def _piece_of_piece(node: Node, piece: Piece) -> Iterator[Match | NearMiss]:
    inner = piece.of
    if dialect.op_name(inner) not in (_SLICE, _NARROW):
        return
    outer = piece_of(inner)
    if outer is None or outer.dim != piece.dim:
        return
    if not _private(inner):
        yield NearMiss("piece of a slice", node, f"the slice's output is used by {len(inner.users) - 1} other(s)")
        return
    places = outer.places[piece.places.start : piece.places.stop : piece.places.step]
    value: Any = inner.args[0]
    call: Any
    if piece.drops:
        call = aten.select.int, (value, piece.dim, places[0])
    elif len(places) == 0:
        return
    else:
        call = aten.slice.Tensor, (value, piece.dim, places.start, places[-1] + 1, places.step)
    yield Match(node, (node, inner), (f"{dialect.plain_name(node)} of a slice merged", call))


def _piece_of_cat(node: Node, piece: Piece) -> Iterator[Match | NearMiss]:
    cat = piece.of
    operands, dim = dialect.operands(cat)
    if dim % len(shape_of(cat)) != piece.dim or not len(piece.places):
        return
    first, last = piece.places[0], piece.places[-1]
    start = 0
    for operand in operands:
        if len(shape_of(operand)) != len(shape_of(cat)):  # a tensor without elements may have one axis: it adds nothing
            continue
        length = _length(operand, dim)
        if length is None:
            return
        if start <= first and last < start + length:
            break
        start += length
    else:
        yield NearMiss("piece of a cat", node, "it takes parts of several of the joined values")
        return
    if operand.meta["val"].dtype != cat.meta["val"].dtype:
        yield NearMiss("piece of a cat", node, "the cat changes its operand's dtype")
        return
    cutter = cast("Node", node.args[0]) if dialect.op_name(node) == _ITEM else node
    what = f"{dialect.plain_name(cutter)} of a cat read off its operand"
    step = piece.places.step
    if not piece.drops and step == 1 and len(piece.places) == length:
        yield Match(node, (node, cat), (what, operand))
    elif _private(cat) and dialect.op_name(node) in _CUTS:
        if piece.drops:
            call: Any = aten.select.int, (operand, piece.dim, first - start)
        else:
            call = aten.slice.Tensor, (operand, piece.dim, first - start, last - start + 1, step)
        yield Match(node, (node, cat), (what, call))
    else:
        yield NearMiss("piece of a cat", node, "a part of one operand has to be cut out anyway")


def _joined(node: Node) -> Iterator[Match | NearMiss]:
    operands = cast("list[Node]", node.args[0])
    is_stack = dialect.op_name(node) == _STACK
    dim = cast("int", dialect.operands(node)[1]) % len(shape_of(node))
    full = [n for n in operands if len(shape_of(n)) == len(shape_of(node))]
    if (
        not is_stack
        and 0 < len(full) < len(operands)
        and all(n.meta["val"].dtype == node.meta["val"].dtype for n in full)
    ):
        # torch takes tensors of one axis without elements here, targets do not
        yield Match(node, (node,), ("piece without elements left out", (aten.cat.default, (full, dim))))
        return
    pieces = [piece_of(n) for n in operands]
    first = pieces[0]
    if first is not None and all(
        p is not None and p.of is first.of and p.dim == dim and p.drops == is_stack for p in pieces
    ):
        yield from _pieces_joined(node, [cast("Piece", p) for p in pieces])
    elif not is_stack:
        yield from _cat_of_cats(node, operands, dim)


def _pieces_joined(node: Node, pieces: list[Piece]) -> Iterator[Match | NearMiss]:
    value, dim = pieces[0].of, pieces[0].dim
    places = [i for piece in pieces for i in piece.places]
    if places == list(range(_length(value, dim) or 0)) and shape_of(value) == shape_of(node):
        cuts = dict.fromkeys(n for each in cast("list[Node]", node.args[0]) for n in (each, each.args[0]))
        consumed = (node, *(cast("Node", n) for n in cuts if n is not value))
        yield Match(node, consumed, ("pieces joined again are not cut", value))
    elif len(places) > 1:
        yield NearMiss("all pieces joined", node, "the pieces are not all of it, in order")


def _cat_of_cats(node: Node, operands: list[Node], dim: int) -> Iterator[Match | NearMiss]:
    inner = [n for n in operands if dialect.op_name(n) == _CAT and _dim(n) == dim]
    merged = [n for n in dict.fromkeys(inner) if _private(n) and operands.count(n) == 1]
    if merged:
        flat = [o for n in operands for o in (cast("list[Node]", n.args[0]) if n in merged else [n])]
        yield Match(node, (node, *merged), ("cat of cats merged", (aten.cat.default, (flat, dim))))
    elif inner:
        yield NearMiss("cat of cats", node, f"the cat's output is used by {len(inner[0].users) - 1} other(s)")


def _dim(cat: Node) -> int:
    return int(cast("int", dialect.operands(cat)[1])) % len(shape_of(cat))
