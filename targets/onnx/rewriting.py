"""rewriting: put one operator in the place of several, and take out what nobody reads any more.

An operator that quantizes on its own says in its metadata how many quantize and dequantize nodes it stands for, so that
their number stays what it was: what loses a rounding on the way is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir

from vlexport.targets.onnx.model import STANDS_FOR, OnnxModel, inherit

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
Attributes = Mapping[str, int | float | list[int]]
"""Of a new node."""


def stored(model: OnnxModel, name: str, values: npt.NDArray[np.generic]) -> onnx_ir.Value:
    """A new initializer; a name that is taken gets a number."""
    known, free, number = model.model.graph.initializers, name, 1
    while free in known:
        free, number = f"{name}_{number}", number + 1
    tensor = onnx_ir.tensor(np.asarray(values, order="C"), name=free)
    made = onnx_ir.Value(name=free, const_value=tensor)
    made.shape, made.dtype = onnx_ir.Shape(values.shape), tensor.dtype
    model.model.graph.register_initializer(made)
    return made


def put(
    model: OnnxModel, old: onnx_ir.Value, kind: str, operands: Sequence[onnx_ir.Value | None], *,
    domain: str = "", attributes: Attributes | None = None, origin: onnx_ir.Node, rows: bool = False,
) -> onnx_ir.Node:  # fmt: skip
    """Let a new node make ``old``.

    Args:
        model: Changed in place.
        old: The value; what makes it now goes where nobody else reads it.
        kind: Operator.
        operands: Its inputs.
        domain: Of the operator.
        attributes: Its attributes.
        origin: The node whose module it belongs to.
        rows: The new node makes more dims, which become the rows of ``old``.
    """
    last = old.producer()
    assert last is not None
    new = insert(model, last, kind, operands, domain=domain, attributes=attributes, origin=origin)
    take_place(model, old, new, origin=origin, rows=rows)
    return new


def take_place(
    model: OnnxModel, old: onnx_ir.Value, new: onnx_ir.Node, *, origin: onnx_ir.Node, rows: bool = False
) -> None:
    """Let a node that is there make ``old``.

    Args:
        model: Changed in place.
        old: The value; what makes it now goes where nobody else reads it.
        new: In front of what makes it now.
        origin: The node whose module it belongs to.
        rows: The new node makes more dims, which become the rows of ``old``.
    """
    graph, last, quantizing = model.model.graph, old.producer(), model.quantizing
    assert last is not None
    name, result = new.name, new.outputs[0]
    result.type = old.type
    if rows:
        width = old.shape[-1] if old.shape is not None else None
        assert isinstance(width, int)
        result.name = f"{name}_value"
        shape = stored(model, f"{name}_rows", np.array([-1, width], np.int64))
        flat = onnx_ir.Node("", "Reshape", [result, shape], name=f"{name}_reshape", num_outputs=1)
        inherit(flat, origin)
        graph.insert_before(last, flat)
        result = flat.outputs[0]
    text, result.shape, result.type = str(old.name), old.shape, old.type
    old.name = f"{text}_before"
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name = text
    drop_unread(model, last)
    if lost := quantizing - model.quantizing:
        new.metadata_props[STANDS_FOR] = str(lost)


def insert(
    model: OnnxModel, before: onnx_ir.Node, kind: str, operands: Sequence[onnx_ir.Value | None], *,
    domain: str = "", attributes: Attributes | None = None, origin: onnx_ir.Node, name: str = "",
) -> onnx_ir.Node:  # fmt: skip
    """A new node in front of another, whose value has neither type nor shape yet.

    Args:
        model: Changed in place.
        before: The node behind it.
        kind: Operator.
        operands: Its inputs.
        domain: Of the operator.
        attributes: Its attributes.
        origin: The node whose module it belongs to.
        name: Of the node and, with ``_value``, of what it makes; by default after ``origin``.
    """
    if domain:
        model.model.opset_imports.setdefault(domain, 1)
    made = [onnx_ir.Attr(k, _kind(v), v) for k, v in (attributes or {}).items()]
    new = onnx_ir.Node(domain, kind, list(operands), made, name=name or f"{origin.name}_{kind.lower()}", num_outputs=1)
    new.outputs[0].name = f"{new.name}_value"
    inherit(new, origin)
    model.model.graph.insert_before(before, new)
    return new


def domains(model: OnnxModel) -> dict[str, str]:
    """The domains of a model that holds operators of ONNX Runtime's own, as a fact of the artifact; else nothing."""
    counts = Counter(node.op_type for node in model.nodes() if node.domain == CONTRIB)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return {"domains": f"ai.onnx, {CONTRIB} ({said})"} if said else {}


def drop_unread(model: OnnxModel, last: onnx_ir.Node) -> None:
    """Remove a node that nobody reads, and what is not read then; stored tensors, too."""
    graph, waiting = model.model.graph, [last]
    while waiting:
        node = waiting.pop()
        if node.graph is not graph or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        operands = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        waiting += [maker for value in operands if (maker := value.producer()) is not None]
        for value in operands:
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                graph.initializers.pop(str(value.name), None)


def _kind(value: float | list[int]) -> onnx_ir.AttributeType:
    if isinstance(value, list):
        return onnx_ir.AttributeType.INTS
    return onnx_ir.AttributeType.INT if isinstance(value, int) else onnx_ir.AttributeType.FLOAT
