"""From a softmax up to the product of queries and keys, and down to the product with the values.

The way from the product to the softmax is a list of calls, each of which scales the scores, adds to them, hides some,
or moves their axes. What stands there otherwise ends the search, and says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.attention.axes import Axes, aligned, axes_after, is_layout, sizes_of
from vlexport.passes.attention.product import PRODUCTS, Product, product_of

SOFTMAXES = ("aten.softmax.int", "aten._softmax.default")
_MAX_VISITS = 64
"""Calls looked at above one softmax."""
_ADDS = ("aten.add.Tensor", "aten.sub.Tensor")
_SCALES = ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar")
_FILLS = ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
_WHERES = ("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
_STEPS = (*_ADDS, *_SCALES, *_FILLS, *_WHERES)
_MIXES = ("aten.linear.default", "aten.conv1d.default", "aten.conv2d.default", *PRODUCTS)


class RefusedError(Exception):
    """Why a place that looks like attention stays as it is."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class Term:
    """What is added to the scores.

    Attributes:
        node: The value.
        axes: Its axes in the atoms of the scores; () where it is repeated.
        weight: Factor of it.
    """

    node: Node
    axes: Axes
    weight: float = 1.0


@dataclass(frozen=True)
class Hidden:
    """Places of the scores that are overwritten.

    Attributes:
        node: Boolean value.
        axes: As of a term.
        when: The value of ``node`` where the scores are overwritten.
        fill: By what.
        at: The call that does it.
    """

    node: Node
    axes: Axes
    when: bool
    fill: float
    at: Node


@dataclass(frozen=True)
class Factor:
    """A tensor that the scores are multiplied by."""

    node: Node
    axes: Axes


@dataclass
class Scores:
    """What happens to the product of queries and keys up to the softmax.

    Attributes:
        product: Of queries and keys.
        root: The call that makes it.
        axes: Of the value that the softmax reads.
        scale: Product of all factors that are numbers.
        factors: Those that are tensors.
        terms: What is added, in order.
        hidden: What is overwritten, in order.
        nodes: All calls of the way, product first.
    """

    product: Product
    root: Node
    axes: Axes
    scale: float
    factors: list[Factor]
    terms: list[Term]
    hidden: list[Hidden]
    nodes: tuple[Node, ...]


