"""plain_product: one matrix product as an ONNX file, whose speed is the most that a graph's linears can reach.

Written byte by byte in protobuf's wire format, because the device half of the package has no ``onnx``.
Source: onnx/onnx.proto for the numbers of the fields.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlexport.core.artifact import Artifact, TensorSpec
from vlexport.targets.base import PlainProduct, ProductKind

ROWS, INNER, COLUMNS = 256, 768, 768
"""Of the product: those of a linear of a small vision transformer."""

_ELEMENT = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}
_IR_VERSION, _OPSET = 8, 17
_BYTES, _VARINT = 2, 0


def plain_product(folder: Path, kind: ProductKind, like: Artifact) -> PlainProduct:
    """Write the product of an input ``x`` and a stored weight, seeded; the weight is packed when the file is opened.

    ``fp32``: ``y: f32[256,768] = MatMul(x: f32[256,768], w: f32[768,768])``. ``int8``: ``y: i32`` of
    ``MatMulInteger(x: u8, w: s8)``, as ONNX Runtime's linears in integers compute.

    Args:
        folder: Where.
        kind: What it computes in.
        like: Its session options are taken.
    """
    drawn, name = np.random.default_rng(0), f"product_{kind}.onnx"
    if kind == "fp32":
        weight: npt.NDArray[np.generic] = drawn.standard_normal((INNER, COLUMNS)).astype(np.float32)
        operator, read, made = "MatMul", "float32", "float32"
    else:
        weight = drawn.integers(-63, 64, (INNER, COLUMNS)).astype(np.int8)
        operator, read, made = "MatMulInteger", "uint8", "int32"
    node = _text(1, "x") + _text(1, "w") + _text(2, "y") + _text(3, "product") + _text(4, operator)
    tensor = b"".join(_number(1, size) for size in weight.shape) + _number(2, _ELEMENT[weight.dtype.name])
    tensor += _text(8, "w") + _field(9, weight.tobytes())
    x = TensorSpec(name="x", dtype=read, shape=(ROWS, INNER))
    y = TensorSpec(name="y", dtype=made, shape=(ROWS, COLUMNS))
    graph = _field(1, node) + _text(2, "main") + _field(5, tensor) + _field(11, _value(x)) + _field(12, _value(y))
    model = _number(1, _IR_VERSION) + _field(7, graph) + _field(8, _text(1, "") + _number(2, _OPSET))
    (folder / name).write_bytes(model)
    artifact = Artifact(target=like.target, path=name, inputs=(x,), outputs=(y,), session_options=like.session_options)
    return PlainProduct(kind, artifact, ROWS * INNER * COLUMNS)


def _value(spec: TensorSpec) -> bytes:
    dims = b"".join(_field(1, _number(1, int(size))) for size in spec.shape)
    return _text(1, spec.name) + _field(2, _field(1, _number(1, _ELEMENT[spec.dtype]) + _field(2, dims)))


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode())


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
