"""Selections whose length the data decides (masks, ``nonzero``, ``unique``) are captured with a check that they are not
empty.

torch cannot decide whether a size that it does not know is 0, and refuses attention or a reshape behind such a
selection. Every output dim that holds an unknown size is checked once to be at least 1; the check stays in the graph,
and a sample of which nothing is left is refused when the graph is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vlexport.frontends.compat import require_some, tensor_leaves


class SizeChecks(TorchFunctionMode):
    """While it is entered, every size that the data decides is at least 1."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, and check the sizes of its tensors."""
        found = func(*args, **(kwargs or {}))
        if isinstance(found, (torch.Tensor, tuple, list)):
            for tensor in tensor_leaves(found):
                for size in tensor.shape:
                    require_some(size)
        return found
