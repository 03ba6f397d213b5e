"""Classes that ``forward`` returns its tensors in: data classes become known to torch, other objects are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vlexport.core.errors import CaptureError
from vlexport.ir import compat

_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


def register_output_types(outputs: Any) -> None:
    """Let torch take apart the data classes among a model's outputs, which name the outputs by their fields.

    Args:
        outputs: What ``forward`` returned. torch keeps what it is told for the whole process.

    Raises:
        CaptureError: VLX0306 for an object of another kind.
    """
    while unknown := [leaf for leaf in compat.leaves(outputs) if not isinstance(leaf, _PLAIN)]:
        kind = type(unknown[0])
        if not dataclasses.is_dataclass(kind):
            raise CaptureError(
                "VLX0306", f"forward returns a {kind.__name__}, which is no container of tensors",
                hint="return tensors, or tuples, dicts and data classes of tensors",
            )  # fmt: skip
        torch.export.register_dataclass(kind)
