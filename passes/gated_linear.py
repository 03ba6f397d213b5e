"""Recognises gated linear units: the activation of one linear's result times another's (SwiGLU, GEGLU, GLU …).

``act(x · A) · (x · B)``, where A and B are two weights, or rows of one whose result is cut by ``chunk``, ``split``,
``slice`` or ``glu``. Convolutions count, too; their features are axis 1. Activations are those that raise-activations
leaves. Source: Dauphin et al. 2017, arXiv 1612.08083; Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.idioms import quick_gelu
from vlexport.passes.match import Failed, Found

ACTIVATIONS = ("silu", "gelu", "sigmoid", "relu", "relu6", "tanh", "hardswish", "hardsigmoid", "mish", "elu")
_SPLITS = ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")


@dataclass(frozen=True)
class Part:
    """Some of the features that a linear or convolution makes.

    Attributes:
        producer: The linear or convolution.
        start: The first feature, a row of the weight.
        stop: One behind the last.
        nodes: The calls that cut them out, operands before readers.
    """

    producer: Node
    start: int
    stop: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class GatedLinear:
    """The activation of some features times as many others.

    Attributes:
        activation: Plain name of the operator (``silu``; ``gelu tanh`` for its approximation), or ``quick gelu``.
        gate: Features that the activation is taken of.
        up: Features that it multiplies.
        nodes: The calls behind the linears, operands before readers; the last one makes the product.
    """

    activation: str
    gate: Part
    up: Part
    nodes: tuple[Node, ...]

    @property
    def is_one_linear(self) -> bool:
        """Whether one linear makes both."""
        return self.gate.producer is self.up.producer


def gated_linear(program: Program, product: Node) -> GatedLinear | Failed:
    """The gated linear unit whose product, or glu, is ``product``; else why it is none."""
    if dialect.op_name(product) == "aten.glu.default":
        return _glu(product)
    if dialect.op_name(product) != "aten.mul.Tensor":
        return Failed(product, f"it is {dialect.plain_name(product)}, no product", 0)
    found: Failed = Failed(product, "neither factor is an activation", 0)
    for gate, up in (product.args[:2], product.args[1::-1]):
        activated = _activation(program, gate)
        if activated is None or not isinstance(up, Node):
            continue
        name, value, calls = activated
        parts = _part(value), _part(up)
        if parts[0] is None or parts[1] is None:
            which = "what the activation is of" if parts[0] is None else "what it multiplies"
            found = Failed(product, f"{which} is made by no linear or convolution", 1)
        elif parts[0].producer.args[0] is not parts[1].producer.args[0]:
            found = Failed(product, "the two linears read different values", 2)
        elif parts[0].stop - parts[0].start != parts[1].stop - parts[1].start:
            found = Failed(product, "one of them is broadcast over the other", 3)
        else:
            nodes = dict.fromkeys((*parts[0].nodes, *parts[1].nodes, *calls, product))
            return GatedLinear(name, parts[0], parts[1], tuple(nodes))
    return found


def _glu(node: Node) -> GatedLinear | Failed:
    """``a · sigmoid(b)`` of the two halves of a value."""
    source, dim = dialect.operands(node)[:2]
    whole = _part(source)
    if whole is None or dim % source.meta["val"].ndim != _feature_axis(whole.producer):
        return Failed(node, "what it halves is made by no linear or convolution", 1)
    half = (whole.stop - whole.start) // 2
    up = Part(whole.producer, whole.start, whole.start + half, whole.nodes)
    gate = Part(whole.producer, whole.start + half, whole.stop, whole.nodes)
    return GatedLinear("sigmoid", gate, up, (*whole.nodes, node))


def _activation(program: Program, node: Any) -> tuple[str, Any, tuple[Node, ...]] | None:
    """Name, operand and calls of an activation."""
    if not isinstance(node, Node):
        return None
    name = dialect.plain_name(node)
    if name in ACTIVATIONS:
        tanh = name == "gelu" and dialect.operands(node)[1] == "tanh"
        return f"{name} tanh" if tanh else name, node.args[0], (node,)
    if dialect.op_name(node) == "aten.mul.Tensor":
        found = quick_gelu(program, node)
        return ("quick gelu", found["x"], found.nodes) if isinstance(found, Found) else None
    return None


def _part(value: Any) -> Part | None:
    """The features that ``value`` is, or None when no linear or convolution makes it."""
    if not isinstance(value, Node):
        return None
    name = dialect.op_name(value)
    if name == "aten.linear.default" or name in dialect.CONVOLUTIONS:
        size = value.meta["val"].shape[_feature_axis(value)]
        return Part(value, 0, int(size), ()) if not isinstance(size, torch.SymInt) else None
    if name == "operator.getitem":
        return _piece(value)
    if name != "aten.slice.Tensor":
        return None
    source, dim, start, stop, step = dialect.operands(value)
    whole = _part(source)
    if whole is None or step != 1 or dim % source.meta["val"].ndim != _feature_axis(whole.producer):
        return None
    size = whole.stop - whole.start
    first, last = (_clamped(each, size, default) for each, default in ((start, 0), (stop, size)))
    return Part(whole.producer, whole.start + first, whole.start + last, (*whole.nodes, value))


def _piece(item: Node) -> Part | None:
    """One of the pieces that a chunk or split makes."""
    cut: Any = item.args[0]
    if dialect.op_name(cut) not in _SPLITS:
        return None
    source, _, dim = dialect.operands(cut)[:3]
    whole = _part(source)
    if whole is None or dim % source.meta["val"].ndim != _feature_axis(whole.producer):
        return None
    axis = _feature_axis(whole.producer)
    index = int(item.args[1])  # type: ignore[arg-type]
    sizes = [int(piece.shape[axis]) for piece in cut.meta["val"]]
    start = whole.start + sum(sizes[:index])
    return Part(whole.producer, start, start + sizes[index], (*whole.nodes, cut, item))


def _feature_axis(producer: Node) -> int:
    """The axis, counted from 0, that a linear or convolution writes its features along."""
    rank: int = producer.meta["val"].ndim
    if dialect.op_name(producer) == "aten.linear.default":
        return rank - 1
    weight: Node = dialect.operands(producer)[1]
    return rank - int(weight.meta["val"].ndim) + 1


def _clamped(given: Any, size: int, default: int) -> int:
    if given is None:
        return default
    return min(max(int(given) + (size if int(given) < 0 else 0), 0), size)
