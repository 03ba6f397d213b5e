"""What a projection is: a linear map with a stored weight along one axis of a value, whatever it is called.

====================================  ==================  =======================
call                                  weight              output channels lie on
====================================  ==================  =======================
``linear(x, W, b)``                   ``[out, in]``       the last axis
``matmul(x, W)``, ``mm(x, W)``        ``[in, out]``       the last axis
``addmm(b, x, W)``                    ``[in, out]``       the last axis
``conv(x, W, b)``                     ``[out, in/g, …]``  axis 1
====================================  ==================  =======================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program

aten = torch.ops.aten
LINEAR = "aten.linear.default"
PRODUCTS = ("aten.matmul.default", "aten.mm.default")
ADDMM = "aten.addmm.default"
PROJECTIONS = (LINEAR, *PRODUCTS, ADDMM, *dialect.CONVOLUTIONS)
_PADDING, _GROUPS = 4, 6
"""Places among a convolution's operands."""
_WIDE = (torch.float32, torch.float64)
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Projection:
    """A call that is a projection.

    Attributes:
        node: The call.
        x: Place of the value among its operands.
        weight: Place of the weight.
        bias: Place of the bias; None where the operator takes none.
        out_axis: Axis of the weight that the output channels lie on.
        in_axis: Axis of the weight that the input channels lie on, those of one group.
    """

    node: Node
    x: int
    weight: int
    bias: int | None
    out_axis: int
    in_axis: int

    @property
    def is_convolution(self) -> bool:
        """Whether channels lie on axis 1, not on the last one."""
        return dialect.op_name(self.node) in dialect.CONVOLUTIONS

    def operand(self, place: int | None) -> Any:
        """What stands at a place now; None for no place."""
        return None if place is None else dialect.operands(self.node)[place]

    def tensor(self, ir: Program) -> Tensor:
        """The weight."""
        return ir.tensors[str(self.operand(self.weight).target)]

    def again(self, ir: Program, value: Tensor, weight: Tensor, *, with_bias: bool = True) -> Tensor:
        """What the call gives for another value and another weight, with its own bias or without one.

        Args:
            ir: The Program.
            value: Shaped like the one that it reads.
            weight: Shaped like its own.
            with_bias: False leaves the bias out, where the operator can do without.
        """
        given = list(dialect.operands(self.node))
        given[self.x], given[self.weight] = value, weight
        if self.bias is not None:
            given[self.bias] = ir.tensor_of(given[self.bias]) if with_bias else None
        args, kwargs = dialect.arguments(self.node.target, given)  # type: ignore[arg-type]
        made: Tensor = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return made

    def outputs(self, ir: Program) -> int:
        """How many channels it makes."""
        return int(self.tensor(ir).shape[self.out_axis])

    @property
    def channel_axis(self) -> int:
        """Axis ≥ 0 of the result that the output channels lie on."""
        rank = int(self.node.meta["val"].ndim)
        weight_rank = int(self.operand(self.weight).meta["val"].ndim)
        return rank - weight_rank + 1 if self.is_convolution else rank - 1  # a convolution may have no batch axis


def projection_of(ir: Program, node: Any) -> Projection | str:
    """The projection that a call is, or why it is none; an empty string for a call of another kind."""
    name = dialect.op_name(node) if isinstance(node, Node) else ""
    if name == LINEAR or name in dialect.CONVOLUTIONS:
        found = Projection(node, 0, 1, 2, out_axis=0, in_axis=1)
    elif name in PRODUCTS:
        found = Projection(node, 0, 1, None, out_axis=1, in_axis=0)
    elif name == ADDMM:
        found = Projection(node, 1, 2, 0, out_axis=1, in_axis=0)
    else:
        return ""
    weight = ir.tensor_of(found.operand(found.weight))
    if weight is None or (weight.ndim != 2 and not found.is_convolution):
        return f"the {dialect.plain_name(node)}'s weight is computed, not stored"
    bias = found.operand(found.bias)
    if bias is not None and ir.tensor_of(bias) is None:
        return f"the {dialect.plain_name(node)}'s bias is computed, not stored"
    if name == ADDMM and (dialect.operands(node)[3:] != (1, 1) or bias.meta["val"].ndim != 1):
        return "the addmm weighs its terms, or adds more than a bias"
    return found


