"""``.npz`` files of strangers: what a member claims is compared with what it holds before memory is taken for it.

``numpy.load`` allocates whatever shape a header names, and unpacks whatever a zip's directory allows.
"""

from __future__ import annotations

import ast
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlexport.core.artifact import Array

MAX_RATIO = 100
FREE_BYTES = 1 << 30
"""Unpacked, a file may hold this much, or :data:`MAX_RATIO` times its size on disk: zeros pack by 1000."""
_MAX_HEADER_BYTES = 10_000
_MAX_DIMS = 32
_CHUNK = 1 << 24
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_KINDS = "biufcUS"
_KEYS = {"descr", "fortran_order", "shape"}
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
)


def read_npz(file: Path | str, names: Collection[str]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Some arrays of an ``.npz``: booleans, numbers and texts.

    Args:
        file: What ``numpy.savez`` or ``numpy.savez_compressed`` wrote.
        names: Arrays that are read where they exist; others are never unpacked.

    Returns:
        Name → array, and the names of all arrays in the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no ``.npz``, is damaged, holds Python objects, names an array twice, or unpacks to more than
            its size allows.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            by_name = {info.filename.removesuffix(".npy"): info for info in infos}
            if len(by_name) != len(infos):
                raise ValueError("an array is there twice")
            chosen = {name: by_name[name] for name in names if name in by_name}
            total = sum(info.file_size for info in chosen.values())
            if total > max(FREE_BYTES, MAX_RATIO * os.path.getsize(file)):
                raise ValueError(f"it unpacks to {total} bytes, far more than it holds")
            return {name: _array(archive, info) for name, info in chosen.items()}, tuple(by_name)
    except _DAMAGE as error:
        raise ValueError(f"damaged: {str(error) or type(error).__name__}") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    if info.compress_type not in _METHODS:
        raise ValueError(f"{info.filename} is packed in a way that numpy never does")
    with archive.open(info) as stream:
        dtype, shape, fortran, header_bytes = _header(stream)
        size = math.prod(shape) * dtype.itemsize
        if not dtype.itemsize or header_bytes + size != info.file_size:
            raise ValueError(f"{info.filename} claims {size} bytes and holds {info.file_size - header_bytes}")
        raw = np.empty(size, np.uint8)
        view, done = raw.data, 0
        while done < size:
            part = stream.read(min(_CHUNK, size - done))
            if not part:
                raise EOFError("a member is shorter than it says")
            view[done : done + len(part)] = part
            done += len(part)
        stream.read(1)  # the end is where the checksum is compared
    found: Array = raw.view(dtype).reshape(shape, order="F" if fortran else "C")
    return found


def _header(stream: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, whether columns come first, and the bytes before the content."""
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise ValueError("a member is no array of numpy")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"an array's header has {length} bytes")
    text = stream.read(length).decode("utf-8" if magic[6] == 3 else "latin-1")
    values = ast.literal_eval(text.strip())
    if not isinstance(values, dict) or set(values) != _KEYS:
        raise ValueError("an array's header is none")
    descr, shape, fortran = values["descr"], values["shape"], values["fortran_order"]
    dtype = np.dtype(descr) if isinstance(descr, str) else None
    if dtype is None or dtype.kind not in _KINDS or dtype.subdtype is not None:
        raise ValueError("an array holds neither numbers nor texts")
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array's shape is none")
    if type(fortran) is not bool:
        raise ValueError("an array's order is none")
    return dtype, shape, fortran, len(magic) + width + length
