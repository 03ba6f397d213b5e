"""The private parts of torch that the frontends need; nothing else in this folder may import any."""

from __future__ import annotations

import importlib
import io
import pickle
import struct
from typing import Any

import torch
from torch._export.verifier import SpecViolationError
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "LOAD_ERRORS",
    "bounds_of",
    "data_symbols",
    "declare_decomposed_operators",
    "declare_torchvision_operators",
    "find_signature",
    "load_program",
    "module_from_torchscript",
    "require_some",
    "tensor_leaves",
]

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


def declare_decomposed_operators() -> None:
    """Let torch know the operators of ``quantized_decomposed``, which its quantization tools write."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")


def load_program(archive: bytes) -> ExportedProgram:
    """The program ``model`` of a ``.pt2`` archive.

    Not ``torch.export.load``: after a failure that one tries the format of torch 2.7, whose members are all pickles.
    """
    programs: dict[str, ExportedProgram] = load_pt2(io.BytesIO(archive)).exported_programs
    return programs["model"]


def module_from_torchscript(script: Any, inputs: tuple[torch.Tensor, ...]) -> torch.nn.Module:
    """What a TorchScript program computes, as a module of ATen calls; torch's converter is private and deprecated."""
    from torch._export.converter import TS2EPConverter

    converted: torch.nn.Module = TS2EPConverter(script, inputs).convert().module()
    return converted


def bounds_of(value_range: Any) -> tuple[int, int | None]:
    """Smallest (at least 1) and largest size of a symbol's range; None where it has no end."""
    if value_range is None:
        return 1, None
    low, high = value_range.lower, value_range.upper
    bounded = high.is_finite and high != int_oo  # which says of itself that it is finite
    return (max(1, int(low)) if low.is_number and low.is_finite else 1), (int(high) if bounded else None)


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def data_symbols(value: Any) -> set[Any]:
    """The symbols in recorded numbers, and in the layout of recorded tensors, whose value the data decides.

    A check that equals such a symbol to something else replaces it in expressions; here it counts as it was made.
    """
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(value):
        layout = (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else (leaf,)
        for each in layout:
            if isinstance(each, torch.SymInt | torch.SymFloat | torch.SymBool):
                found |= each.node._expr.free_symbols
    return {symbol for symbol in found if symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))}


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


def require_some(size: Any) -> None:
    """Leave a check in the graph that is being traced, that a size which the data decides is at least 1."""
    if isinstance(size, torch.SymInt) and free_unbacked_symbols(size):
        torch._check(size >= 1)
