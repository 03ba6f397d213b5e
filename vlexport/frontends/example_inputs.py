"""``--input NAME=SHAPE[:dtype]`` as example tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlexport.core.errors import UsageError, nearest


def input_specs(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Example inputs from ``NAME=SHAPE[:dtype]`` texts (``image=1x3x224x224``), seeded normal or zero integers.

    Raises:
        UsageError: VLX0703.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    dtypes: dict[str, Any] = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
    for text in texts:
        name, _, rest = text.partition("=")
        shape_text, _, dtype_name = rest.partition(":")
        dtype_name = dtype_name or "float32"
        sizes = shape_text.replace(",", "x").split("x")
        if not name or not all(s.isascii() and s.isdecimal() and int(s) > 0 for s in sizes):
            raise UsageError(
                "VLX0703",
                f"--input {text} is not NAME=SHAPE[:dtype]",
                where="--input",
                hint="as --input image=1x3x224x224",
            )
        if dtype_name not in dtypes:
            raise UsageError(
                "VLX0703", f"--input {text}: no dtype '{dtype_name}'{nearest(dtype_name, dtypes)}", where="--input"
            )
        if name in found:
            raise UsageError("VLX0703", f"--input {name} is given twice", where="--input", hint="give each input once")
        shape = tuple(map(int, sizes))
        dtype = dtypes[dtype_name]
        value = torch.randn(shape, generator=generator) if dtype is torch.float32 else torch.zeros(shape, dtype=dtype)
        found[name] = value
    return found
