"""Who makes the channels of a value, so that each can be made smaller there: a projection, seen through what scales.

Between a projection and the value may lie what commutes with a positive factor a channel: a rectifier without a ceiling
and a maximum over neighbours; or an attention, whose result is as large as the values that it mixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.projections.channel_trace import trace
from vlexport.passes.projections.projection import PROJECTIONS, Projection, projection_of, why_kept

SCALING = ("aten.relu.default", "aten.leaky_relu.default", "aten.max_pool2d.default")
"""``f(c · x) = c · f(x)`` for every c > 0."""
_POOL, _POOLED = "aten.max_pool2d.default", 2
"""Its axes are the last two: channels that lie there are mixed."""
ATTENTION = "aten.scaled_dot_product_attention.default"
_VALUE = 2
"""Place of attention's values."""
VIEWS = ("aten.permute.default", "aten.reshape.default")


@dataclass(frozen=True, eq=False)
class Producer:
    """What makes a value.

    Attributes:
        projection: The call whose output channels they are.
        between: Calls from there to the value, the value last; they compute something else once a channel is scaled.
        channels: The output channel behind each channel of the value, int64.
        total: Output channels of the projection.
    """

    projection: Projection
    between: tuple[Node, ...]
    channels: Tensor
    total: int

    def factors(self, factor: Tensor) -> Tensor:
        """A factor for each output channel from one for each channel of the value; 1 for channels of other values."""
        found = torch.ones(self.total, dtype=torch.float64)
        found[self.channels] = factor
        return found


def producer_of(ir: Program, value: Node, axis: int) -> Producer | str:
    """The producer of a value, or why it has none; an empty string where nothing like one makes it.

    Args:
        ir: The Program.
        value: Its readers are for the caller to look at.
        axis: Of its channels, ≥ 0.
    """
    between: list[Node] = []
    node: Any = value
    while isinstance(node, Node) and dialect.op_name(node) in (*SCALING, *VIEWS):
        if node is not value and len(node.users) > 1:
            return f"the {dialect.plain_name(node)}'s output is used by {len(node.users) - 1} other(s)"
        between.insert(0, node)
        node = node.args[0]
    if not isinstance(node, Node):
        return ""
    name = dialect.op_name(node)
    if name == ATTENTION:
        return _behind_attention(ir, node, between, axis)
    if name not in PROJECTIONS or any(dialect.op_name(each) in VIEWS for each in between):
        return ""
    found = projection_of(ir, node)
    if isinstance(found, str):
        return found
    if found.channel_axis != axis:
        return "its channels lie on another axis than those of what reads it"
    if axis >= value.meta["val"].ndim - _POOLED and any(dialect.op_name(each) == _POOL for each in between):
        return "the max_pool2d's windows lie over its channels"
    if node is not value and len(node.users) > 1:
        return f"the {dialect.plain_name(node)}'s output is used by {len(node.users) - 1} other(s)"
    total = found.outputs(ir)
    return why_kept(ir, found) or Producer(found, tuple(between), torch.arange(total), total)


def _behind_attention(ir: Program, attention: Node, views: list[Node], axis: int) -> Producer | str:
    if any(dialect.op_name(each) in SCALING for each in views):
        return ""
    if len(attention.users) > 1:
        return f"the attention's output is used by {len(attention.users) - 1} other(s)"
    traced = trace(ir, dialect.operands(attention)[_VALUE], attention)
    if isinstance(traced, str):
        return traced
    if any(isinstance(operand, Node) for each in views for operand in each.all_input_nodes[1:]):
        return "a size of a reshape behind the attention is computed"
    sizes = ir.sizes(attention.meta["val"].shape, _as_traced(ir))
    channels = traced.channels
    if channels.shape[:-2] != torch.Size(sizes[:-2]):
        return "the attention's values are broadcast"
    known: dict[Node, Any] = {attention: channels[..., :1, :].expand(sizes)}
    for each in views:
        args, kwargs = map_arg((each.args, each.kwargs), known.__getitem__)
        assert callable(each.target)
        known[each] = each.target(*args, **kwargs)
    last = known[views[-1] if views else attention].movedim(axis, -1)
    rows = last.reshape(-1, last.shape[-1])
    if not bool((rows == rows[0]).all()) or rows[0].unique().numel() != rows.shape[1]:
        return "a channel behind the attention is not one of its values' channels"
    reason = why_kept(ir, traced.projection)
    return reason or Producer(traced.projection, (*traced.path, attention, *views), rows[0], traced.total)


def _as_traced(ir: Program) -> dict[str, int]:
    """Sizes at which :func:`trace` looks at open dims."""
    wanted = {name: max(each.min, each.opt, 2 + i) for i, (name, each) in enumerate(ir.signature.dims.items())}
    return {name: min(wanted[name], each.max or wanted[name]) for name, each in ir.signature.dims.items()}
