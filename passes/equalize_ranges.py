"""equalize-ranges: unlike channels between two projections are made alike, in the weights before and behind them.

Before → after::

    %1 = conv2d(x, W, b)                   %1 = conv2d(x, W / s, b / s)        s along the output channels
    %2 = relu(%1)                   →      %2 = relu(%1)
    %3 = conv2d(%2, V, c)                  %3 = conv2d(%2, V · s, c)           s along the input channels

    %1 = linear(x, W, b)                   values v of %1: W / s, b / s
    %2 = scaled_dot_product_attention(     %2 = scaled_dot_product_attention(
             q, k, v)               →               q, k, v)
    %3 = linear(%2, V, c)                  %3 = linear(%2, V · s, c)

One scale rounds the whole value between. Merged branches and folded norms leave channels whose ranges are a hundred
times apart, so that most get few levels.

Equation: ``V f(W x + b) = (V · s) f((W x + b) / s)`` for every ``f`` with ``f(c · x) = c · f(x)``, c > 0: nothing, a
rectifier without a ceiling, a maximum over neighbours, an attention in its values. Factors are the ones whose rounded
readers err least on samples (``passes/quantization/migration``).

Does not apply when: the value has another reader; what lies between is another function (a relu6 has a ceiling, a GELU
bends); a weight is computed, stored in half precision, or shared; channels have no measured range; nothing tried
leaves less than nine tenths of the error.

Numerical effect: exact up to rounding of the weights.
Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1 (cross-layer equalization).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from vlexport.calibration.collect import Want, Wanted
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.base import NearMiss
from vlexport.passes.projections.projection import (
    PROJECTIONS,
    Projection,
    behind_affine,
    projection_of,
    why_kept,
)
from vlexport.passes.quantization.even_channels import EvenChannels, Moved, Place
from vlexport.passes.quantization.migration import Migration
from vlexport.passes.quantization.producers import ATTENTION, SCALING, VIEWS, Producer, producer_of
from vlexport.passes.quantization.rescale import divided, restamp, with_weights

_PATTERN = "projection → quantized readers"
EQUALIZED = "equalized"
"""What is noted on a projection whose channels were looked at: the choice is made once."""


@dataclass(frozen=True, eq=False)
class _Chain:
    """A value, who makes its channels, and all that read them."""

    value: Node
    axis: int
    producer: Producer
    readers: tuple[Projection, ...]


class EqualizeRanges(EvenChannels):
    """Unlike channels between two projections are made alike, in the weights before and behind them."""

    name: ClassVar[str] = "equalize-ranges"
    pattern: ClassVar[str] = _PATTERN

    def places(self, ir: Program, keys: Mapping[Node, str]) -> Iterator[Place | NearMiss]:
        """Values between two projections."""
        for found in _chains(ir):
            if isinstance(found, NearMiss):
                yield found
            elif provenance.decision(found.value) != EQUALIZED:
                site = self.site(keys[found.value], found.readers)
                nodes = (found.producer.projection.node, *found.producer.between, *(r.node for r in found.readers))
                yield (
                    NearMiss(_PATTERN, found.value, site) if isinstance(site, str)
                    else Place(site, found.value, tuple(dict.fromkeys(nodes)), found)
                )  # fmt: skip

    def rewrite(self, ir: Program, place: Place, migration: Migration) -> tuple[str, Mapping[Node, Moved]]:
        """The factor goes into the weights on either side."""
        chain: _Chain = place.data
        before, behind = (dialect.plain_name(each.node) for each in (chain.producer.projection, chain.readers[0]))
        moved = _equalize(ir, chain, migration)
        return f"a factor a channel moved from {before} into {behind}", moved


def equalized_channels(ir: Program) -> Wanted:
    """Which values the ranges of single channels are wanted of, for equalization."""
    chains = [each for each in _chains(ir) if isinstance(each, _Chain)]
    axes = {node: each.axis for each in chains for node in (each.value, *_alike(each))}
    return lambda node: Want(histogram=False, channel_axis=axes[node]) if node in axes else None


def _chains(ir: Program) -> Iterator[_Chain | NearMiss]:
    for value in ir.calls():
        if dialect.op_name(value) not in (*PROJECTIONS, *SCALING, ATTENTION, *VIEWS) or not value.users:
            continue
        readers = [projection_of(ir, user) for user in value.users]
        named = [each for each in readers if isinstance(each, Projection) and each.operand(each.x) is value]
        if not named:
            continue
        axes = {1 if each.is_convolution else value.meta["val"].ndim - 1 for each in named}
        producer = producer_of(ir, value, min(axes))
        if not producer:
            continue
        if isinstance(producer, str):
            yield NearMiss(_PATTERN, value, producer)
        elif len(named) < len(value.users) or len(axes) > 1:
            yield NearMiss(_PATTERN, value, "not all that reads it are projections over the same channels")
        elif reason := next(filter(None, (why_kept(ir, each) for each in named)), ""):
            yield NearMiss(_PATTERN, value, reason)
        else:
            yield _Chain(value, axes.pop(), producer, tuple(named))


def _alike(chain: _Chain) -> tuple[Node, ...]:
    """Values before that of a chain whose channels are the same ones, on the same axis."""
    before = dict.fromkeys((chain.producer.projection.node, *chain.producer.between))
    return tuple(before) if all(dialect.op_name(each) in (*PROJECTIONS, *SCALING) for each in before) else ()


def _equalize(ir: Program, chain: _Chain, migration: Migration) -> dict[Node, Moved]:
    producer = chain.producer
    weight, bias = divided(ir, producer.projection, producer.factors(migration.factor))
    with_weights(ir, producer.projection, weight, bias, suffix="equalized")
    for each in chain.readers:
        weight, _ = behind_affine(ir, each, migration.factor, None)
        with_weights(ir, each, weight, None, suffix="equalized")
    # A value of the captured graph is computed by the readers only.
    between = dict.fromkeys((producer.projection.node, *producer.between, chain.value))
    restamp(between, value_of=chain.readers[-1].node, decision=EQUALIZED)
    alike = {chain.value, *_alike(chain)}
    return {node: Moved(node, migration.factor if node in alike else None) for node in between}
