"""The stable text of a Program, and the fingerprint made from it.

FX's own printer differs between releases; this one does not. Ids count calls, parameters are printed at their operand,
operands equal to the schema's default are left out, symbols are printed by their public dim name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import compat, dialect
from vlexport.ir.program import Program

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b1",
    torch.float8_e4m3fn: "f8e4m3",
}  # fmt: skip


def text(program: Program) -> str:
    """The Program as text: one line an op, ending in a newline."""
    names = program.symbol_names()
    ids: dict[Node, str] = {}
    lines: list[str] = []
    inputs = []
    for node, spec in zip(program.placeholders, program.signature.inputs, strict=True):
        ids[node] = spec.name
        inputs.append(f"{spec.name}: {_type(node.meta['val'], names)}")
    for node in program.graph.nodes:
        if node.op == "get_attr":
            ids[node] = f"@{node.target}: {_type(program.tensors[node.target], names)}"
        elif node.op == "call_function":
            operands = _operands(node, ids, names)
            ids[node] = f"%{len(lines)}"
            lines.append(f"  {ids[node]} = {_short(node)}({operands}) -> {_type(node.meta['val'], names)}")
    dims = "".join(f" {n}={r.min}..{'' if r.max is None else r.max}" for n, r in program.signature.dims.items())
    returned = ", ".join(
        f"{spec.name}: {ids[node]}" for spec, node in zip(program.signature.outputs, program.results, strict=True)
    )
    head = f"program({', '.join(inputs)}){f' where{dims}' if dims else ''}"
    return "\n".join([head, *lines, f"  return {returned}"]) + "\n"


def fingerprint(program: Program) -> str:
    """SHA-256 over the text and the content of every tensor in use.

    The digest of a tensor is kept on the tensor itself with its version counter, never by address.
    """
    whole = hashlib.sha256(text(program).encode())
    for name, tensor in sorted(program.used_tensors().items()):  # not in the order that reading nodes happen to have
        whole.update(f"{name}={tensor_digest(tensor)}\n".encode())
    return whole.hexdigest()


def tensor_digest(tensor: torch.Tensor, *, fresh: bool = False) -> str:
    """SHA-256 of dtype, shape and content; ``fresh`` ignores the digest kept on the tensor."""
    version = 0 if tensor.is_inference() else tensor._version
    kept: tuple[int, str] | None = getattr(tensor, "_vlexport_digest", None)
    if kept is not None and kept[0] == version and not fresh:
        return kept[1]
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    tensor._vlexport_digest = (version, digest.hexdigest())  # type: ignore[attr-defined]
    return digest.hexdigest()


def size_text(size: Any, names: dict[Any, str]) -> str:
    """An integer as it is, a symbolic size with public dim names."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    return str(expression.subs({s: compat.public_symbol(n) for s, n in names.items()})).replace(" ", "")


def _short(node: Node) -> str:
    return dialect.op_name(node).removeprefix("aten.").removesuffix(".default")


def _type(value: Any, names: dict[Any, str]) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{','.join(size_text(s, names) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_type(v, names) for v in value)})"
    if isinstance(value, torch.SymInt):
        return size_text(value, names)
    return type(value).__name__ if value is not None else "none"


def _operands(node: Node, ids: dict[Node, str], names: dict[Any, str]) -> str:
    show: Callable[[Any], str] = lambda value: _operand(value, ids, names)  # noqa: E731
    if not isinstance(node.target, torch._ops.OpOverload):
        return ", ".join([*map(show, node.args), *(f"{k}={show(v)}" for k, v in sorted(node.kwargs.items()))])
    shown = []
    positional = True
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            value = node.args[position]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            positional = False
            continue
        if argument.name in ("device", "pin_memory", "layout") or (
            argument.has_default_value() and _equal(value, argument.default_value)
        ):
            positional = False
            continue
        needs_name = not positional or argument.kwarg_only
        shown.append(f"{argument.name}={show(value)}" if needs_name else show(value))
    return ", ".join(shown)


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, Node) or isinstance(default, Node):
        return False
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(value) == len(default) and all(_equal(v, d) for v, d in zip(value, default, strict=True))
    return type(value) is type(default) and value == default


def _operand(value: Any, ids: dict[Node, str], names: dict[Any, str]) -> str:
    if isinstance(value, Node):
        return ids[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_operand(v, ids, names) for v in value)}]"
    if isinstance(value, torch.SymInt):
        return size_text(value, names)
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    return repr(value)
