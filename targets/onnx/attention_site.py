"""attention_site: a softmax between two products, read as attention over packed projections.

::

    softmax((q · kᵀ) · scale + bias) · v  →  heads     q, k, v: (batch, heads, length, width), moved about from one root
                                             joined    or several, each (batch · length, columns)

Where q, k and v come from is told by :mod:`layout`, whatever the spelling: for every head and each of its values the
column of the root that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir

from vlexport.passes.base import Match, NearMiss
from vlexport.targets.onnx.attention_taps import KEY, QUERY, VALUE, NoTap, Tap, taps
from vlexport.targets.onnx.layout import Numbers, Sizes, Untraceable, moved, numbered, origin
from vlexport.targets.onnx.model import OnnxModel

_RANK = 4
ADDED = "a mask or bias is added to the scores"


@dataclass(frozen=True)
class Part:
    """One of query, key and value.

    Attributes:
        root: What it is moved from.
        columns: (heads · width,) of the root's last dim, in the order of heads.
    """

    root: onnx_ir.Value
    columns: Numbers


@dataclass(frozen=True)
class Site:
    """Attention that can be one operator.

    Attributes:
        softmax: Names it.
        parts: Query, key, value.
        heads: Their number.
        scale: What products of query and key are multiplied by.
        made: The result with heads joined: (batch, length, heads · width), or the same as rows.
        bias: What is added to the scores, as it is before broadcasting; None for nothing.
        shape: (batch, heads, queries, keys) of the scores, with the sizes that stand for dims without one.
        guarded: Whether a row of the softmax that is not a number, as where all of it is masked, becomes zeros.
        taps: What others read of query, key and value.
        hidden: Why an operator that hides its projections cannot serve all who read of them; empty where it can.
        sizes: What stands for dims without a size.
    """

    softmax: onnx_ir.Node
    parts: tuple[Part, Part, Part]
    heads: int
    scale: float
    made: onnx_ir.Value
    bias: onnx_ir.Value | None
    shape: tuple[int, ...]
    guarded: bool
    taps: tuple[Tap, ...]
    hidden: str
    sizes: Sizes

    @property
    def rows(self) -> bool:
        """Whether the result has batch and length in one dim."""
        return self.made.shape is not None and len(self.made.shape) == 2

    def require_positions(self, part: int, value: onnx_ir.Value) -> None:
        """Refuse a value that an operator would read as other sequences than those that attend.

        Args:
            part: QUERY, KEY or VALUE.
            value: What is projected to it, or it itself.

        Raises:
            NoSite: Where it is not over batch, length and depth.
        """
        if value.shape is None or len(value.shape) != 3:
            raise NoSite("what is projected is not over batch, length and depth")
        batch, _, queries, keys = self.shape
        try:
            given = self.sizes.of(value)
        except Untraceable as error:
            raise NoSite(str(error)) from error
        if given[:-1] != (batch, queries if part == QUERY else keys):
            raise NoSite("positions are shared out over batch and length behind the projection")

    def attributes(self) -> dict[str, int | float | list[int]]:
        """As com.microsoft spells it; the usual scale is left out, which older releases do not know."""
        widths = [len(part.columns) for part in self.parts]
        usual = math.isclose(self.scale, (widths[0] // self.heads) ** -0.5, rel_tol=1e-6)
        unlike = {} if widths[2] == widths[0] else {"qkv_hidden_sizes": widths}
        return {"num_heads": self.heads, **({} if usual else {"scale": self.scale}), **unlike}


class NoSite(Exception):  # noqa: N818  a near miss: its text is the reason
    """A softmax that nearly is one."""


def sites(
    model: OnnxModel,
    pattern: str,
    read: Callable[[onnx_ir.Node], Any],
    *,
    misses: type[Exception] | tuple[type[Exception], ...] = NoSite,
) -> Iterator[Match[onnx_ir.Node] | NearMiss[onnx_ir.Node]]:
    """Every softmax that a product reads, as a match with what ``read`` makes of it, or as a near miss.

    Args:
        model: Where to look.
        pattern: What near misses name.
        read: Tells what the match holds, or raises one of ``misses`` with the reason.
        misses: The exceptions that mean a near miss.
    """
    for softmax in filter(_looks_like_one, model.nodes("Softmax")):
        try:
            found = read(softmax)
        except misses as miss:
            yield NearMiss(pattern, softmax, str(miss))
            continue
        yield Match(softmax, (softmax,), found)


def _looks_like_one(softmax: onnx_ir.Node) -> bool:
    """Whether a product reads a softmax, or what guards it, as nothing but attention has it."""
    guard = _guard(softmax)
    readers = [user for user, position in (guard or softmax).outputs[0].uses() if position == 0]
    return any(user.op_type == "MatMul" for user in readers)


def any_site(softmax: onnx_ir.Node) -> Site:
    """Read attention around a softmax: of any queries, keys and values, whoever else reads them.

    Raises:
        NoSite: With the reason.
    """
    try:
        return _site(softmax)
    except Untraceable as error:
        raise NoSite(str(error)) from error


def site(softmax: onnx_ir.Node) -> Site:
    """The same, for operators that compute queries, keys and values of one value and hide them.

    Raises:
        NoSite: With the reason.
    """
    found = any_site(softmax)
    if found.shape[2] != found.shape[3]:
        raise NoSite("there are not as many queries as keys")
    if found.hidden:
        raise NoSite(found.hidden)
    return found


def plain_site(softmax: onnx_ir.Node) -> Site:
    """The same, for operators that add nothing to the scores.

    Raises:
        NoSite: With the reason.
    """
    found = site(softmax)
    if found.bias is not None or found.guarded:
        raise NoSite(ADDED)
    return found


def _site(softmax: onnx_ir.Node) -> Site:
    scores = softmax.inputs[0]
    assert scores is not None
    if _axis(softmax) not in (-1, _RANK - 1):
        raise NoSite("the softmax is not over the last dim")
    scores, bias = _biased(scores)
    weighed = origin(scores)
    product = weighed.root.producer()
    if product is None or product.op_type != "MatMul" or any(n.op_type not in ("Mul", "Div") for n in weighed.between):
        what = product.op_type if product is not None else "an input"
        masked = product is not None and product.op_type in ("Add", "Where")
        raise NoSite("its scores are masked in several steps" if masked else f"its scores come from {what}")
    guard = _guard(softmax)
    context = _only_reader((guard or softmax).outputs[0])
    query, key, value = product.inputs[0], product.inputs[1], context.inputs[1]
    assert query is not None
    assert key is not None
    assert value is not None
    sizes = Sizes()
    origins = [origin(each) for each in (query, key, value)]
    if origins[2].factor != 1.0:
        raise NoSite("the values are scaled")
    found = [moved(each, from_.root, sizes) for each, from_ in zip((query, key, value), origins, strict=True)]
    if any(each.ndim != _RANK for each in found):
        raise NoSite("its products are not over batch, heads, length and width")
    found[1] = found[1].swapaxes(-1, -2)
    parts = [_part(from_.root, each, sizes) for from_, each in zip(origins, found, strict=True)]
    batch, heads, length, width = found[QUERY].shape
    if any(each.shape[:2] != (batch, heads) for each in found):
        raise NoSite("query, key and value have other heads")
    if found[KEY].shape[2] != found[VALUE].shape[2] or found[KEY].shape[-1] != width:
        raise NoSite("keys are of another width than queries, or of another number than values")
    made = _joined(context.outputs[0], (batch, heads, length, found[VALUE].shape[-1]), sizes)
    tapped, hidden = _taps(made, parts, found, sizes)
    scale = weighed.factor * origins[0].factor * origins[1].factor
    shape = (batch, heads, length, found[KEY].shape[2])
    if bias is not None:
        _require_fitting(bias, shape, sizes)
    return Site(
        softmax, (parts[0], parts[1], parts[2]), heads, scale, made, bias, shape, guard is not None, tapped, hidden,
        sizes,
    )  # fmt: skip


def _taps(
    made: onnx_ir.Value, parts: Sequence[Part], found: Sequence[Numbers], sizes: Sizes
) -> tuple[tuple[Tap, ...], str]:
    """What others read of the parts; or nothing and why that cannot be told."""
    try:
        tapped = taps(made, [part.root for part in parts], found, sizes)
    except NoTap as error:
        return (), str(error)
    unlike = found[KEY].shape != found[VALUE].shape
    if unlike and any(each.part != QUERY for each in tapped):
        return (), "keys that others read are of another width than values"
    return tuple(tapped), ""


def _biased(scores: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value | None]:
    """Scores as a product gives them, and what is added."""
    node = scores.producer()
    if node is None or node.op_type != "Add":
        return scores, None
    first, second = node.inputs
    assert first is not None
    assert second is not None
    made = [each for each in (first, second) if _is_product(each)]
    if len(made) != 1:
        raise NoSite("its scores are masked in several steps")
    return made[0], second if made[0] is first else first


def _is_product(value: onnx_ir.Value) -> bool:
    node = origin(value).root.producer()
    return node is not None and node.op_type == "MatMul"


def _require_fitting(bias: onnx_ir.Value, shape: tuple[int, ...], sizes: Sizes) -> None:
    own = sizes.of(bias)
    if len(own) > _RANK or any(a not in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)):
        raise NoSite("what is added to the scores has dims of its own")


def _guard(softmax: onnx_ir.Node) -> onnx_ir.Node | None:
    """What puts zeros in the place of a row that is not a number."""
    made = softmax.outputs[0]
    readers = {user.op_type: user for user, _ in made.uses()}
    test, choice = readers.get("IsNaN"), readers.get("Where")
    if test is None or choice is None or len(list(made.uses())) != 2 or len(list(test.outputs[0].uses())) != 1:
        return None
    condition, zero, otherwise = choice.inputs
    known = zero.const_value if zero is not None else None
    if condition is not test.outputs[0] or otherwise is not made or known is None or known.numpy().any():
        return None
    return choice


def _part(root: onnx_ir.Value, found: Numbers, sizes: Sizes) -> Part:
    """Columns of a part, once every row of the root is found to be one position, in order."""
    width = sizes.of(root)[-1]
    rows, columns = np.divmod(found, width)
    same_row = rows[:, :1, :, :1]
    same_column = columns[:1, :, :1, :]
    batch, _, length, _ = found.shape
    in_order = np.arange(batch * length).reshape(batch, 1, length, 1)
    if not ((rows == same_row).all() and (columns == same_column).all()):
        raise NoSite("heads are no columns of what it is projected from")
    if numbered(root, sizes).size != batch * length * width or not (same_row == in_order).all():
        raise NoSite("the query, or another part, is not of all positions in their order")
    return Part(root, same_column.reshape(-1))


def _joined(context: onnx_ir.Value, shape: tuple[int, ...], sizes: Sizes) -> onnx_ir.Value:
    """The value below the second product in which heads are joined."""
    batch, heads, length, width = shape
    own = np.arange(batch * heads * length * width).reshape(shape)
    wanted = own.transpose(0, 2, 1, 3).reshape(-1)
    value = context
    while True:
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output():
            break
        made = users[0][0].outputs[0]
        try:
            found = moved(made, context, sizes, numbers=own)
        except Untraceable:
            break
        if found.shape[-1] == heads * width and np.array_equal(found.reshape(-1), wanted):
            return made
        value = made
    raise NoSite("the heads of its result are not joined in their order")


def _only_reader(weights: onnx_ir.Value) -> onnx_ir.Node:
    readers = list(weights.uses())
    if len(readers) != 1 or readers[0][0].op_type != "MatMul" or readers[0][1] != 0:
        raise NoSite("the softmax is read by others, too")
    return readers[0][0]


def _axis(node: onnx_ir.Node) -> int:
    found = node.attributes.get("axis")
    return -1 if found is None else found.as_int()
