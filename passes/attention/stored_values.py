"""What a value is, where it follows from stored tensors alone, although its shape may depend on the input.

A mask that is repeated over the batch is the same for every sample: it is computed here for one. Along a dim whose size
the input decides a known value never changes; that dim has size 1 in what is returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

MAX_ELEMENTS = 1 << 22
"""Elements of a value beyond which it is not computed."""
_MAX_DEPTH = 200
_ALONG = ("aten.cumsum.default", "aten.diff.default", "aten.flip.default")


class _Counted:
    """A value that may differ along a dim of unknown size, but for its use as an index into what does not."""


_COUNTED = _Counted()
Known = Tensor | _Counted | None


def _open_dims(node: Node) -> tuple[int, ...]:
    return tuple(i for i, size in enumerate(node.meta["val"].shape) if isinstance(size, torch.SymInt))


def _fixed_elements(node: Node) -> int:
    count = 1
    for size in node.meta["val"].shape:
        count *= 1 if isinstance(size, torch.SymInt) else int(size)
    return count


class StoredValues:
    """What is known of the values of a Program, each computed once. Good for as long as the Program is not changed."""

    def __init__(self, ir: Program) -> None:
        self.ir = ir
        self.known: dict[Node, Known] = {}

    def of(self, node: Node) -> Tensor | None:
        """The value of a node that depends on stored tensors alone; size 1 along dims of unknown size."""
        known = self._of(node, 0)
        return known if isinstance(known, Tensor) else None

    def _of(self, node: Node, depth: int) -> Known:
        if node not in self.known:
            self.known[node] = self._compute(node, depth) if depth < _MAX_DEPTH else None
        return self.known[node]

    def _compute(self, node: Node, depth: int) -> Known:
        stored = self.ir.tensor_of(node)
        if stored is not None:
            return stored if stored.numel() <= MAX_ELEMENTS else None
        row = dialect.info(node)
        name = dialect.op_name(node)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or dialect.is_random(node):
            return None
        if _fixed_elements(node) > MAX_ELEMENTS:
            return None
        if name == "aten.arange.default" and _open_dims(node):
            return _COUNTED
        operands = dialect.operands(node)
        tensors = [a for a in _flat(operands) if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]
        values: dict[Node, Known] = {}
        for each in tensors:
            values[each] = self._of(each, depth + 1)
            if values[each] is None:
                return None
        if any(isinstance(value, _Counted) for value in values.values()):
            return self._counted(node, name, operands, values)
        rule = _RULES.get(name)
        if rule is None and row is not None and row.category == "elementwise":
            rule = _elementwise
        if rule is None and not any(map(_open_dims, (node, *tensors))) and row is not None and row.category != "quant":
            rule = _as_it_is
        made = rule(node, operands, values) if rule is not None else None
        return made if made is None or _fits(made, node) else None

    def _counted(self, node: Node, name: str, operands: tuple[Any, ...], values: dict[Node, Known]) -> Known:
        if name in ("aten.slice.Tensor", "aten.unsqueeze.default"):
            return _COUNTED
        if name != "aten.index.Tensor":
            return None
        source = values.get(operands[0])
        if not isinstance(source, Tensor):
            return None
        indices = []
        for dim, index in enumerate(operands[1]):
            value = values.get(index) if index is not None else None
            if isinstance(value, _Counted):
                if dim not in _open_dims(operands[0]):
                    return None
                value = torch.zeros([1] * index.meta["val"].ndim, dtype=torch.long)
            elif index is not None and dim in _open_dims(operands[0]):
                return None
            indices.append(value)
        made = torch.ops.aten.index.Tensor(source, indices)
        return made if _fits(made, node) else None


def _flat(operands: Any) -> list[Any]:
    return [b for a in operands for b in (_flat(a) if isinstance(a, (list, tuple)) else [a])]


def _fits(made: Any, node: Node) -> bool:
    """Whether a computed value has the recorded shape, with 1 for every size that the input decides."""
    wanted = tuple(1 if isinstance(s, torch.SymInt) else int(s) for s in node.meta["val"].shape)
    return isinstance(made, Tensor) and tuple(made.shape) == wanted and made.dtype == node.meta["val"].dtype


def _given(operands: Any, values: dict[Node, Known]) -> Any:
    if isinstance(operands, (list, tuple)):
        return [_given(a, values) for a in operands]
    return values.get(operands, operands) if isinstance(operands, Node) else operands


def _as_it_is(node: Node, operands: tuple[Any, ...], values: dict[Node, Known]) -> Any:
    given = _given(operands, values)
    if any(isinstance(a, Node) for a in _flat(given)):
        return None
    with torch.no_grad():
        return _called(node, given)


def _called(node: Node, given: list[Any]) -> Any:
    target: Any = node.target
    names = [a.name for a in target._schema.arguments]
    keywords = {a.name for a in target._schema.arguments if a.kwarg_only}
    positional = [value for name, value in zip(names, given, strict=True) if name not in keywords]
    return target(*positional, **{n: v for n, v in zip(names, given, strict=True) if n in keywords})


def _elementwise(node: Node, operands: tuple[Any, ...], values: dict[Node, Known]) -> Any:
    """A dim of unknown size is one in every operand that has it, and 1 in what is known of them: they broadcast."""
    return _as_it_is(node, operands, values)


def _expand(node: Node, operands: tuple[Any, ...], values: dict[Node, Known]) -> Any:
    source: Any = values[operands[0]]
    sizes = [1 if isinstance(s, torch.SymInt) else int(s) for s in node.meta["val"].shape]
    hidden = len(sizes) - source.ndim
    if any(size == 1 and source.shape[i - hidden] != 1 for i, size in enumerate(sizes) if i >= hidden):
        return None
    return source.expand(sizes)


def _repeat(node: Node, operands: tuple[Any, ...], values: dict[Node, Known]) -> Any:
    """Repeated so often as the input decides: only where one value is repeated."""
    source: Any = values[operands[0]]
    times = list(operands[1])
    hidden = len(times) - source.ndim
    for dim, count in enumerate(times):
        if not isinstance(count, int):
            if dim >= hidden and source.shape[dim - hidden] != 1:
                return None
            times[dim] = 1
    return source.repeat(times)


def _along(node: Node, operands: tuple[Any, ...], values: dict[Node, Known]) -> Any:
    """Along one dim, which must not be one of unknown size."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dim = operands[names.index("dim")] if "dim" in names else None
    if not isinstance(dim, int) or dim % node.meta["val"].ndim in _open_dims(node):
        return None
    return _as_it_is(node, operands, values)


def _kept_open(node: Node, operands: tuple[Any, ...], values: dict[Node, Known]) -> Any:
    """Slices: whole along a dim of unknown size."""
    _, dim, start, end, step = operands
    whole = start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end > 1 << 40))
    if dim % node.meta["val"].ndim in _open_dims(node.all_input_nodes[0]) and not whole:
        return None
    return _as_it_is(node, operands, values)


_RULES: dict[str, Callable[[Node, tuple[Any, ...], dict[Node, Known]], Any]] = {
    "aten.expand.default": _expand,
    "aten.repeat.default": _repeat,
    "aten.unsqueeze.default": _as_it_is,
    "aten.permute.default": _as_it_is,
    "aten.slice.Tensor": _kept_open,
    "aten.cumsum.default": _along,
    "aten.diff.default": _along,
}
