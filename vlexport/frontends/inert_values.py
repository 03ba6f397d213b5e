"""What survives of a pickle that nobody trusts, and how the harmless part of what it asks for is made by our own code.

A pickle names functions and asks for their results. Here a name is text: :data:`BUILDERS` holds the few that tensors,
containers and numbers are written with, each made again from checked arguments; every other name becomes a
:class:`Stub`, which does nothing whatever is done to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_RANK = 64
MAX_ELEMENTS = 2**40
MAX_KEY_ITEMS = 64
MAX_KEY_INTEGER = 2**63


class InertError(ValueError):
    """The pickle is damaged, or larger than any honest one."""


@dataclass(frozen=True, eq=False)
class Stub:
    """Stands for a class, a function or an object that was not made.

    Attributes:
        name: Dotted name that the pickle asked for.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes elsewhere in the file.

    Attributes:
        key: Its name in the file.
        dtype: Element type; None for bytes without a type.
        size_bytes: How many bytes the file says it has.
    """

    key: str
    dtype: torch.dtype | None
    size_bytes: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose elements were not read yet; sizes, strides and offset lie inside the storage."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class StoredArray:
    """A numpy array of numbers; None until its content was given."""

    array: np.ndarray[Any, Any] | None = None


@dataclass(eq=False)
class NumpyType:
    """A numpy type of numbers: its code (``f4``) and its byte order."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype[Any]:
        """As numpy knows it."""
        return np.dtype(self.order + self.code)


DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "double", "float32", "float", "float16", "half", "bfloat16", "complex64", "complex128"),
        *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
"""Names of plain element types; those of quantized ones are not among them."""

STORAGE_TYPES: dict[str, torch.dtype | None] = {
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in {
            "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
            "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
            "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
        }.items()
    },
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}  # fmt: skip

_TENSOR_TYPES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_NUMPY_CODE = re.compile(r"b1|[iu][1248]|f[248]|c(?:8|16)")
_QUANTIZED = ("torch._utils._rebuild_qtensor", "torch.ao.", "torchao.", "bitsandbytes.", "optimum.quanto.")


def is_quantized_name(name: str) -> bool:
    """Whether what a pickle asked for is a quantized tensor, of torch or of a package for them."""
    return name.startswith(_QUANTIZED)


def require_key(value: object, depth: int = 2) -> None:
    """Refuse what cannot be a key, or would be slow to hash: deep tuples are hashed by recursion.

    Raises:
        InertError: With what it is.
    """
    if isinstance(value, tuple) and depth and len(value) <= MAX_KEY_ITEMS:
        for each in value:
            require_key(each, depth - 1)
    elif isinstance(value, int) and abs(value) >= MAX_KEY_INTEGER:
        raise InertError("a key is a number of more than 64 bits")
    elif not isinstance(value, str | bytes | int | float | Stub | torch.dtype | None):
        raise InertError(f"a key is a {type(value).__name__}")


def _ordered_dict(args: tuple[Any, ...]) -> Any:
    pairs = args[0] if args else []
    if not isinstance(pairs, list | dict):
        return NotImplemented
    made: dict[Any, Any] = {}
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            return NotImplemented
        require_key(pair[0])
        made[pair[0]] = pair[1]
    return made


def _set(args: tuple[Any, ...]) -> Any:
    items = args[0] if args else []
    if not isinstance(items, list | tuple | set | frozenset):
        return NotImplemented
    for each in items:
        require_key(each)
    return set(items)


