"""Decides which operator a norm becomes, and which stored tensors behind it are its scale and shift.

The axes decide: the last ones make a layer norm or RMS norm; axis 1 alone makes one between two permutes (channels come
first there); all axes but the batch, scaled by channel, make a group norm of one group; a value whose channels were
split into groups, normalised and put together again makes a group norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.match import Failed, Place, place_of, privacy, same_shape
from vlexport.passes.norms.by_hand import HandNorm

Layout = Literal["last", "channels first", "groups", "l2"]
_RESHAPE = "aten.reshape.default"


@dataclass(frozen=True)
class NormPlan:
    """What a norm becomes.

    Attributes:
        kind: ``layer_norm``, ``rms_norm``, ``group_norm`` or ``l2_normalize``.
        layout: How it lies to its operand; ``channels first`` needs a permute before and after.
        x: Where its operand is read; the operand may be another one when the plan is carried out.
        sizes: Normalised sizes; for a group norm its number of groups; for an L2 normalization its axes.
        eps: As the operator takes it.
        weights: Stored tensors, whose product is the scale.
        shifts: Stored tensors and signs, whose sum is the shift.
        parameter_shape: Shape that the operator takes scale and shift in.
        root: The call whose value it is.
        nodes: All calls that it stands for.
    """

    kind: str
    layout: Layout
    x: Place
    sizes: tuple[int, ...]
    eps: float
    parameter_shape: tuple[int, ...]
    root: Node
    nodes: tuple[Node, ...]
    weights: tuple[Node, ...] = ()
    shifts: tuple[tuple[Node, float], ...] = ()


@dataclass
class _Behind:
    """Scale and shift that were met behind a norm, and the last call that belongs to them."""

    root: Node
    weights: list[Node]
    shifts: list[tuple[Node, float]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def plan(program: Program, norm: HandNorm) -> NormPlan | Failed:
    """Which operator a norm written by hand becomes, or why none does."""
    x, result = norm.x.meta["val"], norm.result.meta["val"]
    if x.dtype not in (torch.float32, torch.float64) or result.dtype is not x.dtype:
        return Failed(norm.result, "by hand it rounds to another dtype after every step, the operator only once", 0)
    if not norm.scales and not same_shape(result.shape, x.shape):
        return Failed(norm.result, "the result has another shape than what the norm is taken of", 0)
    made = _l2(norm) if norm.kind == "l2_normalize" else _grouped(program, norm) or _by_axes(program, norm)
    if isinstance(made, Failed):
        return made
    shared = privacy(made.nodes, made.root)
    return shared if shared is not None else made


def plan_behind(program: Program, node: Node) -> NormPlan | None:
    """A norm operator without its scale or shift, and the stored tensors behind it that are these; None without any."""
    name, args = dialect.op_name(node), dialect.operands(node)
    x: Any = args[0]
    rank = x.meta["val"].ndim
    if name == "aten.group_norm.default":
        given, sizes, fits, layout = args[2:4], (int(args[1]),), _channel, "groups"
        shape: tuple[Any, ...] = (x.meta["val"].shape[1],)
    elif name in ("aten.layer_norm.default", "aten.rms_norm.default"):
        shape = sizes = tuple(args[1])
        given, fits, layout = args[2:4] if "layer" in name else (args[2], False), _last, "last"
    else:
        return None
    eps = args[4] if name != "aten.rms_norm.default" else args[3]
    if any(isinstance(s, (torch.SymInt, Node)) for s in shape) or eps is None or None not in given:
        return None
    if given[0] is not None and program.tensor_of(given[0]) is None:
        return None
    behind = _Behind(node, [given[0]] if given[0] is not None else [])
    dims = tuple(range(rank - len(shape), rank)) if layout == "last" else ()
    kind = dialect.plain_name(node)
    can_scale = given[0] is None and given[1] is None
    _follow(
        program, behind, lambda t: fits(t, x, dims), scales=can_scale, shifts=given[1] is None and kind != "rms_norm"
    )
    if not behind.nodes:
        return None
    if given[1] is not None and given[1] is not False:
        behind.shifts.insert(0, (given[1], 1.0))
    return NormPlan(
        kind, "groups" if layout == "groups" else "last", Place(node, 0), tuple(map(int, sizes)), float(eps),
        tuple(map(int, shape)), behind.root, (node, *behind.nodes), tuple(behind.weights), tuple(behind.shifts),
    )  # fmt: skip


def _l2(norm: HandNorm) -> NormPlan | Failed:
    if norm.scales:
        return Failed(norm.result, "a stored tensor is multiplied in before the value that is normalised", 0)
    return NormPlan(
        "l2_normalize", "l2", place_of(norm.x, norm.nodes), norm.dims, norm.eps, (), norm.result, norm.nodes
    )


def _grouped(program: Program, norm: HandNorm) -> NormPlan | None:
    """A group norm: the channels were split into groups before, and are put together again behind."""
    split, result = norm.x, norm.result
    back = next(iter(result.users)) if len(result.users) == 1 else None
    if norm.kind != "layer_norm" or norm.scales or back is None or dialect.op_name(back) != _RESHAPE:
        return None
    source: Any = split.args[0] if dialect.op_name(split) == _RESHAPE else None
    rank = split.meta["val"].ndim
    if (
        not isinstance(source, Node)
        or norm.dims != tuple(range(2, rank))
        or any(u not in norm.nodes for u in split.users)
    ):
        return None
    was, parted = source.meta["val"].shape, split.meta["val"].shape
    if len(was) < 3 or any(isinstance(size, torch.SymInt) for size in (was[1], parted[1])):
        return None
    channels, groups = int(was[1]), int(parted[1])
    if channels % groups or not same_shape(was[:1], parted[:1]) or not same_shape(back.meta["val"].shape, was):
        return None
    behind = _Behind(back, [])
    _follow(program, behind, lambda t: _channel(t, source, ()), scales=True, shifts=True)
    return NormPlan(
        "group_norm", "groups", Place(split, 0), (groups,), norm.eps, (channels,), behind.root,
        (split, *norm.nodes, back, *behind.nodes), tuple(behind.weights), tuple(behind.shifts),
    )  # fmt: skip


def _by_axes(program: Program, norm: HandNorm) -> NormPlan | Failed:
    shape = norm.x.meta["val"].shape
    rank = len(shape)
    fixed = all(not isinstance(shape[d], torch.SymInt) for d in norm.dims)
    trailing = norm.dims == tuple(range(rank - len(norm.dims), rank))
    if rank > 3 and norm.dims == tuple(range(2, rank)):
        return Failed(norm.result, "it normalises every channel over its own pixels, as an instance norm does", 0)
    whole_sample = rank > 2 and norm.dims == tuple(range(1, rank)) and norm.kind == "layer_norm"
    if whole_sample and isinstance(shape[1], int):
        as_group = _with_parameters(program, norm, "groups", (1,), (int(shape[1]),), _channel)
        if isinstance(as_group, NormPlan) and (as_group.weights or as_group.shifts or not fixed):
            return replace(as_group, kind="group_norm")
    if trailing and fixed:
        sizes = tuple(int(shape[d]) for d in norm.dims)
        return _with_parameters(program, norm, "last", sizes, sizes, _last)
    if norm.dims == (1,) and rank > 2 and fixed:
        return _with_parameters(program, norm, "channels first", (int(shape[1]),), (int(shape[1]),), _channel)
    if trailing:
        return Failed(norm.result, "the input decides over how many elements it is taken", 0)
    listed = ", ".join(map(str, norm.dims))
    return Failed(norm.result, f"its axes ({listed} of {rank}) are neither the last ones nor the channels", 0)


_Fits = Callable[[torch.Tensor, Node, tuple[int, ...]], bool]


def _with_parameters(
    program: Program, norm: HandNorm, layout: Layout, sizes: tuple[int, ...], shape: tuple[int, ...], fits: _Fits
) -> NormPlan | Failed:
    behind = _Behind(norm.result, list(norm.scales))
    tensors = [program.tensors[str(each.target)] for each in norm.scales]
    if not all(fits(each, norm.x, norm.dims) for each in tensors):
        return Failed(norm.result, "the scale has another shape than the normalised axes", 0)
    shifts = norm.kind != "rms_norm"
    _follow(program, behind, lambda t: fits(t, norm.x, norm.dims), scales=True, shifts=shifts)
    return NormPlan(
        norm.kind, layout, place_of(norm.x, norm.nodes), sizes, norm.eps, shape, behind.root,
        (*norm.nodes, *behind.nodes), tuple(behind.weights), tuple(behind.shifts),
    )  # fmt: skip


def _follow(
    program: Program, behind: _Behind, fits: Callable[[torch.Tensor], bool], *, scales: bool, shifts: bool
) -> None:
    """Take products, then sums, with stored tensors that fit, as long as each is the only reader."""
    while len(behind.root.users) == 1:
        user = next(iter(behind.root.users))
        name, args = dialect.op_name(user), dialect.operands(user)
        factor, shift, sign = _parameters(name, args, behind.root)
        stored = [program.tensor_of(each) for each in (factor, shift) if each is not None]
        if not stored or any(each is None or not fits(each) for each in stored):
            return
        if (factor is not None and (not scales or behind.shifts)) or (shift is not None and not shifts):
            return
        if not same_shape(user.meta["val"].shape, behind.root.meta["val"].shape):
            return
        if user.meta["val"].dtype is not behind.root.meta["val"].dtype:
            return
        if factor is not None:
            behind.weights.append(factor)
        if shift is not None:
            behind.shifts.append((shift, sign))
        behind.nodes.append(user)
        behind.root = user


def _parameters(name: str, args: Sequence[Any], value: Node) -> tuple[Any, Any, float]:
    """What a call multiplies ``value`` by and what it adds to it, and with which sign; None for nothing."""
    if name == "aten.mul.Tensor" and args[0] is not args[1]:
        return args[1] if args[0] is value else args[0], None, 1.0
    if name == "aten.add.Tensor" and args[2] == 1 and args[0] is not args[1]:
        return None, args[1] if args[0] is value else args[0], 1.0
    if name == "aten.sub.Tensor" and args[2] == 1 and args[0] is value:
        return None, args[1], -1.0
    if name == "aten.addcmul.default" and args[3] == 1 and value in args[1:3]:
        return args[2] if args[1] is value else args[1], args[0], 1.0
    return None, None, 1.0


def _last(tensor: torch.Tensor, x: Node, dims: tuple[int, ...]) -> bool:
    """Whether a tensor has one element for each place of the normalised last axes, and no other axis."""
    want = [int(x.meta["val"].shape[d]) for d in dims]
    have = list(tensor.shape)
    if tensor.ndim > x.meta["val"].ndim or not tensor.is_floating_point():
        return False
    padded = [1] * (len(want) - len(have)) + have
    return padded[len(padded) - len(want) :] == want and math.prod(have) == math.prod(want)


def _channel(tensor: torch.Tensor, x: Node, dims: tuple[int, ...]) -> bool:
    """Whether a tensor has one element for each channel of axis 1, and no other axis."""
    shape = x.meta["val"].shape
    have = [1] * (len(shape) - tensor.ndim) + list(tensor.shape)
    want = [1, shape[1], *[1] * (len(shape) - 2)]
    return tensor.ndim <= len(shape) and tensor.is_floating_point() and have == want
