"""Recorded values of calls on tokens, known without running operators on symbolic sizes.

Such a run takes milliseconds a call; merging in every block writes thousands of calls. Of what is written here only the
batch is symbolic, so an operator's shape is that of one run on ``meta`` with a batch that no other size can be.
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

_BATCH = 2**20 + 7
"""Broadcasts with nothing, and what an operator makes of it is told from any other size: that is below its half."""


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
        """The value of a call; None where another size than one batch is symbolic, or it is no tensor."""
        batches: dict[str, Any] = {}
        known = True

        def concrete(node: Node) -> Any:
            nonlocal known
            value = node.meta["val"]
            if isinstance(value, Tensor):
                return shaped(value)
            known = known and isinstance(value, (tuple, list)) and all(isinstance(each, Tensor) for each in value)
            return tuple(map(shaped, value)) if known else None

        def shaped(value: Tensor) -> Tensor:
            symbols = [size for size in value.shape if isinstance(size, torch.SymInt)]
            batches.update((str(symbol), symbol) for symbol in symbols)
            sizes = [_BATCH if isinstance(size, torch.SymInt) else size for size in value.shape]
            return torch.empty(sizes, dtype=value.dtype, device="meta")

        given, named = map_arg((args, kwargs), concrete)
        if not known or len(batches) > 1:
            return None
        result = target(*given, **named)
        batch = next(iter(batches.values()), None)
        values = [result] if isinstance(result, Tensor) else result
        if not isinstance(values, (tuple, list)):
            return None
        sizes = [[batch if size == _BATCH else int(size) for size in each.shape] for each in values]
        if any(isinstance(size, int) and size >= _BATCH // 2 for each in sizes for size in each):
            return None
        made = tuple(self.empty(each, value.dtype) for each, value in zip(sizes, values, strict=True))
        return made[0] if isinstance(result, Tensor) else made
