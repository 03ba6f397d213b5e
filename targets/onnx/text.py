"""The stable text of an ONNX graph: one line a node, ids by position, weights by name at their operand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir

_SHORT_DIGEST = 16


def text(model: onnx_ir.Model) -> str:
    """A model as text, ending in a newline. Weights are named, not printed; constants inside nodes by digest."""
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"onnx({', '.join(f'{v.name}: {_type(v)}' for v in model.graph.inputs)}) of {opsets}"]
    lines += _lines(model.graph, {}, "  ")
    for function in sorted(model.functions.values(), key=lambda f: str(f.identifier())):
        lines.append(
            f"function {'::'.join(map(str, function.identifier()))}({', '.join(map(str, function.attributes))})"
        )
        lines += _lines(function.graph, {}, "  ")
    return "\n".join(lines) + "\n"


def tensor_digest(tensor: onnx_ir.TensorProtocol) -> str:
    """SHA-256 of dtype, shape and content."""
    digest = hashlib.sha256(f"{tensor.dtype.name}{tensor.shape}".encode())
    values = tensor.numpy()
    if tensor.dtype is onnx_ir.DataType.STRING:
        digest.update(repr(values.tolist()).encode())
    else:
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _lines(graph: onnx_ir.Graph, outer: Mapping[onnx_ir.Value, str], indent: str) -> Iterator[str]:
    ids = {**outer, **{value: str(value.name) for value in graph.inputs}}
    ids.update({value: f"@{value.name}: {_type(value)}" for value in graph.initializers.values()})
    count = 0
    for node in graph:
        operands = ", ".join("_" if value is None else ids.get(value, f"?{value.name}") for value in node.inputs)
        attributes = "".join(
            f" {name}={_attribute(attribute, ids, indent)}" for name, attribute in sorted(node.attributes.items())
        )
        made = []
        for value in node.outputs:
            ids[value] = f"%{count}"
            made.append(f"%{count}")
            count += 1
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        types = ", ".join(map(_type, node.outputs))
        yield f"{indent}{', '.join(made)} = {name}({operands}){attributes} -> {types}"
    yield f"{indent}return {', '.join(f'{value.name}: {ids.get(value, value.name)}' for value in graph.outputs)}"


def _type(value: onnx_ir.Value) -> str:
    dtype = value.dtype.short_name() if value.dtype is not None else "?"
    if value.shape is None:
        return dtype
    dims = (str(d) if isinstance(d, int) else str(d.value or "?") for d in value.shape)
    return f"{dtype}[{','.join(dims)}]"


def _attribute(attribute: onnx_ir.Attr, ids: Mapping[onnx_ir.Value, str], indent: str) -> str:
    if attribute.is_ref():
        return f"${attribute.ref_attr_name}"
    if attribute.type is onnx_ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype.short_name()}{list(tensor.shape)}#{tensor_digest(tensor)[:_SHORT_DIGEST]}"
    if attribute.type is onnx_ir.AttributeType.GRAPH:
        inner = "\n".join(_lines(attribute.as_graph(), ids, indent + "  "))
        return f"{{\n{inner}\n{indent}}}"
    if isinstance(attribute.value, (tuple, list)):
        return f"[{','.join(map(repr, attribute.value))}]"
    return repr(attribute.value)
