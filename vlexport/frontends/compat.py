"""The private parts of torch that the frontends need; nothing else in this folder may import any."""

from __future__ import annotations

import importlib
import io
import pickle
import struct

import torch
from torch._export.verifier import SpecViolationError
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

__all__ = ["LOAD_ERRORS", "declare_torchvision_operators", "find_signature", "load_program"]

LOAD_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SpecViolationError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
)
"""What torch raises for a file that it cannot read: it promises no class of its own."""


def find_signature(namespace: str, operator: str, overload: str) -> tuple[list[tuple[str, str]], list[str]] | None:
    """Argument names with types, and return types, of ``torch.ops.<namespace>.<operator>.<overload>``.

    None if there is no such registered overload.
    """
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    except AttributeError:
        return None
    if not isinstance(found, OpOverload):
        return None
    schema = found._schema
    return [(each.name, str(each.type)) for each in schema.arguments], [str(each.type) for each in schema.returns]


def load_program(archive: bytes) -> ExportedProgram:
    """The program ``model`` of a ``.pt2`` archive.

    Not ``torch.export.load``: after a failure that one tries the format of torch 2.7, whose members are all pickles.
    """
    programs: dict[str, ExportedProgram] = load_pt2(io.BytesIO(archive)).exported_programs
    return programs["model"]


def declare_torchvision_operators() -> None:
    """Declare the two operators that torchvision expects from its binary, where that binary does not load.

    timm imports torchvision; beside a CPU build of torch from elsewhere its binary is silently missing, and the import
    fails at ``register_fake``. The declared operators stay without a kernel. A working torchvision is left alone.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []
"""Operator declarations live as long as their Library object."""
