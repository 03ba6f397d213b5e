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

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from vlexport.calibration.collect import Want, Wanted
from vlexport.calibration.keys import value_keys
from vlexport.calibration.table import ValueEntry
from vlexport.core.artifact import Frozen
from vlexport.core.scheme import QuantScheme
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import parameters_stored
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, Pass, Stage
from vlexport.passes.projections.behind_norm import Readers, readers_of
from vlexport.passes.projections.projection import Projection, behind_affine, pads
from vlexport.passes.quantization.migration import (
    LEFT,
    LEFT_BY_PRODUCT,
    Migration,
    Site,
    channels_of,
    choose,
    quantized_rule,
)
from vlexport.passes.quantization.rescale import restamp, with_tensors, with_weights

aten = torch.ops.aten
_LAYER_NORM = "aten.layer_norm.default"
_NORMS = (_LAYER_NORM, "aten.rms_norm.default")
_PATTERN = "value → quantized readers"
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


class SmoothActivations(Pass[Program]):
    """Unlike channels behind a norm are made alike, and the linears behind it undo that."""

    name: ClassVar[str] = "smooth-activations"
    stage: ClassVar[Stage] = "smooth"
    effect: ClassVar[Effect] = "exact"
    Options: ClassVar[type[Frozen]] = SmoothActivationsOptions
    options: SmoothActivationsOptions

    def __init__(
        self,
        options: Frozen | None = None,
        *,
        scheme: QuantScheme | None = None,
        ranges: Mapping[str, ValueEntry] | None = None,
        samples: Sequence[tuple[Tensor, ...]] = (),
        keep: Sequence[str] = (),
    ) -> None:
        """Without a scheme, ranges of channels and samples, nothing is found.

        Args:
            options: Typed options.
            scheme: What the target wants quantized.
            ranges: Key of a value → its range, with those of its channels.
            samples: What candidates are tried on, one tensor per input each.
            keep: Patterns of modules that stay in float: nothing is gained by smoothing what they read.
        """
        super().__init__(options)
        self.scheme = scheme
        self.ranges = ranges or {}
        self.samples = samples
        self.keep = keep
        self._chosen: dict[str, Migration] | None = None

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        if self.scheme is None or not self.samples:
            return
        keys = value_keys(ir)
        sites: list[Site] = []
        for node in _values(ir):
            if _is_done(node) or (not self.options.products and not _is_norm(node)):
                continue
            site = self._site(ir, node, keys[node])
            if isinstance(site, Site):
                sites.append(site)
            elif _is_norm(node):  # most other values are not meant for a linear at all
                yield site
        if self._chosen is None and sites:  # on a float64 twin the same is applied, not chosen anew
            self._chosen = choose(ir, sites, self.samples)
        chosen = self._chosen or {}
        by_key = {key: node for node, key in keys.items()}
        for site in sites:
            node = by_key[site.key]
            if site.key in chosen:
                yield Match(node, (node, *(each.node for each, _ in site.readers)), chosen[site.key])
            else:
                yield NearMiss(_PATTERN, node, f"no factor leaves less than {site.left:g} of the rounding error")

    def _site(self, ir: Program, node: Node, key: str) -> Site | NearMiss:
        readers = readers_of(ir, node)
        if isinstance(readers, tuple):
            return NearMiss(_PATTERN, *readers)
        assert self.scheme is not None
        rules = ((each, quantized_rule(self.scheme, each, self.keep)) for each in readers.projections)
        quantized = tuple((each, rule) for each, rule in rules if rule is not None)
        if not quantized:
            return NearMiss(_PATTERN, node, "nothing that reads it is quantized")
        channels = channels_of(self.ranges, key)
        if channels is None:
            return NearMiss(_PATTERN, node, "the ranges of its channels were not measured")
        shift = dialect.op_name(node) == _LAYER_NORM and self.options.shift
        return Site(
            key, quantized, *channels, left=LEFT if _is_norm(node) else LEFT_BY_PRODUCT,
            may_shift=shift and not any(_no_shift(ir, each) for each in readers.projections),
        )  # fmt: skip

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Choose once, then apply one by one: calls stay the nodes that they are."""
        found = list(self.find(ir))
        misses = [each for each in found if isinstance(each, NearMiss)]
        matches = [each for each in found if isinstance(each, Match)]
        return [self.apply(ir, match) for match in matches[:limit]], misses

    def apply(self, ir: Program, match: Match) -> Change:
        calls, stored = len(ir.calls()), parameters_stored(ir)
        where = [provenance.module_path(each) for each in match.nodes]
        _scale(ir, match.node, match.data)
        shifted = "factor and shift" if match.data.shift is not None else "factor"
        return Change(
            what=f"a {shifted} a channel moved from {dialect.plain_name(match.node)} into its readers",
            where=tuple(dict.fromkeys(where)), saved_nodes=calls - len(ir.calls()),
            saved_parameters=stored - parameters_stored(ir),
        )  # fmt: skip


def smoothed_channels(ir: Program) -> Wanted:
    """Which values the ranges of single channels are wanted of, for smoothing."""
    values = {node for node in _values(ir) if not isinstance(readers_of(ir, node), tuple)}
    return lambda node: Want(histogram=False, channel_axis=node.meta["val"].ndim - 1) if node in values else None


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


def _scale(ir: Program, node: Node, migration: Migration) -> None:
    readers = readers_of(ir, node)
    assert isinstance(readers, Readers)
    for each in readers.projections:
        weight, bias = behind_affine(ir, each, migration.factor, migration.shift)
        with_weights(ir, each, weight, bias, suffix="smoothed")
    # What lies between computes something else now; a value of the captured graph is computed by the readers only.
    users = dict.fromkeys(user for each in (node, *readers.passed) for user in each.users)
    last = next(user for user in reversed(users) if user not in readers.passed)
    if _is_norm(node):
        _narrow_norm(ir, node, migration)
        restamp((node, *readers.passed), value_of=last, decision=SMOOTHED)
    else:
        restamp((_product(ir, node, migration), *readers.passed), value_of=last, decision=SMOOTHED)


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
