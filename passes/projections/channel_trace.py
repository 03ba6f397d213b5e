"""Which output channel of a projection every element of a value is, where only views lie between the two.

The channels are counted, laid out as the projection's result, and led through the views themselves: what arrives says
for each element which channel it is. A factor behind the views is then one number per channel, or it is not::

    %1 = linear(x, W)                      channels 0 … 3D
    %2 = reshape(%1, [-1, N, 3, H, D/H])
    %3 = permute(%2, [2, 0, 3, 1, 4])
    %4 = unbind(%3)[0]                     channels 0 … D, head by head
    %5 = mul(%4, temperature)              temperature[h] for the channels of head h, 1 for all others
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.projections.projection import PROJECTIONS, Projection, along, projection_of

_VIEWS = (
    "aten.reshape.default", "aten.permute.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
    "aten.squeeze.default", "aten.expand.default", "aten.select.int", "aten.slice.Tensor", "aten.narrow.default",
    "aten.unbind.int", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.flip.default",
    "aten.roll.default", "operator.getitem",
)  # fmt: skip
MAX_ELEMENTS = 1 << 24
"""Elements of a value beyond which its channels are not traced."""
_OPEN_SIZE = 2
"""Size of the first open dim while tracing, the next is one larger: 1 would hide that an axis is broadcast."""


@dataclass(frozen=True)
class Trace:
    """A value that is made of a projection's channels.

    Attributes:
        projection: What makes them.
        path: Views between the two, in order; the last one is the value, unless the projection is.
        channels: The channel of every element, int64, in the value's shape with open dims at small sizes.
        total: How many channels the projection makes.
    """

    projection: Projection
    path: tuple[Node, ...]
    channels: Tensor
    total: int

    def factors(self, factor: Tensor) -> Tensor | None:
        """One factor for each of the projection's channels, float64, 1 where the value does not hold it.

        None where the elements of one channel get different factors.

        Args:
            factor: Broadcasts to the value's shape.
        """
        wanted = factor.double().expand(self.channels.shape)
        found = torch.ones(self.total, dtype=torch.float64)
        found[self.channels.flatten()] = wanted.flatten()
        return found if torch.equal(found[self.channels], wanted) else None


def trace(ir: Program, value: Any, reader: Node) -> Trace | str:
    """Where the channels of ``value``, which ``reader`` reads, come from.

    Returns:
        The trace; why there is none; an empty string where no projection makes the value.
    """
    path: list[Node] = []
    node = value
    while isinstance(node, Node) and dialect.op_name(node) in _VIEWS:
        path.insert(0, node)
        node = node.args[0]
    if not isinstance(node, Node) or dialect.op_name(node) not in PROJECTIONS:
        return ""
    found = projection_of(ir, node)
    if isinstance(found, str):
        return found
    if any(isinstance(operand, Node) for each in path for operand in each.all_input_nodes[1:]):
        return "a size of a reshape on the way is computed"
    shape = ir.sizes(node.meta["val"].shape, _open_sizes(ir))
    if math.prod(shape) > MAX_ELEMENTS:
        return "the value is too large to trace its channels"
    total = found.outputs(ir)
    channels = along(torch.arange(total), found.channel_axis, len(shape)).expand(shape)
    known: dict[Node, Any] = {node: channels}
    for each in path:
        known[each] = _viewed(each, known)
    traced = Trace(found, tuple(path), known[path[-1]] if path else channels, total)
    return _read_elsewhere(traced, known, reader) or traced


def _open_sizes(ir: Program) -> dict[str, int]:
    """A size for every open dim, each another one where its range has room."""
    wanted = {name: max(each.min, each.opt, _OPEN_SIZE + i) for i, (name, each) in enumerate(ir.signature.dims.items())}
    return {name: min(wanted[name], each.max or wanted[name]) for name, each in ir.signature.dims.items()}


def _viewed(view: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((view.args, view.kwargs), known.__getitem__)
    assert callable(view.target)
    return view.target(*args, **kwargs)


def _read_elsewhere(found: Trace, known: dict[Node, Any], reader: Node) -> str:
    """Why the channels must not change: something else reads some of them."""
    mine = torch.zeros(found.total, dtype=torch.bool)
    mine[found.channels.flatten()] = True
    chain = (found.projection.node, *found.path, reader)
    for node, follower in itertools.pairwise(chain):
        if dialect.operands(follower).count(node) > 1:  # queries that are the keys too
            return f"the {dialect.plain_name(follower)} reads the {dialect.plain_name(node)}'s output twice"
        others = [user for user in node.users if user is not follower]
        if not all(_is_disjoint(user, known, mine) for user in others):
            return f"the {dialect.plain_name(node)}'s output is used by {len(others)} other(s)"
    return ""


def _is_disjoint(user: Node, known: dict[Node, Any], mine: Tensor) -> bool:
    """Whether a reader takes other channels only."""
    if dialect.op_name(user) not in _VIEWS or len(user.all_input_nodes) != 1:
        return False
    taken = _viewed(user, known)
    if isinstance(taken, (list, tuple)):
        return all(_is_disjoint(each, {**known, user: taken}, mine) for each in user.users)
    return not bool(mine[taken.flatten()].any())
