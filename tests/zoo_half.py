"""Why a model of the zoo cannot keep the bound of half precision: what rounding alone does to it, measured in eager."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = 2
_ORDERING = ("topk", "sort", "argsort")


class _Orders(TorchDispatchMode):
    """Keeps the indices that selections return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in _ORDERING:
            self.seen.append((out[1] if isinstance(out, (tuple, list)) else out).clone())
        return out


def cause(made: Any) -> str:
    """What is left of the signal when only stored matrices and kernels are rounded to fp16, and all else is fp32.

    Where that already costs more than the bound allows, no choice of layers for half precision can keep it. Rounding
    what the modules return instead shows whether a selection then orders its candidates otherwise.

    Args:
        made: A model of the zoo.
    """
    module = made.module
    inputs = made.draw(BATCH, torch.Generator().manual_seed(1))
    expected, orders = _run(made, module, inputs)
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    weights, _ = _run(made, rounded, inputs)
    for each in rounded.modules():
        if not list(each.children()):
            each.register_forward_hook(_round)
    values, swapped = _run(made, rounded, inputs)
    said = (
        f"matrices alone rounded to fp16 leave {_decibels(weights, expected):.0f} dB, "
        f"the layers' outputs too {_decibels(values, expected):.0f} dB"
    )
    moved = any(not torch.equal(a, b) for a, b in zip(orders, swapped, strict=True))
    return f"{said}, and a selection then orders its candidates otherwise" if moved else said


def _round(module: Any, inputs: Any, output: Any) -> Any:
    return output.half().float() if isinstance(output, Tensor) and output.dtype == torch.float32 else output


def _run(made: Any, module: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    orders = _Orders()
    with torch.inference_mode(), orders:
        return made.named(module(**inputs)), orders.seen


def _decibels(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the worst output."""

    def of(name: str) -> float:
        noise = (found[name].double() - expected[name].double()).pow(2).sum().item()
        return 10 * math.log10(expected[name].double().pow(2).sum().item() / noise) if noise else math.inf

    return min(of(name) for name, value in expected.items() if value.is_floating_point())
