"""Recorded values of calls on tokens, known without running operators on symbolic sizes.

Such a run takes milliseconds a call; merging in every block writes thousands of calls. What is written here has the
batch on axis 0 and constants on all others, so an operator's shape is that of one run on ``meta`` with some batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.core.errors import InternalError
from vlexport.ir import compat
from vlexport.ir.program import Program

_BATCH = 3
"""A batch that broadcasts with nothing."""


class Recorded:
    """Values for one Program; equal shapes share one."""

    def __init__(self, program: Program) -> None:
        mode = compat.fake_mode_of([node.meta["val"] for node in program.placeholders])
        if mode is None:
            raise InternalError("VLX0901", "a Program whose inputs have no recorded shapes")
        self._mode = mode
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def empty(self, sizes: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """A value of these sizes."""
        key = (*map(str, sizes), dtype)
        if key not in self._known:
            self._known[key] = compat.fake_empty(self._mode, sizes, dtype)
        return self._known[key]

    def resized(self, value: Tensor, axis: int, count: int) -> Tensor:
        """The same value with another size along an axis."""
        return self.empty([count if i == axis else s for i, s in enumerate(value.shape)], value.dtype)

    def called(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a call; None where its operands are not shaped as said above."""
        batches: list[Any] = []
        plain = True

        def concrete(node: Node) -> Any:
            nonlocal plain
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                plain = plain and all(isinstance(each, Tensor) for each in value)
                return tuple(map(shaped, value)) if plain else None
            return shaped(value)

        def shaped(value: Tensor) -> Tensor:
            nonlocal plain
            sizes = list(value.shape)
            if sizes and isinstance(sizes[0], torch.SymInt):
                batches.append(sizes[0])
                sizes[0] = _BATCH
            plain = plain and not any(isinstance(size, torch.SymInt) for size in sizes)
            return torch.empty([int(s) for s in sizes] if plain else [], dtype=value.dtype, device="meta")

        given, named = map_arg((args, kwargs), concrete)
        if not plain or len({str(each) for each in batches}) > 1:
            return None
        result = target(*given, **named)

        def recorded(value: Tensor) -> Tensor:
            sizes = [*value.shape]
            return self.empty([batches[0], *sizes[1:]] if batches and sizes else sizes, value.dtype)

        return recorded(result) if isinstance(result, Tensor) else tuple(map(recorded, result))
