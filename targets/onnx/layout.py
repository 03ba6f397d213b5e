"""layout: which element of one value every element of another is, where only operators that move values lie between.

Nothing is matched by its spelling: the root's elements are numbered, and the numbers are taken through the operators
that lie between (reshape, transpose, slice, split, gather of constants, and the arithmetic on shapes that feeds them).
Two graphs that move values to the same places give the same numbers. Every dim without a size gets one that no other
has, so what holds for these sizes holds by the same arithmetic for others. A product with a stored scalar moves
nothing; it is let through, and :func:`moved` tells the factor.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

Numbers = npt.NDArray[np.int64]
MOVING = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Gather", "Identity", "Flatten")
"""Operators that move values and change none."""
LIMIT = 1 << 25
"""Elements that are followed: their numbers take 256 MiB, a few times."""
_SIZES = (2, 3, 5, 7, 11, 13)
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


class Untraceable(Exception):  # noqa: N818  it ends a walk, and is no error
    """A value is not the root's elements moved about; its text says what stands between."""


@dataclass(frozen=True)
class Origin:
    """Where a value comes from when moving and scaling are undone.

    Attributes:
        root: What it is moved from.
        factor: Product of the stored scalars on the way.
        between: Nodes on the way, the nearest to the value first.
    """

    root: onnx_ir.Value
    factor: float
    between: tuple[onnx_ir.Node, ...]


def origin(value: onnx_ir.Value) -> Origin:
    """Walk up from a value through operators that move values, and products with a stored scalar."""
    factor, between = 1.0, []
    while (node := value.producer()) is not None:
        scaled = _scaling(node)
        above = scaled[0] if scaled is not None else node.inputs[0] if node.op_type in MOVING else None
        if above is None or node.domain not in ("", "ai.onnx"):
            break
        factor *= scaled[1] if scaled is not None else 1.0
        between.append(node)
        value = above
    return Origin(value, factor, tuple(between))


@dataclass
class Sizes:
    """Sizes that stand for dims without one: each name has its own."""

    named: dict[str, int] = field(default_factory=dict)

    def of(self, value: onnx_ir.Value) -> tuple[int, ...]:
        """The shape of a value.

        Raises:
            Untraceable: Where a dim has neither size nor name.
        """
        if value.shape is None:
            raise Untraceable(f"nothing is known of the shape of {value.name}")
        return tuple(dim if isinstance(dim, int) else self._computed(str(dim.value)) for dim in value.shape)

    def _computed(self, text: str) -> int:
        try:
            return self._size(ast.parse(text, mode="eval").body)
        except SyntaxError as error:
            raise Untraceable(f"a dim is called {text}") from error

    def _size(self, found: ast.expr) -> int:
        if isinstance(found, ast.Constant) and isinstance(found.value, int):
            return found.value
        if isinstance(found, ast.Name) and found.id != "None":
            return self.named.setdefault(found.id, _SIZES[min(len(self.named), len(_SIZES) - 1)])
        if isinstance(found, ast.BinOp) and type(found.op) in _ARITHMETIC:
            return _ARITHMETIC[type(found.op)](self._size(found.left), self._size(found.right))
        raise Untraceable(f"a dim is called {ast.unparse(found)}")


def numbered(value: onnx_ir.Value, sizes: Sizes) -> Numbers:
    """A root's own numbers, in its shape."""
    shape = sizes.of(value)
    count = math.prod(shape)
    if count > LIMIT:
        raise Untraceable(f"{value.name} has {count} elements, more than are followed")
    return np.arange(count, dtype=np.int64).reshape(shape)


def moved(value: onnx_ir.Value, root: onnx_ir.Value, sizes: Sizes, *, numbers: Numbers | None = None) -> Numbers:
    """The root's numbers where ``value`` has them.

    Args:
        value: Moved from the root.
        root: The root.
        sizes: Of dims without one.
        numbers: The root's own, where its shape is known better than the graph tells.

    Raises:
        Untraceable: Where something else stands between the two.
    """
    return _Walk({root: numbered(root, sizes) if numbers is None else numbers}, sizes).numbers(value)


