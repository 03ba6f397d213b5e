"""raise-patch-embedding: a linear over cut-out patches is the convolution that it computes.

Before → after::

    %1 = reshape(x, [-1,3,14,16,14,16])
    %2 = permute(%1, [0,2,4,3,5,1])                     %1 = conv2d(x, W', b, stride=[16,16])
    %3 = reshape(%2, [-1,196,768])                →     %2 = reshape(%1, [-1,192,196])
    %4 = linear(%3, W: f32[192,768], b)                 %3 = permute(%2, [0,2,1])

    %1 = im2col(x, kernel, dilation, padding, stride)
    %2 = permute(%1, [0,2,1])                     →     conv2d, reshape, permute, as above
    %3 = linear(%2, W, b)

Equation: ``y[e, i, j] = Σ W[e, (c, u, v)] · x[c, s·i + u, s·j + v]``; ``W'`` is ``W`` with its columns in the order
``c, u, v``. Patches that overlap, are padded or dilated come from ``im2col`` only. A ``matmul`` with a stored matrix
counts as a linear.

This is the spelling that most models use and every target runs fastest. It stands behind ``merge-layout``, so that
every way to rearrange an image into patches is one chain of reshapes and permutes.

Does not apply when: the patches are read by something other than one linear with a stored weight (T2T attends over
them, TNT embeds their pixels): they stay; the image is not ``[batch, channels, height, width]``; a patch is one pixel,
or takes each axis whole or not at all, as the layer behind attention that joins the heads; more operators would be
left.
Numerical effect: exact up to the order of sums.
Source: Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1 (the embedding); Yuan et al. 2021, arXiv 2101.11986 (soft
split).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.ir import dialect, provenance
from vlexport.ir.cost import node_macs
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.layout.axis_maps import AxisMap, steps
from vlexport.passes.layout.views import PERMUTE, Call, calls_of, chains_to, emit, is_layout, shape_of

aten = torch.ops.aten
_LINEAR, _MATMUL, _IM2COL = "aten.linear.default", "aten.matmul.default", "aten.im2col.default"
_PATTERN = "patches → linear"


@dataclass(frozen=True)
class Embedding:
    """A linear over patches.

    Attributes:
        consumed: What makes the patches, in order.
        order: Sizes of the linear's columns, and their places as channels, rows, columns; None where they lie so.
        kernel: Rows and columns of a patch.
        geometry: Stride, padding and dilation of the convolution.
        behind: What follows the convolution.
    """

    consumed: tuple[Node, ...]
    order: tuple[tuple[int, ...], tuple[int, ...]]
    kernel: tuple[int, int]
    geometry: tuple[list[int], list[int], list[int]]
    behind: tuple[Call, ...]


class RaisePatchEmbedding(Pass[Program]):
    """A linear over cut-out patches is the convolution that it computes."""

    name: ClassVar[str] = "raise-patch-embedding"
    stage: ClassVar[Stage] = "raise"
    effect: ClassVar[Effect] = "exact"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls(_LINEAR, _MATMUL, _IM2COL):
            found = _unread(node) if dialect.op_name(node) == _IM2COL else _embedding(ir, node)
            if isinstance(found, Embedding):
                yield Match(node, (*found.consumed, node), found)
            elif found:
                yield NearMiss(_PATTERN, node, found)

    def apply(self, ir: Program, match: Match) -> Change:
        node, found = match.node, match.data
        patches, weight, bias = _operands(ir, node)
        assert patches is found.consumed[-1]
        had, macs = _elements(ir), node_macs(ir, node, {})
        x: Any = found.consumed[0].args[0]
        kernel = _kernel(ir, node, weight, found, int(shape_of(x)[1]))
        stem = str(weight.target).removesuffix(".weight")
        stored = ir.add_tensor(f"{stem}_patches.weight", kernel, before=node, kind=ir.kinds[str(weight.target)])
        where = (provenance.module_path(found.consumed[0]), provenance.module_path(node))
        conv = ir.add_call(
            aten.conv2d.default, (x, stored, bias, *found.geometry), before=node, value_of=node, merges=found.consumed
        )  # fmt: skip
        saved_macs = macs - node_macs(ir, conv, {})
        new = emit(ir, found.behind, conv, before=node, value_of=node)
        saved = ir.replace(node, new) - 1 - len(found.behind)
        return Change(
            what="linear over patches raised to conv2d", where=where, saved_nodes=saved,
            saved_parameters=had - _elements(ir), saved_macs=saved_macs,
        )  # fmt: skip


def _operands(ir: Program, node: Node) -> tuple[Any, Any, Any]:
    """The value, the stored weight and the stored bias; None for a weight that is computed."""
    x, weight, *rest = dialect.operands(node)
    bias = rest[0] if rest else None
    fits = ir.tensor_of(weight) is not None and weight.meta["val"].ndim == 2
    return x, weight if fits else None, bias


def _embedding(ir: Program, node: Node) -> Embedding | str:
    patches, weight, _ = _operands(ir, node)
    if not is_layout(patches) or weight is None:
        return ""
    first = patches.args[0]
    if dialect.op_name(patches) == PERMUTE and dialect.op_name(first) == _IM2COL:
        return _from_im2col(node, patches, first) if list(patches.args[1]) == [0, 2, 1] else ""
    last = ""
    for chain in reversed(chains_to(patches)):
        found = _from_chain(node, chain.axes, chain.nodes) if chain.axes is not None else ""
        if isinstance(found, Embedding):
            return found
        last = last or found
    return last


def _from_im2col(node: Node, patches: Node, cut: Node) -> Embedding | str:
    if len(patches.users) != 1 or len(cut.users) != 1:
        return "the patches are used by others as well"
    x, kernel, dilation, padding, stride = dialect.operands(cut)
    shape = shape_of(x)
    if len(shape) != 4:
        return "the image has no batch axis"
    rows, columns = (
        (shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    size = int(shape[1]) * kernel[0] * kernel[1]
    axes = _behind(shape[0], shape_of(node)[-1], rows, columns, ((0,), (2, 3), (1,)))
    behind = _calls(axes)
    if behind is None:
        return "a size of the patches' grid depends on the input"
    geometry = (list(stride), list(padding), list(dilation))
    return Embedding((cut, patches), ((size,), (0,)), (kernel[0], kernel[1]), geometry, behind)


def _from_chain(node: Node, axes: AxisMap, nodes: tuple[Node, ...]) -> Embedding | str:
    """The embedding of a chain that cuts an image into patches."""
    if len(axes.source) != 4 or len(axes.target) < 2:
        return ""
    atoms, owner = axes.atoms, [axis for axis, group in enumerate(axes.source) for _ in group]
    inside = axes.target[-1]
    outside = [i for group in axes.target[:-1] for i in group]
    if any(owner[i] == 1 for i in outside) or any(owner[i] == 0 for i in inside):
        return ""
    places: list[tuple[int, ...]] = [tuple(i for i in inside if owner[i] == axis) for axis in range(4)]
    grid = [tuple(i for i in outside if owner[i] == axis) for axis in range(4)]
    if any(len(group) > 1 for group in (*places, *grid)) or any(g > p for g, p in _pairs(grid, places)):
        return ""
    kernel = [int(atoms[places[axis][0]]) if places[axis] else 1 for axis in (2, 3)]
    if kernel == [1, 1] or not all(isinstance(atoms[i], sympy.Integer) for i in inside):
        return ""
    if not any(places[axis] and grid[axis] for axis in (2, 3)):
        return ""  # heads that attention joins again look alike: an axis is taken whole, and no image is cut
    if any(len(n.users) != 1 for n in nodes):
        return "the patches are used by others as well"
    sizes = tuple(int(atoms[i]) for i in inside)
    order = tuple(inside.index(i) for axis in (1, 2, 3) for i in places[axis])
    rows, columns = (atoms[grid[axis][0]] if grid[axis] else sympy.Integer(1) for axis in (2, 3))
    role = {0: 0, 2: 2, 3: 3}
    target = tuple(tuple(role[owner[i]] for i in group) for group in axes.target[:-1])
    behind = _calls(_behind(axes.before[0], shape_of(node)[-1], rows, columns, (*target, (1,))))
    if behind is None:
        return "a size of the patches' grid depends on the input"
    if len(behind) > len(nodes):
        return "more operators would be left"
    return Embedding(nodes, (sizes, order), (kernel[0], kernel[1]), (list(kernel), [0, 0], [1, 1]), behind)


def _pairs(grid: list[tuple[int, ...]], places: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    return ((g[0], p[0]) for g, p in zip(grid, places, strict=True) if g and p)


def _behind(batch: Any, width: Any, rows: Any, columns: Any, target: tuple[tuple[int, ...], ...]) -> AxisMap:
    """From the convolution's result to the linear's; ``target`` names its axes by their places."""
    sizes = (batch, width, rows, columns)
    source = tuple(() if size == 1 else (size,) for size in sizes)
    number, total = {}, 0
    for place, group in enumerate(source):
        number[place] = tuple(range(total, total + len(group)))
        total += len(group)
    return AxisMap(source, tuple(tuple(i for place in group for i in number[place]) for group in target))


def _calls(axes: AxisMap) -> tuple[Call, ...] | None:
    for spelling in steps(_coarse(axes)):
        calls = calls_of(spelling, axes.before)
        if calls is not None:
            return tuple(calls)
    return None


def _coarse(axes: AxisMap) -> AxisMap:
    """The same map with as few atoms as possible."""
    return axes.inverse().inverse()


def _kernel(ir: Program, node: Node, weight: Any, found: Embedding, channels: int) -> Tensor:
    """The linear's weight as a convolution's, in the same dtype."""
    tensor = ir.tensors[str(weight.target)]
    rows = tensor.t() if dialect.op_name(node) == _MATMUL else tensor
    sizes, order = found.order
    split = rows.reshape(rows.shape[0], *sizes).permute(0, *(1 + i for i in order))
    return split.reshape(rows.shape[0], channels, *found.kernel).clone(memory_format=torch.contiguous_format)


def _elements(ir: Program) -> int:
    return sum(t.numel() for t in ir.used_tensors().values() if t.is_floating_point())


def _unread(cut: Node) -> str:
    """Why an im2col stays, where no linear reads its patches."""
    readers = {dialect.plain_name(r): r for r in cut.users}
    if list(readers) == ["permute"]:
        readers = {dialect.plain_name(r): r for p in cut.users for r in p.users}
    others = sorted(name for name in readers if name not in ("linear", "matmul"))
    return f"the patches are read by {' and '.join(others)}, not by a linear" if others else ""
