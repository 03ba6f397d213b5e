"""Recognises norms that are written by hand: what is divided by the root of what.

With ``m(·)`` the mean over some axes and ``s(·)`` the sum::

    layer norm          (x − m(x)) / √(m((x − m(x))²) + eps)     also with var(x), or m(x²) − m(x)², for the spread
    RMS norm            x / √(m(x²) + eps)
    L2 normalization    x / max(√s(x²), eps)                     eps may be left out

Everything else that divides a value by a root of its own squares is named with the reason why it is none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import Failed, as_number, same_shape
from vlexport.passes.norms.moments import Moment, elements, moment, reduced, square
from vlexport.passes.norms.quotient import Quotient, quotient
from vlexport.passes.polynomial import LAYOUT, ROUNDING, Polynomial, is_arithmetic, polynomial

NormKind = Literal["layer_norm", "rms_norm", "l2_normalize"]
_HALVES = (torch.float16, torch.bfloat16)
_MOST_CALLS = 16
_LOWER_LIMITS = ("aten.clamp_min.default", "aten.clamp.default", "aten.clip.default")


@dataclass(frozen=True)
class HandNorm:
    """A norm written by hand, without the scale and shift behind it.

    Attributes:
        kind: Which one.
        x: What it is of.
        dims: Axes that it is taken over, each ≥ 0, in order.
        eps: What is added to the mean square, or the smallest norm to divide by.
        result: The call whose value it is, times ``scales``.
        scales: Stored tensors that are multiplied in on the way.
        nodes: The calls that it is made of.
    """

    kind: NormKind
    x: Node
    dims: tuple[int, ...]
    eps: float
    result: Node
    scales: tuple[Node, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class _Spread:
    """What stands under a root: ``scale`` times the mean, or sum, of squares of a value, and ``eps``."""

    of: Node
    centred: bool
    moment: Moment
    scale: float
    eps: float
    floor: float
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class _Centre:
    """A value less its mean over some axes."""

    x: Node
    dims: tuple[int, ...]
    nodes: tuple[Node, ...]


def hand_norm(program: Program, root: Node) -> HandNorm | Failed | None:
    """The norm whose root ``root`` takes, why it is none, or None when no value is divided by a root of its squares."""
    found = quotient(program, root)
    if found is None:
        return None
    spread = _spread(program, root, found)
    while spread is not None and not _concerns(program, spread, found.numerator):
        bare = _without_scale(program, found)
        if bare is None:
            return None
        found = bare
    return _classified(program, spread, found) if spread is not None else None


def _without_scale(program: Program, found: Quotient) -> Quotient | None:
    """The quotient whose numerator comes without the stored tensor that is multiplied into it; None where none is."""
    product = found.numerator
    if dialect.op_name(product) != "aten.mul.Tensor":
        return None
    for scale, numerator in (product.args, product.args[::-1]):
        if isinstance(scale, Node) and isinstance(numerator, Node) and program.tensor_of(scale) is not None:
            nodes = (product, *found.nodes)
            return replace(found, numerator=numerator, scales=(scale, *found.scales), nodes=nodes)
    return None


def _spread(program: Program, root: Node, found: Quotient) -> _Spread | None:
    if found.radicand is None:
        own = moment(program, root)
        assert own is not None
        return _Spread(own.of, own.kind == "deviation", own, 1.0, 0.0, 0.0, own.nodes)
    value, floor, nodes = found.radicand, 0.0, list[Node]()
    if dialect.op_name(value) in _LOWER_LIMITS:
        args = dialect.operands(value)
        limit = as_number(program, args[1])
        if limit is None or limit < 0.0 or (len(args) > 2 and args[2] is not None):
            return None
        nodes, value, floor = [value], args[0], math.sqrt(limit)
    moments = _moments_behind(program, value)
    if not 1 <= len(moments) <= 2:
        return None
    read = polynomial(program, value, [each.nodes[-1] for each in moments], through=LAYOUT)
    if isinstance(read, Failed):
        return None
    nodes = [*(n for each in moments for n in each.nodes), *read.nodes, *nodes]
    if len(moments) == 2:
        return _difference(program, moments, read, floor, nodes)
    own = moments[0]
    power = (2,) if own.kind in ("deviation", "norm") else (1,)
    scale, eps = read.terms.get(power, 0.0), read.terms.get((0,), 0.0)
    if read.terms.keys() - {power, (0,)} or scale <= 0.0:
        return None
    if own.kind in ("variance", "deviation"):
        return _Spread(own.of, True, own, scale, eps, floor, tuple(nodes))
    if own.kind == "norm":
        return _Spread(own.of, False, own, scale, eps, floor, tuple(nodes))
    base = square(program, own.of)
    return _Spread(base, False, own, scale, eps, floor, (own.of, *nodes)) if base is not None else None


def _difference(
    program: Program, moments: list[Moment], read: Polynomial, floor: float, nodes: list[Node]
) -> _Spread | None:
    """The mean of squares less the square of the mean: a variance."""
    for squares, mean, keys in ((moments[0], moments[1], ((1, 0), (0, 2))), (moments[1], moments[0], ((0, 1), (2, 0)))):
        base = square(program, squares.of)
        of_same = base is mean.of and squares.dims == mean.dims and squares.kind == mean.kind == "mean"
        terms = dict(read.terms)
        eps = terms.pop((0, 0), 0.0)
        if base is not None and of_same and terms == {keys[0]: 1.0, keys[1]: -1.0}:
            return _Spread(base, True, squares, 1.0, eps, floor, (squares.of, *nodes))
    return None


def _moments_behind(program: Program, value: Node) -> list[Moment]:
    """The means, sums and spreads that the arithmetic of ``value`` reads; empty when it reads anything else."""
    found: dict[Node, Moment] = {}
    pending, seen = [value], set[Node]()
    while pending:
        current = pending.pop()
        if current in seen or as_number(program, current) is not None:
            continue
        seen.add(current)
        own = moment(program, current)
        if own is not None:
            found[current] = own
        elif len(seen) < _MOST_CALLS and (is_arithmetic(current) or dialect.op_name(current) in LAYOUT):
            pending.extend(current.all_input_nodes)
        else:
            return []
    return list(found.values())


def _centre(program: Program, node: Node) -> _Centre | None:
    """What ``node`` is less its mean, or None."""
    args = dialect.operands(node)
    if dialect.op_name(node) not in ("aten.sub.Tensor", "aten.add.Tensor") or not isinstance(args[1], Node):
        return None
    x: Any = args[0]
    mean: Any = args[1]
    sign = -float(args[2])
    if dialect.op_name(node) == "aten.add.Tensor":
        sign = -sign
    nodes = [node]
    while dialect.op_name(mean) in LAYOUT or dialect.op_name(mean) == "aten.neg.default":
        sign = -sign if dialect.op_name(mean) == "aten.neg.default" else sign
        nodes.append(mean)
        mean = mean.args[0]
    own = moment(program, mean)
    if own is None or own.kind != "mean" or sign != -1.0 or not isinstance(x, Node) or not _is_same(own.of, x):
        return None
    joined = next((n for n in nodes[1:] if n is args[1]), mean)
    nodes.extend(own.nodes)
    return _Centre(own.of, own.dims, tuple(nodes)) if _is_aligned(nodes[1:], joined, own.of, own.dims) else None


def _concerns(program: Program, spread: _Spread, numerator: Node) -> bool:
    """Whether a value is divided by a root of its own squares, less its mean or not."""
    centres = [_centre(program, each) for each in (numerator, spread.of)]
    own = [numerator, *(each.x for each in centres[:1] if each is not None)]
    under = [spread.of, *(each.x for each in centres[1:] if each is not None)]
    return any(_is_same(b, a) or _is_same(a, b) for a in own for b in under)


def _classified(program: Program, spread: _Spread, found: Quotient) -> HandNorm | Failed:
    own, numerator = spread.moment, found.numerator
    centre = _centre(program, numerator)
    result = found.result
    l2 = own.kind in ("sum", "norm") and not math.isclose(spread.scale * (_count(spread) or 0), 1.0, rel_tol=ROUNDING)
    reason = _wrong_place(spread, found, l2=l2)
    if reason:
        return Failed(result, reason, 0)
    nodes = (*spread.nodes, *found.nodes)
    if not _is_aligned(nodes, found.joined, spread.of, own.dims):
        return Failed(result, "its mean does not stand along the axes that it was taken over", 0)
    same = _is_same(spread.of, numerator)
    if l2:
        eps = max(spread.floor, found.floor)
        made = HandNorm("l2_normalize", spread.of, own.dims, eps, result, found.scales, nodes)
        return made if same else Failed(result, "the squares are not those of the value that is divided", 0)
    if not spread.centred and same and (centre is None or centre.dims != own.dims):
        return HandNorm("rms_norm", spread.of, own.dims, spread.eps, result, found.scales, nodes)
    x = spread.of if spread.centred else None if not same or centre is None else centre.x
    if centre is None or x is None or not _is_same(x, centre.x):
        return Failed(result, "the mean is subtracted on one side of the division only", 0)
    if centre.dims != own.dims:
        return Failed(result, f"its mean is over axes {_listed(centre.dims)}, its spread over {_listed(own.dims)}", 0)
    nodes = (*centre.nodes[::-1], *nodes)
    return HandNorm("layer_norm", centre.x, own.dims, spread.eps, result, found.scales, nodes)


def _wrong_place(spread: _Spread, found: Quotient, *, l2: bool) -> str:
    """Why a value divided by a root is no norm: what stands under the root, or beside it, is something else."""
    if found.result.meta["val"].dtype in _HALVES:
        return "by hand it rounds to half precision after every step, the operator only once"
    if spread.moment.unbiased:
        return "its variance is unbiased: it divides by n − 1, where the operator divides by n"
    if found.offset != 0.0 and l2:
        return f"{found.offset:g} is added to the norm, where L2 normalization takes the larger of the two"
    if found.offset != 0.0:
        return f"its eps, {found.offset:g}, is added to the root, outside of it; the operator adds it to the variance"
    if found.factor != 1.0:
        return f"the root is multiplied by {1 / found.factor:g} before anything is divided by it"
    if l2 and spread.eps != 0.0:
        return f"{spread.eps:g} is added under the root, where L2 normalization takes the larger of norm and eps"
    if l2:
        return "" if spread.scale == 1.0 else f"the squares are multiplied by {spread.scale:g}"
    if found.floor or spread.floor:
        return "its root is held above a limit, where the operator adds to the variance"
    if spread.eps <= 0.0:
        return "nothing is added to the variance: the operator needs an eps above 0"
    scale = spread.scale * (_count(spread) or 0) if spread.moment.kind in ("sum", "norm") else spread.scale
    return "" if math.isclose(scale, 1.0, rel_tol=ROUNDING) else f"its mean square is multiplied by {scale:g}"


def _count(spread: _Spread) -> int | None:
    return elements(spread.moment.of, spread.moment.dims)


def _is_same(wide: Node, x: Node) -> bool:
    """Whether ``wide`` is ``x``, or the same value in single precision where ``x`` is of a half type."""
    if wide is x:
        return True
    have, want = x.meta["val"].dtype, wide.meta["val"].dtype
    exact = have is want or (have in _HALVES and want in (torch.float32, torch.float64))
    return dialect.is_cast(wide) and wide.args[0] is x and exact


def _is_aligned(nodes: Iterable[Node], joined: Node, of: Node, dims: tuple[int, ...]) -> bool:
    """Whether one number for each place along the axes that stay meets just the elements that it was made from."""
    full, small = tuple(of.meta["val"].shape), reduced(of, dims)
    long = _longer_than_one(small)
    expanded = False
    for node in nodes:
        if dialect.op_name(node) not in LAYOUT:
            continue
        source: Any = node.args[0]
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if dialect.op_name(node) == "aten.expand.default" and not same_shape(after, before):
            expanded = True
            if not same_shape(before, small) or not same_shape(after, full):
                return False
        elif not all(same_shape(_longer_than_one(each), long) for each in (before, after)):
            return False
    shape = joined.meta["val"].shape
    whole = not long and not shape
    return whole or same_shape(shape, small) or (expanded and same_shape(shape, full))


def _longer_than_one(shape: Iterable[Any]) -> list[Any]:
    return [size for size in shape if isinstance(size, torch.SymInt) or size != 1]


def _listed(dims: tuple[int, ...]) -> str:
    return ", ".join(map(str, dims))
