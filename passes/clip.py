"""Reads a value as another one held between two limits, however that is spelled.

``relu6``, ``hardtanh``, ``clamp``, ``clamp_min`` and ``clamp_max`` in either order, ``relu`` and ``minimum`` with a
number: each is ``min(max(x, low), high)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import as_number

_MOST_CALLS = 4


@dataclass(frozen=True)
class Clip:
    """A value held between two limits.

    Attributes:
        of: The value.
        low: The smaller limit.
        high: The larger one.
        nodes: The calls, operands before readers.
    """

    of: Node
    low: float
    high: float
    nodes: tuple[Node, ...]


def clip(program: Program, node: Node) -> Clip | None:
    """What ``node`` holds between two finite limits, or None."""
    low, high = -math.inf, math.inf
    nodes: list[Node] = []
    current: Any = node
    while isinstance(current, Node) and len(nodes) < _MOST_CALLS:
        step = _limits(program, current)
        if step is None:
            break
        operand, inner_low, inner_high = step
        low, high = (min(max(limit, low), high) for limit in (inner_low, inner_high))
        nodes.insert(0, current)
        current = operand
    if not nodes or not (math.isfinite(low) and math.isfinite(high) and low < high) or not isinstance(current, Node):
        return None
    return Clip(current, low, high, tuple(nodes))


def _limits(program: Program, node: Node) -> tuple[Any, float, float] | None:
    """Operand and limits of one call; None for a call of another kind, or with limits that are no numbers."""
    name = dialect.op_name(node)
    if name == "aten.relu6.default":
        return node.args[0], 0.0, 6.0
    if name == "aten.relu.default":
        return node.args[0], 0.0, math.inf
    args = dialect.operands(node)
    if name in ("aten.clamp.default", "aten.clip.default", "aten.clamp.Tensor", "aten.hardtanh.default"):
        low = -math.inf if args[1] is None else as_number(program, args[1])
        high = math.inf if args[2] is None else as_number(program, args[2])
        return (args[0], low, high) if low is not None and high is not None and low <= high else None
    if name not in _ONE_SIDED:
        return None
    for operand, other in ((args[0], args[1]), (args[1], args[0])):
        limit = as_number(program, other)
        if limit is not None:
            return (operand, limit, math.inf) if name in _LOWER else (operand, -math.inf, limit)
    return None


_LOWER = ("aten.clamp_min.default", "aten.maximum.default")
_ONE_SIDED = (*_LOWER, "aten.clamp_max.default", "aten.minimum.default")
CLIPS = (
    "aten.relu6.default", "aten.hardtanh.default", "aten.clamp.default", "aten.clip.default", "aten.clamp.Tensor",
    *_ONE_SIDED,
)  # fmt: skip
"""Operators whose value may be held between two limits. A relu alone has one."""
