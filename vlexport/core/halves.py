"""The two halves of an installation: what runs on a device needs no torch, what builds does."""

from __future__ import annotations

import importlib.util

from vlexport.core.errors import CapabilityError

_BUILD_MODULES = ("torch", "onnx", "onnxscript", "onnx_ir")


def require_build_half(what: str) -> None:
    """Refuse in words where the half that builds is not installed.

    Args:
        what: What needs it, as the user typed it.

    Raises:
        CapabilityError: VLX0501 naming the missing module.
    """
    for name in _BUILD_MODULES:
        if not _is_there(name):
            raise CapabilityError(
                "VLX0501",
                f"{what} needs {name}, which is not installed",
                where=what,
                hint="pip install 'vlexport[build]'",
            )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
