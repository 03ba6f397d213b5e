"""Calls that a pass would make, as data, and the ones that bring a value's axes into a wanted layout.

A rewrite that is described first can be compared with what stands in the graph already: where nothing differs, nothing
is to be done, and a pass that makes a canonical form needs no mark on what it made.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.attention.axes import Axes, Axis, Size, flat, product, settled, sizes_of

aten = torch.ops.aten


@dataclass(frozen=True)
class SizeOf:
    """A size that is read from an input when the graph runs."""

    size: Size


@dataclass(frozen=True)
class Stored:
    """A tensor that the Program would store."""

    name: str
    value: Tensor


@dataclass(frozen=True)
class Made:
    """A call that would be made. ``sizes`` is the shape of a reshape's or expand's value; it decides their equality."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    sizes: tuple[Size, ...] | None = None


Tree = Any
"""A Node, a constant, or one of the above; lists of them."""


def is_same(ir: Program, tree: Tree, value: Any) -> bool:
    """Whether ``value`` is what making ``tree`` would give."""
    if isinstance(tree, SizeOf):
        known = value.meta.get("val") if isinstance(value, Node) else None
        return isinstance(known, torch.SymInt) and bool(known.node.expr == tree.size)
    if isinstance(tree, Stored):
        tensor = ir.tensor_of(value)
        return tensor is not None and tensor.dtype == tree.value.dtype and torch.equal(tensor, tree.value)
    if not isinstance(tree, Made):
        return tree is value or (not isinstance(value, Node) and type(tree) is type(value) and bool(tree == value))
    if not isinstance(value, Node) or value.target is not tree.target:
        return False
    if tree.sizes is not None:
        return sizes_of(value) == tree.sizes and is_same(ir, tree.args[0], value.args[0])
    wanted = dict(tree.kwargs)
    given, operands = dialect.operands(value), list(tree.args)
    target: Any = tree.target
    operands += [wanted.get(a.name, a.default_value) for a in target._schema.arguments[len(operands) :]]
    return all(_all_same(ir, a, b) for a, b in zip(operands, given, strict=True))


def _all_same(ir: Program, tree: Tree, value: Any) -> bool:
    if isinstance(tree, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(tree) == len(value) and all(_all_same(ir, a, b) for a, b in zip(tree, value, strict=True))
    return is_same(ir, tree, value)


def made_count(tree: Tree) -> int:
    """Calls of a tree, sizes left out."""
    return 1 + sum(map(made_count, tree.args)) if isinstance(tree, Made) else 0


def emit(ir: Program, tree: Tree, *, before: Node, value_of: Node, merges: Sequence[Node] = ()) -> Any:
    """Make the calls of a tree in front of a node, with the provenance of ``value_of``."""
    if isinstance(tree, SizeOf):
        return _read_size(ir, tree.size, before, value_of)
    if isinstance(tree, Stored):
        return ir.add_tensor(tree.name, tree.value, before=before, kind="constant")
    if isinstance(tree, list):
        return [emit(ir, each, before=before, value_of=value_of) for each in tree]
    if not isinstance(tree, Made):
        return tree
    args = tuple(emit(ir, each, before=before, value_of=value_of) for each in tree.args)
    return ir.add_call(tree.target, args, dict(tree.kwargs), before=before, value_of=value_of, merges=merges)


def _place_of(ir: Program, size: Size) -> tuple[Node, int] | None:
    """An input and its dim of a size."""
    for node in ir.placeholders:
        for dim, found in enumerate(sizes_of(node)):
            if found == size:
                return node, dim
    return None


def _read_size(ir: Program, size: Size, before: Node, value_of: Node) -> Node:
    place = _place_of(ir, size)
    assert place is not None
    for user in place[0].users:
        if dialect.op_name(user) == "aten.sym_size.int" and user.args == place and user < before:
            return user
    return ir.add_call(aten.sym_size.int, place, before=before, value_of=value_of)


def arranged(ir: Program, node: Tree, axes: Axes, wanted: Axes) -> Tree | None:
    """``node``, of ``axes``, brought into ``wanted``; None where that needs a size that no input has.

    Axes of ``wanted`` whose atoms ``axes`` lacks are repeated.
    """
    have, want = settled(axes), settled(wanted)
    present, needed = set(flat(have)), flat(want)
    if not present <= set(needed):
        return None
    if have == want:
        return node
    middle = tuple(part for axis in want for part in _runs(axis, present))
    if all(set(axis) <= present for axis in middle):
        return _moved(ir, node, have, want)
    single = tuple(axis if set(axis) <= present else () for axis in middle)
    tree = _moved(ir, node, have, single)
    if tree is None:
        return None
    sizes = tuple(map(product, middle))
    given = [
        -1 if a == b else s if isinstance(s, int) else SizeOf(s) for a, b, s in zip(single, middle, sizes, strict=True)
    ]
    if any(isinstance(each, SizeOf) and _place_of(ir, each.size) is None for each in given):
        return None
    tree = Made(aten.expand.default, (tree, given), sizes=sizes)
    return tree if middle == want else _reshaped(ir, tree, want)


def _runs(axis: Axis, present: set[Any]) -> list[Axis]:
    """An axis cut where atoms that are there meet atoms that are not."""
    if not axis:
        return [()]
    found: list[list[Any]] = []
    for atom in axis:
        if found and (found[-1][-1] in present) == (atom in present):
            found[-1].append(atom)
        else:
            found.append([atom])
    return [tuple(each) for each in found]


def _moved(ir: Program, tree: Tree, have: Axes, want: Axes) -> Tree | None:
    """The same elements in another layout: reshape, permute, reshape, as few of them as it takes."""
    if have == want:
        return tree
    if flat(have) == flat(want):
        return _reshaped(ir, tree, want)
    dims = _permutation(have, want)
    if dims is not None:
        return Made(aten.permute.default, (tree, dims))
    units = _units(flat(have), flat(want))
    ordered = tuple(sorted(units, key=lambda unit: flat(have).index(unit[0])))
    first = tree if ordered == have else _reshaped(ir, tree, ordered)
    if first is None:
        return None
    moved = Made(aten.permute.default, (first, [ordered.index(unit) for unit in units]))
    return moved if tuple(units) == want else _reshaped(ir, moved, want)


def _permutation(have: Axes, want: Axes) -> list[int] | None:
    rest = list(range(len(have)))
    dims = []
    for axis in want:
        place = next((i for i in rest if have[i] == axis), None)
        if place is None:
            return None
        rest.remove(place)
        dims.append(place)
    return dims if not rest else None


def _units(have: Axis, want: Axis) -> list[Axis]:
    """Longest runs that stand together on both sides, in the order of ``want``."""
    following = dict(itertools.pairwise(have))
    units: list[list[Any]] = []
    for atom in want:
        if units and following.get(units[-1][-1]) is atom:
            units[-1].append(atom)
        else:
            units.append([atom])
    return [tuple(unit) for unit in units]


def _reshaped(ir: Program, tree: Tree, want: Axes) -> Tree | None:
    sizes = tuple(map(product, want))
    symbolic = [i for i, size in enumerate(sizes) if isinstance(size, sympy.Basic)]
    given: list[Any] = [SizeOf(s) if i in symbolic else s for i, s in enumerate(sizes)]
    if symbolic:
        hidden = next((i for i in symbolic if _place_of(ir, sizes[i]) is None), symbolic[0])
        given[hidden] = -1
    if any(isinstance(each, SizeOf) and _place_of(ir, each.size) is None for each in given):
        return None
    return Made(aten.reshape.default, (tree, given), sizes=sizes)
