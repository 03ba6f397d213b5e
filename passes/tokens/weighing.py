"""How an attention learns that a token stands for several: the logarithm of how many, as its mask.

``softmax(q·kᵀ + log w)`` gives a token as much as its w former ones got together. An attention may have its heads on an
axis of their own, ``[batch, heads, n, width]``, or folded behind the batch, ``[batch·heads, 1, n, width]``, as
``nn.MultiheadAttention`` does: a sample's logarithms are repeated for its heads then.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.passes.layout.axis_maps import AxisMap, permuted, reshaped, sizes_of
from vlexport.passes.tokens.emit import Emit, aten, size

_REORDERED, _RESHAPED = "aten.permute.default", ("aten.reshape.default", "aten.unsqueeze.default")


def heads_in_batch(key: Node, weights: Node) -> int | None:
    """How many rows of an attention one sample has along axis 0, one behind the other; None where that is not known.

    Args:
        key: Keys of the attention, [rows, …, n, width].
        weights: How many former tokens each token stands for, [batch, n, 1].
    """
    rows, batch = sizes_of(key.meta["val"])[0], sizes_of(weights.meta["val"])[0]
    if rows == batch or batch == 1:
        return 1
    axes: AxisMap | None = permuted(sizes_of(key.meta["val"]), tuple(range(key.meta["val"].ndim)))
    node = key
    while axes is not None:
        atoms = axes.atoms
        first = axes.target[0]
        if first and atoms[first[0]] == batch and atoms.count(batch) == 1:
            times = sympy.Mul(*(atoms[i] for i in first[1:]))
            return int(times) if times.is_Integer else None
        above = _view(node)
        if above is None:
            return None
        node, step = above
        axes = step.then(axes)
    return None


def _view(node: Node) -> tuple[Node, AxisMap] | None:
    """What a value is another view of, and the map from there."""
    name = dialect.op_name(node)
    source: Any = node.args[0] if node.args else None
    if name not in (_REORDERED, *_RESHAPED) or not isinstance(source, Node):
        return None
    before = sizes_of(source.meta["val"])
    if name == _REORDERED:
        return source, permuted(before, tuple(d % len(before) for d in dialect.operands(node)[1]))
    step = reshaped(before, sizes_of(node.meta["val"]))
    return None if step is None else (source, step)


def mask(emit: Emit, weights: Node, rank: int, times: int) -> Node:
    """Logarithms that broadcast against scores of ``rank`` axes, [batch·times, 1, …, n].

    Args:
        emit: Writes the calls.
        weights: [batch, n, 1].
        rank: Of the attention's operands, 3 or more.
        times: How often each sample's are repeated.
    """
    logs = emit(aten.permute.default, emit(aten.log.default, weights), [0, 2, 1])
    tokens = size(logs, 2)
    if times != 1:
        logs = emit(aten.expand.default, logs, [-1, times, tokens], False)
        sizes = [-1, *[1] * (rank - 2), tokens]
        args, kwargs = dialect.arguments(aten.reshape.default, (logs, sizes))
        return emit.program.add_call(
            aten.reshape.default, args, kwargs, before=emit.before, value_of=emit.value_of
        )  # fmt: skip
    for _ in range(rank - 3):
        logs = emit(aten.unsqueeze.default, logs, 1)
    return logs
