"""Where a Program can be quantized: which calls, which values, and which values share one scale.

A call is quantized by the rule that the target's scheme has for its operator. Where the rule wants the result quantized
too, that is the value behind an activation which only clips (relu, relu6, a clamp), since that becomes part of the
saturation. From such a value on, calls that move values about (``shared``) stay in integers as long as a quantized call
reads what they make, all at one scale.

A result that the kernel rounds and that begins a residual stream of norms and sums is none of those: the call stays in
float (:mod:`vlexport.passes.quantization.stream`).

What is added to a convolution's result is read as it was rounded for another convolution, on targets that say so
(``residual``): else it is written twice, in integers and in float. That costs little where it lies behind a rectifier;
a stream that nothing bounds, as of a transformer, stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.scheme import LayerRule, QuantScheme
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import same_shape
from vlexport.passes.quantization.named_calls import named_calls
from vlexport.passes.quantization.stream import WHY, heads_of_streams

Refuse = Callable[[Node], str]
"""Why a value cannot be rounded, or an empty string."""
_FACTORS = ("self", "other", "mat2", "query", "key", "value")
"""What schemas call the operands of a product of computed values."""
_RECTIFIERS = ("relu", "relu6")
_POOLS = ("max_pool2d", "avg_pool2d")
_CLIPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")


@dataclass(frozen=True)
class Layer:
    """A call that can be quantized.

    Attributes:
        node: The call.
        rule: How.
        operands: Its computed operands that need a range.
        output: The value that is rounded behind it; None for none.
    """

    node: Node
    rule: LayerRule
    operands: tuple[Node, ...]
    output: Node | None


@dataclass(frozen=True)
class Placement:
    """What can be quantized.

    Attributes:
        layers: Calls, in order.
        integers: Values that exist as integers for all their readers.
        groups: Value → all values that share its scale, itself among them.
        refused: Call of an operator that the scheme quantizes → why it stays in float.
        sums: Quantized call whose result something is added to → that value, which is read as it was rounded.
    """

    layers: tuple[Layer, ...]
    integers: tuple[Node, ...]
    groups: dict[Node, tuple[Node, ...]]
    refused: dict[Node, str]
    sums: dict[Node, Node]


def place(
    program: Program,
    scheme: QuantScheme,
    *,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    refuse: Refuse = lambda _: "",
) -> Placement:
    """Place quantization.

    Args:
        program: In float.
        scheme: What the target wants.
        keep: Patterns of module paths, and keys, of what stays in float.
        only: The same of what alone is quantized; empty for all.
        refuse: Called for every value that would be rounded; a call that needs one that is refused stays in float.
    """
    found: list[Layer] = []
    refused: dict[Node, str] = {}
    kept, alone = named_calls(program, keep), named_calls(program, only)
    rules = [(node, scheme.layer(dialect.plain_name(node))) for node in program.calls()]
    # a fixed scale is one of results, for whoever reads them
    fits = [(n, r) for n, r in rules if r and (r.activation is None or r.activation.fixed_scale is None)]
    sites = {node: _layer(program, node, rule) for node, rule in fits}
    heads = heads_of_streams(program, [(n, each.output) for n, (each, _) in sites.items() if each and each.output])
    for node, (layer, why) in sites.items():
        if node in kept or (only and node not in alone):
            why = "it is kept in float"
        elif node in heads:
            why = WHY
        if layer is not None and not why:
            values = [*layer.operands, *([layer.output] if layer.output is not None else [])]
            why = next((reason for reason in map(refuse, values) if reason), "")
        if layer is None or why:
            refused[node] = why
        else:
            found.append(layer)
    integers, groups = _spread(program, scheme, found, refuse)
    return Placement(tuple(found), integers, groups, refused, _sums(program, scheme, found))


def _sums(program: Program, scheme: QuantScheme, layers: Sequence[Layer]) -> dict[Node, Node]:
    """Quantized call → what is added to its result, where both have one shape and that is rounded anyway."""
    products = {each.node for each in layers if dialect.plain_name(each.node) in scheme.residual}
    read = {operand for each in layers if each.node in products for operand in each.operands}
    found: dict[Node, Node] = {}
    for node in program.calls():
        if dialect.plain_name(node) != "add" or len(node.all_input_nodes) != 2:
            continue
        if any(each != 1 for each in dialect.operands(node)[2:]):  # a factor that the kernel of the sum has not
            continue
        own = [each for each in node.all_input_nodes if each in products and set(each.users) == {node}]
        shapes = [each.meta["val"].shape for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
        if not own or len(shapes) != 2 or not same_shape(*shapes):
            continue
        (other,) = (each for each in node.all_input_nodes if each is not own[0])
        if other in read and _is_rectified(other):
            found[own[0]] = other
    return found


def _is_rectified(node: Node) -> bool:
    """Whether a value is a rectifier's, or a pooled one."""
    while node.op == "call_function" and dialect.plain_name(node) in _POOLS:
        node = node.all_input_nodes[0]
    return node.op == "call_function" and dialect.plain_name(node) in _RECTIFIERS


