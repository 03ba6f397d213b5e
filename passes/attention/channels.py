"""Whether an attention is over channels: its product sums over tokens, and its scores compare features.

XCA (El-Nouby et al. 2021) and the channel groups of DaViT are written with the same calls as attention over tokens.
What tells them apart is where the features lie: in the last axis of a linear's value, and in axis 1 of a convolution's.
The axes of a query are followed up to the first of those.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.attention.axes import Atom, Axes, Axis, axes_before, is_layout, leaves, sizes_of, whole
from vlexport.passes.attention.site import Operand, Site

_LAST = ("aten.linear.default", "aten.addmm.default", "aten.mm.default")
_NORMS = ("aten.layer_norm.default", "aten.rms_norm.default", "aten.batch_norm.default")
_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_MAX_UP = 40


def is_over_channels(ir: Program, site: Site) -> bool:
    """Whether queries or keys are features and the product sums over what are tokens."""
    return any(
        _swapped(site.depth, tokens, operand) for operand, tokens in ((site.query, site.rows), (site.key, site.keys))
    )


def _swapped(depth: Axis, tokens: Axis, operand: Operand) -> bool:
    node, axes = operand.node, operand.axes
    summed, compared = list(depth), list(tokens)
    for _ in range(_MAX_UP):
        name = dialect.op_name(node)
        if name in _LAST or name in dialect.CONVOLUTIONS:
            features = set(leaves(axes[-1] if name in _LAST else axes[1]))
            return bool(features & set(leaves(compared))) and not features & set(leaves(summed))
        above = _above(node, axes, summed, compared)
        if above is None:
            return False
        node, axes = above
    return False


def _above(node: Node, axes: Axes, summed: list[Atom], compared: list[Atom]) -> tuple[Node, Axes] | None:
    """The value that a call moves, cuts, scales or norms, with its axes."""
    name = dialect.op_name(node)
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if is_layout(node):
        before = axes_before(node, axes)
        return (source, before) if before is not None else None
    if name == "operator.getitem":
        inside: Any = source.args[0]
        if dialect.op_name(source) == "aten.unbind.int":
            return inside, _with_dim(inside, axes, int(dialect.operands(source)[1]))
        if dialect.op_name(source) in _SPLITS:
            return inside, _resized(inside, axes, int(dialect.operands(source)[2]), summed, compared)
        return None
    if name == "aten.select.int":
        return source, _with_dim(source, axes, int(dialect.operands(node)[1]))
    if name == "aten.expand.default":
        sizes = sizes_of(source)
        hidden = len(axes) - len(sizes)
        return source, tuple(() if size == 1 else axes[hidden + i] for i, size in enumerate(sizes))
    if name == "aten.repeat_interleave.self_int":
        return source, _resized(source, axes, int(dialect.operands(node)[2]), summed, compared)
    if name in ("aten.slice.Tensor", "aten.cat.default"):
        return source, _resized(source, axes, int(dialect.operands(node)[1]), summed, compared)
    row = dialect.info(node)
    if name in _NORMS or (row is not None and row.category == "elementwise"):
        same = next(
            (n for n in node.all_input_nodes if sizes_of(n) == sizes_of(node) and n.op == "call_function"), None
        )
        return (same, axes) if same is not None else None
    return None


def _with_dim(source: Node, axes: Axes, dim: int) -> Axes:
    sizes = sizes_of(source)
    dim %= len(sizes)
    return (*axes[:dim], whole(sizes[dim]), *axes[dim:])


def _resized(source: Node, axes: Axes, dim: int, summed: list[Atom], compared: list[Atom]) -> Axes:
    """The axes before one was cut or joined: its new atom means what the old ones meant."""
    sizes = sizes_of(source)
    dim %= len(sizes)
    old = set(leaves(axes[dim]))
    new = whole(sizes[dim])
    for meaning in (summed, compared):
        if old & set(leaves(meaning)):
            meaning.extend(new)
    return (*axes[:dim], new, *axes[dim + 1 :])