def why_kept(ir: Program, projection: Projection) -> str:
    """Why nothing had better be multiplied into the weight: it is shared, or would be rounded once more."""
    if projection.tensor(ir).dtype not in _WIDE:
        name = dialect.plain_name(projection.node)
        return f"the {name}'s weight is stored in half precision: it would be rounded once more"
    return why_shared(ir, projection)


def why_shared(ir: Program, projection: Projection) -> str:
    """Why a new weight would be one more: another call reads the old one."""
    name = str(projection.operand(projection.weight).target)
    readers = sum(len(n.users) for n in ir.graph.nodes if n.op == "get_attr" and n.target == name)
    if readers > 1:
        return f"the {dialect.plain_name(projection.node)}'s weight is used by {readers - 1} other(s)"
    return ""


def why_too_wide(before: Tensor, after: Tensor) -> str:
    """Why a new weight or bias must not be: it left the range of half precision, which the old one fits."""
    if not bool(torch.isfinite(after).all()):
        return "the folded weight would not be finite"
    if float(after.abs().max()) > _HALF_MAX >= float(before.abs().max()):
        return "the folded weight would leave the range of half precision"
    return ""


def pads(ir: Program, projection: Projection) -> bool:
    """Whether a projection is a convolution that sees zeros beyond the border."""
    if not projection.is_convolution:
        return False
    padding = dialect.operands(projection.node)[_PADDING]
    if isinstance(padding, str):
        return padding != "valid" and any(size != 1 for size in projection.tensor(ir).shape[2:])
    return any(padding if isinstance(padding, (list, tuple)) else [padding])


def for_inputs(values: Tensor, projection: Projection, weight: Tensor) -> Tensor:
    """One value for each input channel, laid along a weight; rows of a convolution see their group's channels only."""
    if not projection.is_convolution:
        return along(values, projection.in_axis, weight.ndim)
    groups = int(dialect.operands(projection.node)[_GROUPS])
    outputs, inputs = weight.shape[:2]
    rows = values.reshape(groups, 1, inputs).expand(groups, outputs // groups, inputs)
    return rows.reshape(outputs, inputs, *[1] * (weight.ndim - 2))


def behind_affine(
    ir: Program, projection: Projection, factor: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, float64, of a projection that read ``factor · x + offset`` and now reads ``x``.

    Args:
        ir: The Program.
        projection: The call; it must not pad where there is an offset.
        factor: Float64, one for each input channel.
        offset: Likewise; None for none, and then the bias is None, too: it stays.
    """
    weight = projection.tensor(ir).double()
    folded = weight * for_inputs(factor, projection, weight)
    if offset is None:
        return folded, None
    others = [axis for axis in range(weight.ndim) if axis != projection.out_axis]
    moved = (weight * for_inputs(offset, projection, weight)).sum(others)
    bias = ir.tensor_of(projection.operand(projection.bias))
    return folded, moved + bias.double() if bias is not None else moved


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """A vector laid along one axis of a tensor of some rank."""
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def emit(ir: Program, projection: Projection, weight: Tensor, bias: Tensor | None, *, value_of: Node,
         merges: Sequence[Node] = (), suffix: str = "folded") -> Node:  # fmt: skip
    """The same call with another weight and, where there is one, another bias, in front of the old one.

    Args:
        ir: The Program.
        projection: The call.
        weight: In any dtype; cast to the old one's.
        bias: Likewise; None leaves what stands there.
        value_of: What the new call computes.
        merges: Further calls that it stands for, beside the old one.
        suffix: Of the names of the new tensors: ``qkv_folded.weight`` for ``qkv.weight``, also of what was folded.
    """
    node = projection.node
    operands = list(dialect.operands(node))
    name = str(projection.operand(projection.weight).target)
    stem = (name.rpartition(".")[0] or name).removesuffix(f"_{suffix}")
    for place, tensor, leaf in ((projection.weight, weight, "weight"), (projection.bias, bias, "bias")):
        if place is not None and tensor is not None:
            tensor = tensor.to(projection.tensor(ir).dtype)
            operands[place] = ir.add_tensor(f"{stem}_{suffix}.{leaf}", tensor, before=node)
    args, kwargs = dialect.arguments(node.target, operands)  # type: ignore[arg-type]
    merges = (node, *merges)
    return ir.add_call(node.target, args, kwargs, before=node, value_of=value_of, merges=merges)  # type: ignore[arg-type]