def _encoded(args: tuple[Any, ...]) -> Any:
    """Protocols before 3 write bytes as text with its encoding."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        return NotImplemented
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        return NotImplemented


def _no_bytes(args: tuple[Any, ...]) -> Any:
    """Protocols before 3 have no spelling of empty bytes but a call without arguments."""
    return NotImplemented if args else b""


def _size(args: tuple[Any, ...]) -> Any:
    return args[0] if len(args) == 1 and _naturals(args[0]) is not None else NotImplemented


def _device(args: tuple[Any, ...]) -> Any:
    return args[0] if args and isinstance(args[0], str) else NotImplemented


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, tuple | list) or len(value) > MAX_RANK:
        return None
    return tuple(value) if all(type(each) is int and 0 <= each <= MAX_ELEMENTS for each in value) else None


def _tensor(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> Any:
    """``(storage, offset, size, stride, …)``, as ``torch.save`` writes a tensor.

    Raises:
        InertError: The tensor reaches beyond its storage.
    """
    if len(args) < 4 or not isinstance(args[0], Storage):
        return NotImplemented
    storage, found = args[0], dtype or args[0].dtype
    offset, shape, stride = _naturals([args[1]]), _naturals(args[2]), _naturals(args[3])
    if found is None or offset is None or shape is None or stride is None:
        return NotImplemented
    if len(shape) != len(stride) or math.prod(shape) > MAX_ELEMENTS:
        raise InertError("a tensor's sizes and strides do not fit together")
    reach = offset[0] + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and reach * found.itemsize > storage.size_bytes:
        raise InertError("a tensor reaches beyond the bytes that the file has for it")
    return StoredTensor(storage, found, shape, stride, offset[0])


def _typed_tensor(args: tuple[Any, ...]) -> Any:
    """``(storage, offset, size, stride, requires_grad, hooks, dtype, …)``."""
    return _tensor(args, args[6]) if len(args) > 6 and isinstance(args[6], torch.dtype) else NotImplemented


def _first(args: tuple[Any, ...]) -> Any:
    """``(data, …)``: a parameter is its tensor."""
    return args[0] if args and isinstance(args[0], StoredTensor | StoredArray) else NotImplemented


def _typed(args: tuple[Any, ...]) -> Any:
    """``(function, type, arguments, state)``: a tensor with attributes, or of a class of its own."""
    if len(args) < 3 or not all(isinstance(each, Stub) for each in args[:2]) or not isinstance(args[2], tuple):
        return NotImplemented
    if args[1].name not in _TENSOR_TYPES or args[0].name not in _TENSOR_BUILDERS:
        return Stub(args[1].name)
    return _TENSOR_BUILDERS[args[0].name](args[2])


def _wrapped(args: tuple[Any, ...]) -> Any:
    return Stub(args[0].name) if args and isinstance(args[0], Stub) else NotImplemented


def _numpy_type(args: tuple[Any, ...]) -> Any:
    return (
        NumpyType(args[0]) if args and isinstance(args[0], str) and _NUMPY_CODE.fullmatch(args[0]) else NotImplemented
    )


def _empty_array(args: tuple[Any, ...]) -> Any:
    """Numpy makes an empty array first and fills it by its state."""
    return StoredArray() if args and isinstance(args[0], Stub) and args[0].name == "numpy.ndarray" else NotImplemented


def _number(args: tuple[Any, ...]) -> Any:
    if len(args) != 2 or not isinstance(args[0], NumpyType) or not isinstance(args[1], bytes):
        return NotImplemented
    made = _array(args[1], args[0], (), fortran=False)
    return NotImplemented if made is None else made.item()


def _buffer(args: tuple[Any, ...]) -> Any:
    """``(bytes, type, shape, order)``, which protocol 5 uses."""
    if len(args) != 4 or not isinstance(args[0], bytes | bytearray) or not isinstance(args[1], NumpyType):
        return NotImplemented
    made = _array(bytes(args[0]), args[1], args[2], fortran=args[3] == "F")
    return NotImplemented if made is None else StoredArray(made)


def _array(data: bytes, kind: NumpyType, shape: object, *, fortran: bool) -> np.ndarray[Any, Any] | None:
    sizes, dtype = _naturals(shape), kind.dtype()
    if sizes is None or math.prod(sizes) * dtype.itemsize != len(data):
        return None
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return flat.astype(dtype.newbyteorder("=")).reshape(sizes, order="F" if fortran else "C")


def fill(target: object, state: object) -> None:
    """What BUILD does: an array takes its content, a type its byte order; any other state is dropped."""
    if not isinstance(state, tuple):
        return
    if isinstance(target, NumpyType):
        if len(state) > 1 and state[1] in ("<", ">", "|", "="):
            target.order = state[1]
    elif isinstance(target, StoredArray) and len(state) == 5:
        _, shape, kind, fortran, data = state
        if isinstance(kind, NumpyType) and isinstance(data, bytes | bytearray):
            target.array = _array(bytes(data), kind, shape, fortran=fortran is True)


Builder = Callable[[tuple[Any, ...]], Any]

_TENSOR_BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
}

BUILDERS: dict[str, Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._utils._rebuild_wrapper_subclass": _wrapped,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _ordered_dict,
    "collections.defaultdict": lambda args: {},
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.frozenset": _set,
    "__builtin__.frozenset": _set,
    "_codecs.encode": _encoded,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "numpy.dtype": _numpy_type,
    **{f"{module}.multiarray._reconstruct": _empty_array for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray.scalar": _number for module in ("numpy.core", "numpy._core")},
    **{f"{module}.numeric._frombuffer": _buffer for module in ("numpy.core", "numpy._core")},
}
"""Name → what makes its result from arguments; it gives NotImplemented for arguments that it does not know."""
