"""A product of two values, however it is spelled: matmul, mm, bmm, baddbmm or einsum, with its axes told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.attention.axes import Axes, Axis, sizes_of, whole

_MATMULS = ("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
_ADDED = "aten.baddbmm.default"
_EINSUM = "aten.einsum.default"
PRODUCTS = (*_MATMULS, _ADDED, _EINSUM)


@dataclass(frozen=True)
class Product:
    """``alpha · left · right + beta · added``.

    Attributes:
        left: First operand.
        right: Second operand.
        left_axes: Its axes; () where it is repeated, or of size 1.
        right_axes: Likewise.
        axes: Of the result.
        contracted: Atoms of the axes that are summed over.
        left_free: Atoms of the result that only the first operand has.
        right_free: Likewise of the second.
        added: What baddbmm adds, or None.
        alpha: Factor of the product.
        beta: Factor of what is added.
    """

    left: Node
    right: Node
    left_axes: Axes
    right_axes: Axes
    axes: Axes
    contracted: Axis
    left_free: Axis
    right_free: Axis
    added: Node | None = None
    alpha: float = 1.0
    beta: float = 1.0


def product_of(node: Node) -> Product | None:
    """The product that a call is, or None."""
    name = dialect.op_name(node)
    if name in _MATMULS:
        left, right = dialect.operands(node)[:2]
        return _matmul(left, right)
    if name == _ADDED:
        added, left, right, beta, alpha = dialect.operands(node)
        made = _matmul(left, right)
        if made is None:
            return None
        added = added if beta != 0 else None  # torch then ignores it, whatever it holds
        return Product(
            made.left, made.right, made.left_axes, made.right_axes, made.axes, made.contracted, made.left_free,
            made.right_free, added, float(alpha), float(beta),
        )  # fmt: skip
    return _einsum(node) if name == _EINSUM else None


def _matmul(left: Node, right: Node) -> Product | None:
    """Leading axes are repeated as torch does, counted from the right."""
    a, b = sizes_of(left), sizes_of(right)
    if min(len(a), len(b)) < 2:
        return None
    rows, inner, columns = whole(a[-2]), whole(a[-1]), whole(b[-1])
    depth = max(len(a), len(b)) - 2
    batch: list[Axis] = []
    own: tuple[list[Axis], list[Axis]] = ([], [])
    for place in range(depth):
        sizes = [shape[len(shape) - 2 - depth + place] if depth - place <= len(shape) - 2 else 1 for shape in (a, b)]
        axis = whole(sizes[0] if sizes[0] != 1 else sizes[1])
        batch.append(axis)
        for shape, size, axes in zip((a, b), sizes, own, strict=True):
            if depth - place <= len(shape) - 2:
                axes.append(() if size == 1 else axis)
    return Product(
        left, right, (*own[0], rows, inner), (*own[1], inner, columns), (*batch, rows, columns), inner, rows, columns
    )


def _einsum(node: Node) -> Product | None:
    """Two operands, every label once in each; dots are labels counted from the right."""
    equation: Any
    operands: Any
    equation, operands = dialect.operands(node)[:2]
    sides = equation.replace(" ", "").split("->")
    if len(operands) != 2 or len(sides) != 2 or sides[0].count(",") != 1:
        return None
    terms = [_labels(t, len(sizes_of(n))) for t, n in zip(sides[0].split(","), operands, strict=True)]
    out = _labels(sides[1], len(sizes_of(node)))
    if any(len(set(term)) != len(term) for term in (*terms, out)):
        return None
    one, two = terms
    if not set(out) <= set(one) | set(two) or any(label not in out for label in set(one) ^ set(two)):
        return None  # a label of one operand alone is summed over before the product
    sizes: dict[str, Any] = {}
    for term, operand in zip(terms, operands, strict=True):
        for label, size in zip(term, sizes_of(operand), strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = size
    axis = {label: whole(size) for label, size in sizes.items()}

    def axes(term: list[str], operand: Node) -> Axes:
        return tuple(() if size == 1 else axis[label] for label, size in zip(term, sizes_of(operand), strict=True))

    return Product(
        operands[0], operands[1], axes(one, operands[0]), axes(two, operands[1]), tuple(axis[label] for label in out),
        contracted=tuple(a for label in one if label not in out for a in axis[label]),
        left_free=tuple(a for label in out if label not in two for a in axis[label]),
        right_free=tuple(a for label in out if label not in one for a in axis[label]),
    )  # fmt: skip


def _labels(term: str, rank: int) -> list[str]:
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{hidden - i}" for i in range(hidden)), *after]