def number_of(ir: Program, value: Any) -> float | None:
    """A Python number, or the one element of a stored tensor."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = ir.tensor_of(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def way_up(ir: Program, softmax: Node) -> list[Node]:
    """The calls from the product of queries and keys (first) down to what the softmax reads.

    Raises:
        RefusedError: Where there is none.
    """
    start: Any = softmax.args[0]
    found = _search(ir, start, [_MAX_VISITS])
    if found is not None:
        return found
    blocked = start
    while is_layout(blocked) or (dialect.op_name(blocked) in _STEPS and isinstance(blocked.args[0], Node)):
        blocked = blocked.args[0]
    name = dialect.plain_name(blocked) if blocked.op == "call_function" else "an input"
    if product_of(blocked) is not None:
        raise RefusedError(blocked, f"the scores are a {name} with stored weights, not of queries with keys")
    if dialect.op_name(blocked) in _MIXES:
        if _product_above(ir, blocked) is not None:
            raise RefusedError(
                blocked, f"a {name} mixes the heads between the product of queries and keys and the softmax"
            )
        raise RefusedError(blocked, f"the scores are made by {name}, not by a product of queries and keys")
    if _product_above(ir, blocked) is not None:
        raise RefusedError(blocked, f"a {name} stands between the product of queries and keys and the softmax")
    raise RefusedError(blocked, f"the scores are made by {name}, not by a product of queries and keys")


def _product_above(ir: Program, node: Node) -> list[Node] | None:
    """The product above a call that is no step."""
    operand = next((a for a in node.all_input_nodes if a.op == "call_function"), None)
    return _search(ir, operand, [_MAX_VISITS]) if operand is not None else None


def _search(ir: Program, node: Node, visits: list[int]) -> list[Node] | None:
    visits[0] -= 1
    if visits[0] < 0 or node.op != "call_function":
        return None
    made = product_of(node)
    if made is not None:
        stored = ir.tensor_of(made.right) is not None and len(sizes_of(made.right)) == 2
        return None if stored else [node]
    if not (is_layout(node) or dialect.op_name(node) in _STEPS):
        return None
    for operand in _ways(node):
        above = _search(ir, operand, visits)
        if above is not None:
            return [*above, node]
    return None


def _ways(node: Node) -> Iterator[Node]:
    """Operands that may be the scores: not repeated by the call."""
    if is_layout(node):
        yield node.all_input_nodes[0]
        return
    for operand in node.args[1:] if dialect.op_name(node) in _WHERES else node.args[:2]:
        if isinstance(operand, Node) and operand.op == "call_function" and sizes_of(operand) == sizes_of(node):
            yield operand


def read_scores(ir: Program, way: list[Node]) -> Scores:
    """Read the calls of :func:`way_up`.

    Raises:
        RefusedError: Where one of them does what attention cannot.
    """
    root = way[0]
    made = product_of(root)
    assert made is not None
    scores = Scores(made, root, made.axes, made.alpha, [], [], [], tuple(way))
    if made.added is not None:
        scores.terms.append(Term(made.added, aligned(made.added, made.axes), made.beta))
    for above, node in itertools.pairwise(way):
        if is_layout(node):
            axes = axes_after(node, scores.axes)
            if axes is None:
                raise RefusedError(node, f"the scores' axes cannot be told apart behind {dialect.plain_name(node)}")
            scores.axes = axes
        elif dialect.op_name(node) in _SCALES:
            _scale(ir, scores, above, node)
        elif dialect.op_name(node) in _ADDS:
            _add(ir, scores, above, node)
        else:
            _hide(ir, scores, above, node)
    return scores


def _scale(ir: Program, scores: Scores, above: Node, node: Node) -> None:
    first, second = node.args[:2]
    divided = dialect.op_name(node).startswith("aten.div")
    other: Any = second if first is above else first
    factor = number_of(ir, other)
    if divided and (first is not above or factor is None):
        raise RefusedError(node, "the scores are divided by a computed value")
    if factor is None:
        if scores.terms or scores.hidden:
            raise RefusedError(node, "the scores are multiplied by a tensor after a mask")
        scores.factors.append(Factor(other, aligned(other, scores.axes)))
        return
    if factor == 0 or (factor < 0 and scores.hidden):
        raise RefusedError(node, f"the scores are {'divided' if divided else 'multiplied'} by {factor:g}")
    factor = 1 / factor if divided else factor
    scores.scale *= factor
    scores.terms = [replace(t, weight=t.weight * factor) for t in scores.terms]
    scores.hidden = [replace(h, fill=h.fill * factor) for h in scores.hidden]


def _add(ir: Program, scores: Scores, above: Node, node: Node) -> None:
    first, second, alpha = dialect.operands(node)
    subtracts = dialect.op_name(node).startswith("aten.sub")
    other: Any = second if first is above else first
    if first is not above and (subtracts or alpha != 1):
        raise RefusedError(node, "the scores are subtracted from something")
    if number_of(ir, other) is not None:
        return  # the same for all keys, which the softmax takes out
    weight = float(alpha) * (-1.0 if subtracts else 1.0) if first is above else 1.0
    scores.terms.append(Term(other, aligned(other, scores.axes), weight))


def _hide(ir: Program, scores: Scores, above: Node, node: Node) -> None:
    if dialect.op_name(node) in _FILLS:
        condition, fill, when = node.args[1], node.args[2], True
    else:
        condition, kept, other = node.args[:3]
        fill, when = (other, False) if kept is above else (kept, True)
    value = number_of(ir, fill)
    if value is None or not isinstance(condition, Node):
        raise RefusedError(node, "scores are replaced by computed values")
    scores.hidden.append(Hidden(condition, aligned(condition, scores.axes), when, value, node))