@dataclass
class _Walk:
    known: dict[onnx_ir.Value, Numbers]
    sizes: Sizes

    def numbers(self, value: onnx_ir.Value | None) -> Numbers:
        if value is None:
            raise Untraceable("an operand is left out")
        if value not in self.known:
            self.known[value] = self._found(value)
        return self.known[value]

    def _found(self, value: onnx_ir.Value) -> Numbers:
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        node = value.producer()
        if node is None:
            raise Untraceable(f"{value.name} is no part of it")
        if node.op_type == "Shape":
            return self._shape(node)
        scaled = _scaling(node)
        if scaled is not None:
            return self.numbers(scaled[0])
        make = _OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if make is None:
            raise Untraceable(f"{node.op_type} stands in between")
        if node.op_type in _ON_SHAPES and value.dtype not in _WHOLE:
            raise Untraceable(f"{node.op_type} changes values in between")
        inputs = [None if each is None else self.numbers(each) for each in node.inputs]
        try:
            made = make(node, inputs)
        except (ValueError, IndexError) as error:  # shapes that do not fit: sizes were given that cannot be
            raise Untraceable(f"{node.op_type} does not take the sizes that stand for {value.name}") from error
        for output, each in zip(node.outputs, made, strict=True):
            self.known[output] = each
        return self.known[value]

    def _shape(self, node: onnx_ir.Node) -> Numbers:
        read = node.inputs[0]
        assert read is not None
        try:
            shape = self.numbers(read).shape
        except Untraceable:
            shape = self.sizes.of(read)
        start, end = _int(node, "start", 0), _int(node, "end", len(shape))
        return np.array(shape[start:end], np.int64)


def _scaling(node: onnx_ir.Node) -> tuple[onnx_ir.Value, float] | None:
    """The float operand of a product with, or a quotient by, one stored number; and the factor."""
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for own, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        stored = other.const_value if other is not None else None
        if own is None or stored is None or stored.size != 1 or stored.dtype not in _FLOATS or len(stored.shape) > 1:
            continue
        number = float(stored.numpy().reshape(-1)[0])
        if node.op_type == "Mul":
            return own, number
        return (own, 1.0 / number) if other is node.inputs[1] and number else None
    return None


_ON_SHAPES = ("Cast", "Mul", "Add", "Sub")
"""Let through where they compute a shape."""
_WHOLE = (onnx_ir.DataType.INT64, onnx_ir.DataType.INT32)
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE)


def _int(node: onnx_ir.Node, name: str, otherwise: int) -> int:
    found = node.attributes.get(name)
    return otherwise if found is None else found.as_int()


def _ints(node: onnx_ir.Node, name: str) -> list[int] | None:
    found = node.attributes.get(name)
    return None if found is None else list(found.as_ints())


def _reshape(node: onnx_ir.Node, inputs: list[Any]) -> list[Numbers]:
    given, wanted = inputs[0], inputs[1].tolist()
    if not _int(node, "allowzero", 0):
        wanted = [given.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return [given.reshape(wanted)]


def _slice(node: onnx_ir.Node, inputs: list[Any]) -> list[Numbers]:
    given, starts, ends = inputs[:3]
    axes = inputs[3].tolist() if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = inputs[4].tolist() if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise Untraceable("a slice runs backwards")
    cut = [slice(None)] * given.ndim
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps, strict=True):
        cut[axis] = slice(start, end, step)
    return [given[tuple(cut)]]


def _squeeze(node: onnx_ir.Node, inputs: list[Any]) -> list[Numbers]:
    axes = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else None
    return [inputs[0].squeeze(tuple(axes) if axes is not None else None)]


def _unsqueeze(node: onnx_ir.Node, inputs: list[Any]) -> list[Numbers]:
    return [np.expand_dims(inputs[0], tuple(inputs[1].tolist()))]


def _split(node: onnx_ir.Node, inputs: list[Any]) -> list[Numbers]:
    axis, count = _int(node, "axis", 0), len(node.outputs)
    if len(inputs) > 1 and inputs[1] is not None:
        return list(np.split(inputs[0], np.cumsum(inputs[1])[:-1], axis))
    size = -(-inputs[0].shape[axis] // count)
    return list(np.split(inputs[0], [size * i for i in range(1, count)], axis))


def _flatten(node: onnx_ir.Node, inputs: list[Any]) -> list[Numbers]:
    axis = _int(node, "axis", 1)
    rows = int(np.prod(inputs[0].shape[:axis], dtype=np.int64))
    return [inputs[0].reshape(rows, -1)]


_OPERATORS: dict[str, Callable[[onnx_ir.Node, list[Any]], list[Numbers]]] = {
    "Reshape": _reshape,
    "Transpose": lambda node, inputs: [inputs[0].transpose(_ints(node, "perm"))],
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Split": _split,
    "Flatten": _flatten,
    "Gather": lambda node, inputs: [np.take(inputs[0], inputs[1], axis=_int(node, "axis", 0))],
    "Identity": lambda node, inputs: [inputs[0]],
    "Concat": lambda node, inputs: [np.concatenate(inputs, _int(node, "axis", 0))],
    "Cast": lambda node, inputs: [inputs[0]],
    "Mul": lambda node, inputs: [inputs[0] * inputs[1]],
    "Add": lambda node, inputs: [inputs[0] + inputs[1]],
    "Sub": lambda node, inputs: [inputs[0] - inputs[1]],
}
