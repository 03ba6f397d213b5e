"""Models that are quantized already are refused in words, but for what ``frontends/decomposed`` makes our own."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import ExportedProgram

from vlexport.core.errors import CaptureError
from vlexport.frontends.decomposed import understands
from vlexport.ir import dialect, provenance

_NAMESPACES = ("quantized.", "quantized_decomposed.", "torchao.", "_quantized.", "bitsandbytes.", "quanto.")
_OPERATORS = ("aten.fake_quantize", "aten.quantize_per", "aten.dequantize", "aten._fake_quantize", "aten.int_repr")
_HINT = "give the model from before quantization, and choose a precision with --precision"


def require_float_module(model: nn.Module) -> None:
    """Refuse a module with packed or quantized weights.

    Raises:
        CaptureError: VLX0307 naming the first place.
    """
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, torch.ScriptObject) or (isinstance(value, torch.Tensor) and value.is_quantized):
                raise _refused(f"{name}.{key}".strip("."), type(module).__name__)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_quantized or _is_packed(tensor):
                raise _refused(f"{name}.{key}".strip("."), type(tensor).__name__)


def _is_packed(tensor: torch.Tensor) -> bool:
    """A tensor subclass of a quantization package: its dtype says float, what it holds are integers."""
    kind = type(tensor.data) if type(tensor) is nn.Parameter else type(tensor)
    return kind.__module__.partition(".")[0] in ("torchao", "bitsandbytes", "optimum", "quanto")


def _refused(where: str, what: str) -> CaptureError:
    return CaptureError("VLX0307", f"the model is quantized already: {where} is a {what}", where=where, hint=_HINT)


def require_not_quantized(exported: ExportedProgram) -> None:
    """Refuse a graph that quantizes or dequantizes in a way that is not understood.

    Raises:
        CaptureError: VLX0307 naming the operator and its line.
    """
    for node in exported.graph.nodes:
        name = dialect.op_name(node)
        if name.startswith((*_NAMESPACES, *_OPERATORS)) and not understands(node):
            raise CaptureError(
                "VLX0307", f"the model is quantized already: it calls {name}", where=provenance.describe(node),
                hint=_HINT,
            )  # fmt: skip
