"""Values that ``--bake`` gives inputs, as text: what a user types, and what a recipe holds.

::

    task=3                        a number; every element of the input is this number
    prompt=[[49406,320,1125]]     numbers in brackets, as JSON has them; also true and false
    prompt=ids.npy                a file; its content is put in its place at once, so that no path is ever recorded
    prompt=int64[1,77]:BASE64     that content: dtype, shape, and the elements' bytes, little-endian, row by row
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlexport.core.artifact import Array
from vlexport.core.errors import UsageError

LARGEST_BYTES = 1 << 20
"""Of one value: a recipe is text, which people read and compare."""
_DTYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64")
_CONTENT = re.compile(r"(?P<dtype>[a-z0-9]+)\[(?P<shape>\d*(?:,\d+)*)\]:(?P<bytes>[A-Za-z0-9+/=]*)")


@dataclass(frozen=True)
class Baked:
    """A value for an input.

    Attributes:
        name: Of the input.
        value: The array; without axes, it fills the input.
        typed: Whether the dtype was said, not read off how numbers are written.
    """

    name: str
    value: Array
    typed: bool


def resolved(text: str) -> str:
    """``NAME=VALUE`` with the content of a file in the place of its name.

    Raises:
        UsageError: VLX0707 when it is not ``NAME=VALUE``, or the file cannot be used.
    """
    name, value = _split(text)
    if not value.endswith(".npy"):
        baked(text)
        return f"{name}={value}"
    path = Path(value)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = "it does not exist" if not path.is_file() else "it is no array of numbers"
        raise _wrong(name, f"{path.name} cannot be read: {why}", "write the file with numpy.save") from error
    return f"{name}={_content(name, array)}"


def baked(text: str) -> Baked:
    """The value that a resolved text gives.

    Raises:
        UsageError: VLX0707 when it gives none, or one that is not finite.
    """
    name, value = _split(text)
    content = _CONTENT.fullmatch(value)
    array = _from_content(name, content) if content else _from_json(name, value)
    if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        raise _wrong(name, "the value holds NaN or infinity", "give finite numbers")
    return Baked(name, array, typed=content is not None)


def _split(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not (separator and name and value):
        raise UsageError(
            "VLX0707",
            f"--bake {text} is not NAME=VALUE",
            where="--bake",
            hint="as --bake task=3 or --bake prompt=ids.npy",
        )
    return name, value


def _content(name: str, array: Array) -> str:
    array = np.asarray(array)
    if array.dtype.name not in _DTYPES:
        raise _wrong(name, f"the file holds {array.dtype.name}", f"known: {', '.join(_DTYPES)}")
    if array.nbytes > LARGEST_BYTES:
        raise _wrong(
            name, f"the file holds {array.nbytes / 1e6:.1f} MB, and a recipe takes {LARGEST_BYTES / 1e6:.0f} MB",
            "store it in the model as a buffer, and save the model again",
        )  # fmt: skip
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype.name}[{shape}]:{base64.b64encode(little.tobytes()).decode()}"


def _from_content(name: str, content: re.Match[str]) -> Array:
    shape = tuple(int(size) for size in content["shape"].split(",") if size)
    try:
        if content["dtype"] not in _DTYPES:
            raise ValueError(content["dtype"])
        data = base64.b64decode(content["bytes"], validate=True)
        found = np.frombuffer(data, dtype=np.dtype(content["dtype"]).newbyteorder("<")).reshape(shape)
    except (ValueError, binascii.Error) as error:
        raise _wrong(name, "the recorded value is damaged", "give the value again") from error
    return found.astype(content["dtype"])


def _from_json(name: str, value: str) -> Array:
    try:
        found = np.asarray(json.loads(value))
    except (ValueError, RecursionError) as error:  # numbers that JSON does not know, brackets that do not fit
        raise _wrong(name, f"{_short(value)} is no number, no list of numbers and no .npy file", _EXAMPLE) from error
    if found.dtype.kind not in "bif":
        raise _wrong(name, f"{_short(value)} does not hold numbers alone", _EXAMPLE)
    return found


_EXAMPLE = "as --bake task=3, --bake 'prompt=[[1,2,3]]' or --bake prompt=ids.npy"


def _short(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:37]}..."


def _wrong(name: str, what: str, hint: str) -> UsageError:
    return UsageError("VLX0707", f"--bake {name}: {what}", where="--bake", hint=hint)