def _layer(program: Program, node: Node, rule: LayerRule) -> tuple[Layer | None, str]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype is not torch.float32:
        return None, "it does not compute in float32"
    given = dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))
    if rule.weight is None:
        computed = tuple(each for name, each in given.items() if name in _FACTORS and isinstance(each, Node))
        if any(program.tensor_of(each) is not None for each in computed):
            return None, "an operand is stored, and the scheme has no rule for it"
    else:
        weight, bias = given["weight"], given.get("bias")
        if program.tensor_of(weight) is None:
            return None, "its weight is computed, not stored"
        if bias is not None and program.tensor_of(bias) is None:
            return None, "its bias is computed, not stored"
        if rule.weight.granularity == "block" and weight.meta["val"].shape[1] % rule.weight.block:
            features = int(weight.meta["val"].shape[1])
            return None, f"its {features} input features are no multiple of blocks of {rule.weight.block}"
        if rule.activation is None:
            return Layer(node, rule, (), None), ""
        computed = (given["input"],)
        if program.tensor_of(given["input"]) is not None:
            return None, "its input is stored, not computed"
        if rule.activation.dynamic:
            return Layer(node, rule, (), None), ""
    if any(each.target is torch.ops.vlexport.dequantize.default for each in computed):
        return None, "it is quantized already"
    return Layer(node, rule, computed, _clipped(node) if rule.output == "quantized" else None), ""


def _clipped(node: Node) -> Node:
    """The value behind a chain of clipping activations that alone read it."""
    while len(node.users) == 1:
        (reader,) = node.users
        if reader.op != "call_function" or dialect.plain_name(reader) not in _CLIPS or reader.args[0] is not node:
            break
        node = reader
    return node


def _spread(
    program: Program, scheme: QuantScheme, layers: Sequence[Layer], refuse: Refuse
) -> tuple[tuple[Node, ...], dict[Node, tuple[Node, ...]]]:
    """Integer values and groups of one scale, spread through calls that move values about."""
    moving = [node for node in program.calls() if dialect.plain_name(node) in scheme.shared]
    needed = {operand for layer in layers for operand in layer.operands}
    for node in reversed(moving):
        if node in needed or any(user in needed and user in moving for user in node.users):
            needed.add(node)
    integers = dict.fromkeys(layer.output for layer in layers if layer.output is not None)
    groups: dict[Node, set[Node]] = {node: {node} for node in [*integers, *needed]}
    for node in moving:
        sources = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
        if node not in needed or not isinstance(node.meta.get("val"), Tensor) or refuse(node):
            continue
        if sources and all(each in integers for each in sources):
            integers[node] = None
            joined = set().union(groups[node], *(groups[each] for each in sources))
            for member in joined:
                groups[member] = joined
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return tuple(integers), {node: tuple(sorted(members, key=order.__getitem__)) for node, members in groups.items()}
