"""The operators that the numpy target knows: one function each. No torch.

To teach it an operator, write its line. Arguments come as in ATen: arrays where the graph has nodes, plain numbers and
lists elsewhere. The session casts every result to the dtype that was recorded when the program was lowered, so the
functions need not know torch's rules of promotion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FORMAT = 1
"""Version of ``main.json``."""


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    product: Array = x @ weight.T
    return product if bias is None else product + bias


def _softmax(x: Array, axis: int) -> Array:
    powers: Array = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def _mean(x: Array, axes: list[int] | None, keep: bool = False) -> Array:
    found: Array = np.asarray(x.mean(axis=None if axes is None else tuple(axes), keepdims=keep))
    return found


OPERATORS: dict[str, Callable[..., Array]] = {
    "aten.linear.default": _linear,
    "aten.matmul.default": np.matmul,
    "aten.embedding.default": lambda table, ids: table[ids],
    "aten.add.Tensor": np.add,
    "aten.sub.Tensor": np.subtract,
    "aten.mul.Tensor": np.multiply,
    "aten.div.Tensor": np.divide,
    "aten.neg.default": np.negative,
    "aten.relu.default": lambda x: np.maximum(x, 0),
    "aten.tanh.default": np.tanh,
    "aten.sigmoid.default": lambda x: 1 / (1 + np.exp(-x)),
    "aten.exp.default": np.exp,
    "aten.gt.Scalar": np.greater,
    "aten.softmax.int": _softmax,
    "aten.mean.dim": _mean,
    "aten.mean.default": np.mean,
    "aten.reshape.default": np.reshape,
    "aten.permute.default": np.transpose,
}
"""``aten.NAME.OVERLOAD`` → what computes it."""
