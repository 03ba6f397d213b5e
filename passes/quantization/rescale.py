"""rescale: other weights for a call that stays where it is, and who computes which captured value afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.projections.projection import Projection, along


def with_tensors(ir: Program, node: Node, places: dict[int, Tensor], *, names: dict[int, str]) -> None:
    """Let a call read other stored tensors; old ones that nobody reads any more go.

    Args:
        ir: The Program.
        node: The call; it stays the same node.
        places: Place among its operands → tensor, cast to the dtype of the call's value.
        names: Place → what the tensor is called.
    """
    operands = list(dialect.operands(node))
    old = [operands[place] for place in places]
    for place, tensor in places.items():
        operands[place] = ir.add_tensor(names[place], tensor.to(node.meta["val"].dtype), before=node)
    node.args, node.kwargs = dialect.arguments(node.target, operands)  # type: ignore[arg-type]
    for each in old:
        if isinstance(each, Node):
            ir.erase_dead(each)


def with_weights(ir: Program, projection: Projection, weight: Tensor, bias: Tensor | None, *, suffix: str) -> None:
    """Let a projection read another weight and, where one is given, another bias; names end in ``_SUFFIX.weight``."""
    name = str(projection.operand(projection.weight).target)
    stem = (name.rpartition(".")[0] or name).removesuffix(f"_{suffix}")
    places, names = {projection.weight: weight}, {projection.weight: f"{stem}_{suffix}.weight"}
    if projection.bias is not None and bias is not None:
        places[projection.bias], names[projection.bias] = bias, f"{stem}_{suffix}.bias"
    with_tensors(ir, projection.node, places, names=names)


def divided(ir: Program, projection: Projection, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, float64, of a projection whose output channels become smaller by so much."""
    weight, bias = projection.tensor(ir).double(), ir.tensor_of(projection.operand(projection.bias))
    return weight / along(
        factors, projection.out_axis, weight.ndim
    ), bias.double() / factors if bias is not None else None


def restamp(nodes: Iterable[Node], *, value_of: Node, decision: str) -> None:
    """Say of calls that they compute no captured value any more but on the way to one, and what was decided."""
    for each in nodes:
        provenance.inherit(each, value_of=value_of, merges=(each,))
        provenance.remember(each, decision)
