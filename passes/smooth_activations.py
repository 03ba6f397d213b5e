"""smooth-activations: unlike channels of a value are made alike, and the linears that read it undo that in float.

Before → after::

    %1 = layer_norm(x, [C])                %1 = layer_norm(x, [C], 1 / s, -z / s)
    %2 = linear(%1, W, b)           →      %2 = linear(%1, W · s, b + W z)
    %3 = linear(%1, V, c)                  %3 = linear(%1, V · s, c + V z)

    %1 = gelu(x)                           %1 = gelu(x)
    %2 = linear(%1, W, b)           →      %2 = mul(%1, 1 / s)
                                           %3 = linear(%2, W · s, b)

One scale rounds a whole value, so that one channel that reaches far leaves few levels to all others. Behind a norm of a
vision transformer some channels reach ten times as far as most, or lie far from 0. They are divided by a factor and
shifted where the norm is, and the weights that read them are multiplied: the same is computed. Behind an activation
there is nothing that could take the factor, so that a product is added; only where it halves the error.

Equation: ``W (s · n + z) + b`` with ``n = (x - z) / s``. Factor and shift are the ones whose rounded readers err least
on samples (``passes/quantization/migration``).

Does not apply when: no quantized linear or convolution reads the value; something else reads it too; a weight is
computed, stored in half precision, or shared; channels have no measured range; nothing tried leaves less than nine
tenths of the error (half of it, where a product is needed). There is no shift behind an RMS norm, in front of a
convolution that pads, or of a reader without a bias.

Numerical effect: exact up to rounding of the weights.
Source: Xiao et al. 2023, arXiv 2211.10438 (SmoothQuant); Li et al. 2023, arXiv 2212.08254 (RepQ-ViT).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.collect import Want, Wanted
from vlexport.core.artifact import Frozen
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import NearMiss
from vlexport.passes.projections.behind_norm import Readers, readers_of
from vlexport.passes.projections.projection import Projection, behind_affine, pads
from vlexport.passes.quantization.even_channels import EvenChannels, Moved, Place
from vlexport.passes.quantization.migration import LEFT, LEFT_BY_PRODUCT, Migration
from vlexport.passes.quantization.rescale import restamp, with_tensors, with_weights

aten = torch.ops.aten
_LAYER_NORM = "aten.layer_norm.default"
_NORMS = (_LAYER_NORM, "aten.rms_norm.default")
SMOOTHED = "smoothed"
"""What is noted on a norm, or a product, that was made here: the choice is made once."""


class SmoothActivationsOptions(Frozen):
    """Options of smooth-activations.

    Attributes:
        shift: Channels are shifted, too.
        products: Values that no norm makes are multiplied where that halves the error.
    """

    shift: bool = True
    products: bool = True


class SmoothActivations(EvenChannels):
    """Unlike channels behind a norm are made alike, and the linears behind it undo that."""

    name: ClassVar[str] = "smooth-activations"
    pattern: ClassVar[str] = "value → quantized readers"
    Options: ClassVar[type[Frozen]] = SmoothActivationsOptions
    options: SmoothActivationsOptions

    def places(self, ir: Program, keys: Mapping[Node, str]) -> Iterator[Place | NearMiss]:
        """Norms, and where products may be added other values."""
        for node in _values(ir):
            if _is_done(node) or (not self.options.products and not _is_norm(node)):
                continue
            found = self._place(ir, node, keys[node])
            if isinstance(found, Place) or _is_norm(node):  # most other values are not meant for a linear at all
                yield found

    def _place(self, ir: Program, node: Node, key: str) -> Place | NearMiss:
        readers = readers_of(ir, node)
        if isinstance(readers, tuple):
            return NearMiss(self.pattern, *readers)
        shift = dialect.op_name(node) == _LAYER_NORM and self.options.shift
        site = self.site(
            key, readers.projections, left=LEFT if _is_norm(node) else LEFT_BY_PRODUCT,
            may_shift=shift and not any(_no_shift(ir, each) for each in readers.projections),
        )  # fmt: skip
        if isinstance(site, str):
            return NearMiss(self.pattern, node, site)
        return Place(site, node, (node, *(each.node for each, _ in site.readers)))

    def rewrite(self, ir: Program, place: Place, migration: Migration) -> tuple[str, Mapping[Node, Moved]]:
        """Factor and shift go into the norm, or a product is added."""
        shifted = "factor and shift" if migration.shift is not None else "factor"
        what = f"a {shifted} a channel moved from {dialect.plain_name(place.value)} into its readers"
        return what, _scale(ir, place.value, migration)


def smoothed_channels(ir: Program) -> Wanted:
    """Which values the ranges of single channels are wanted of, for smoothing."""
    axes: dict[Node, int] = {}
    for node in _values(ir):
        readers = readers_of(ir, node)
        if isinstance(readers, Readers):
            axes[node] = node.meta["val"].ndim - 1
            for each in readers.projections:  # behind a view or a mean it has other extremes
                value = each.operand(each.x)
                axes[value] = 1 if each.is_convolution else value.meta["val"].ndim - 1
    return lambda node: Want(histogram=False, channel_axis=axes[node]) if node in axes else None


def _values(ir: Program) -> list[Node]:
    """Norms over the last axis alone whose scale and shift are stored if they have any, and elementwise values."""
    found = []
    for node in ir.calls():
        row, value = dialect.info(node), node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64) or value.ndim < 2:
            continue
        if dialect.op_name(node) in _NORMS:
            _, sizes, *stored = dialect.operands(node)
            tensors = [each for each in stored if isinstance(each, Node)]
            if len(sizes) == 1 and all(ir.tensor_of(each) is not None for each in tensors):
                found.append(node)
        elif row is not None and row.category == "elementwise" and isinstance(value.shape[-1], int):
            found.append(node)
    return found


def _is_norm(node: Node) -> bool:
    return dialect.op_name(node) in _NORMS


def _is_done(node: Node) -> bool:
    """Whether a value is what this pass made, or is multiplied by what it made."""
    return any(provenance.decision(each) == SMOOTHED for each in (node, *node.users))


def _no_shift(ir: Program, reader: Projection) -> bool:
    return pads(ir, reader) or (reader.operand(reader.bias) is None and not reader.is_convolution)


def _scale(ir: Program, node: Node, migration: Migration) -> dict[Node, Moved]:
    readers = readers_of(ir, node)
    assert isinstance(readers, Readers)
    for each in readers.projections:
        weight, bias = behind_affine(ir, each, migration.factor, migration.shift)
        with_weights(ir, each, weight, bias, suffix="smoothed")
    # What lies between computes something else now; a value of the captured graph is computed by the readers only.
    users = dict.fromkeys(user for each in (node, *readers.passed) for user in each.users)
    last = next(user for user in reversed(users) if user not in readers.passed)
    made = node
    if _is_norm(node):
        _narrow_norm(ir, node, migration)
    else:
        made = _product(ir, node, migration)
    restamp((made, *readers.passed), value_of=last, decision=SMOOTHED)
    sources = {made: node, **{each: each for each in readers.passed}}
    return {value: Moved(was, migration.factor, migration.shift) for value, was in sources.items()}


def _narrow_norm(ir: Program, node: Node, migration: Migration) -> None:
    _, _, scale, *rest = dialect.operands(node)
    old = ir.tensor_of(scale)
    stem = provenance.module_path(node) or "norm"
    one, zero = torch.ones_like(migration.factor), torch.zeros_like(migration.factor)
    places = {2: (old.double() if old is not None else one) / migration.factor}
    names = {2: f"{stem}_smoothed.weight", 3: f"{stem}_smoothed.bias"}
    if dialect.op_name(node) == _LAYER_NORM:
        shift = ir.tensor_of(rest[0])
        if shift is not None or migration.shift is not None:
            moved = (shift.double() if shift is not None else zero) - (
                migration.shift if migration.shift is not None else zero
            )
            places[3] = moved / migration.factor
    with_tensors(ir, node, places, names=names)


def _product(ir: Program, node: Node, migration: Migration) -> Node:
    users = list(node.users)
    name = f"{provenance.module_path(node) or node.name}_smoothed.factor"
    inverse = ir.add_tensor(name, (1.0 / migration.factor).to(node.meta["val"].dtype), before=node.next)
    made = ir.add_call(aten.mul.Tensor, (node, inverse), before=inverse.next, value_of=node)
    for each in users:
        each.replace_input_with(node, made)
    return made
