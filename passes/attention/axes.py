"""Which axis is what: axes of a value as products of atoms, followed through every reshape and permute.

An atom is a factor of a size. A reshape that cuts an axis cuts its atom, wherever else that atom stands; so two values
have the same layout exactly if their axes are the same atoms in the same order. An axis of size 1 has no atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from vlexport.ir import dialect

Size = Any
"""An int, or a sympy expression of the symbols of the inputs' shapes."""
Axis = tuple["Atom", ...]
Axes = tuple[Axis, ...]

_RESHAPES = (
    "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default",
    "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten._unsafe_view.default",
)  # fmt: skip
_NO_END = 1 << 40


class Atom:
    """A factor of an axis; ``parts`` once it was cut, outer part first."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()


def sizes_of(node: Node) -> tuple[Size, ...]:
    """The recorded shape."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in node.meta["val"].shape)


def whole(size: Size) -> Axis:
    """An axis of one new atom."""
    return () if size == 1 else (Atom(size),)


def leaves(axis: Iterable[Atom]) -> Axis:
    """The atoms of an axis as they are cut by now."""
    found: list[Atom] = []
    for atom in axis:
        found.extend(leaves(atom.parts) if atom.parts else (atom,))
    return tuple(found)


def flat(axes: Iterable[Axis]) -> Axis:
    """All atoms, outermost first."""
    return tuple(leaf for axis in axes for leaf in leaves(axis))


def settled(axes: Iterable[Axis]) -> Axes:
    """Axes in the atoms as they are cut by now."""
    return tuple(map(leaves, axes))


def product(atoms: Iterable[Atom]) -> Size:
    """The size of an axis of these atoms."""
    size: Size = 1
    for atom in atoms:
        size = size * atom.size
    return size


def _quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` if that is a whole number for certain."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    ratio = sympy.sympify(a) / b
    if not ratio.is_integer:
        return None
    return int(ratio) if ratio.is_number else ratio


def regrouped(atoms: Iterable[Atom], sizes: Sequence[Size]) -> Axes | None:
    """Axes of the given sizes made of these atoms in this order; cuts atoms. None where they do not fit."""
    queue = list(reversed(leaves(atoms)))
    axes: list[Axis] = []
    for size in sizes:
        axis: list[Atom] = []
        rest = size
        while rest != 1:
            if not queue:
                return None
            atom = queue.pop()
            if (left := _quotient(rest, atom.size)) is not None:
                axis.append(atom)
                rest = left
            elif (inner := _quotient(atom.size, rest)) is not None:
                atom.parts = (Atom(rest), Atom(inner))
                axis.append(atom.parts[0])
                queue.append(atom.parts[1])
                rest = 1
            else:
                return None
        axes.append(tuple(axis))
    return tuple(axes) if not queue else None


def is_layout(node: Node) -> bool:
    """Whether a call only says otherwise where the elements of its first operand lie."""
    name = dialect.op_name(node)
    return name in _RESHAPES or name == "aten.permute.default" or _is_identity(node)


def _is_identity(node: Node) -> bool:
    """A slice or an expand that leaves all as it is."""
    name = dialect.op_name(node)
    if name == "aten.expand.default":
        return sizes_of(node) == sizes_of(node.all_input_nodes[0])
    if name != "aten.slice.Tensor":
        return False
    _, _, start, end, step = dialect.operands(node)
    return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end > _NO_END))


def axes_after(node: Node, axes: Axes) -> Axes | None:
    """The axes of a layout call's value, from those of its operand."""
    if dialect.op_name(node) == "aten.permute.default":
        dims: Any = node.args[1]
        return tuple(axes[d] for d in dims)
    return regrouped(flat(axes), sizes_of(node))


def axes_before(node: Node, axes: Axes) -> Axes | None:
    """The axes of a layout call's operand, from those of its value."""
    if dialect.op_name(node) == "aten.permute.default":
        dims: Any = node.args[1]
        found: list[Axis] = [()] * len(axes)
        for place, d in enumerate(dims):
            found[d] = axes[place]
        return tuple(found)
    return regrouped(flat(axes), sizes_of(node.all_input_nodes[0]))


def aligned(node: Node, axes: Axes) -> Axes:
    """Axes of an operand that meets a value of ``axes`` elementwise; () where it is repeated."""
    sizes = sizes_of(node)
    hidden = len(axes) - len(sizes)
    return tuple(() if size == 1 else axes[hidden + i] for i, size in enumerate(sizes))
