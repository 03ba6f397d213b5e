"""What an ONNX file may not do before a runtime opens it: name files outside its folder, or carry compiled code.

The file is walked as protocol buffers are on the wire, without the package onnx (devices do not have it) and without
copying weights. A runtime's own checks of external data differ between releases; an ``EPContext`` node holds, or names,
a blob compiled for one provider (an engine of TensorRT, a binary of OpenVINO), which that provider runs as code.

Source: onnx.proto3 of ONNX 1.20 (field numbers); ONNX Runtime, EPContext design document.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlexport.core.bundle import inside
from vlexport.core.errors import CapabilityError

_MAX_DEPTH = 32
_TAGS = range(1 << 3, 1 << 32)
"""Of a field's number and wire type; ONNX Runtime's parser drops the bits above, so that 2³² + 58 is 58 to it."""
_COMPILED = frozenset({b"EPContext"})

# Message → field → message of the field, or what its bytes are (those of `_BYTES`).
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "op_type", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "external": {1: "key", 2: "value"},
}
_BYTES = frozenset({"op_type", "key", "value"})


def require_contained(folder: Path, path: str) -> None:
    """Refuse an ONNX file that reaches out of its folder or carries compiled code.

    Args:
        folder: Of the artifact.
        path: The file, relative to it.

    Raises:
        BundleError: VLX0605 when its external data leaves the folder or is a link.
        CapabilityError: VLX0505 when it is no ONNX or lacks its external data, VLX0509 when it holds compiled code.
    """
    file = inside(folder, path)
    try:
        with file.open("rb") as stream:
            if not stat.S_ISREG(file.stat().st_mode) or not file.stat().st_size:
                raise ValueError("it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                locations = set(_locations(data, "model", 0, len(data), 0))
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise CapabilityError("VLX0505", f"{path} is no ONNX model: {said}", where=path,
                              hint="see `vlexport verify` for whether the file is intact") from error  # fmt: skip
    for location in locations:
        _require_data(folder, path, location)


def _require_data(folder: Path, path: str, location: bytes) -> None:
    name = location.decode("utf-8", "backslashreplace")
    beside = (PurePosixPath(path).parent / name).as_posix() if name else ""
    if not inside(folder, beside).is_file():
        raise CapabilityError(
            "VLX0505", f"{path} keeps weights in {name!r}, which is no file beside it", where=path,
            hint="see `vlexport verify` for whether the bundle is whole",
        )  # fmt: skip


def _locations(data: mmap.mmap, kind: str, start: int, stop: int, depth: int) -> Iterator[bytes]:
    """Names of files that tensors lie in.

    Raises:
        ValueError: Not a message of this kind.
        CapabilityError: VLX0509.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"its graphs are nested deeper than {_MAX_DEPTH} messages")
    known, key, value = _FIELDS[kind], b"", b""
    for number, begin, end in _parts(data, start, stop):
        inner = known.get(number)
        if inner is None:
            continue
        if inner not in _BYTES:
            yield from _locations(data, inner, begin, end, depth + 1)
            continue
        found = data[begin:end]
        if inner == "op_type" and found in _COMPILED:
            raise CapabilityError(
                "VLX0509", f"the artifact holds a node {found.decode()}, which is code compiled elsewhere",
                where=found.decode(), hint="do not use this bundle; build it here from the model",
            )  # fmt: skip
        key, value = (found, value) if inner == "key" else (key, found) if inner == "value" else (key, value)
    if kind == "external" and key == b"location":
        yield value


def _parts(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of every field of a message that has a length; the others are skipped."""
    at = start
    while at < stop:
        tag, at = _varint(data, at, stop)
        if tag not in _TAGS:
            raise ValueError("a field has an impossible number")
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(data, at, stop)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(data, at, stop)
            if length > stop - at:
                raise ValueError("a field is longer than the message it lies in")
            yield number, at, at + length
            at += length
        else:
            raise ValueError(f"a field has the unknown wire type {wire}")
        if at > stop:
            raise ValueError("it is truncated")


def _varint(data: Any, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("it is truncated")
