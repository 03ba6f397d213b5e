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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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
from vlexport.passes.projections.projection import (
    PROJECTIONS,
    Projection,
    behind_affine,
    projection_of,
    why_kept,
)
from vlexport.passes.quantization.migration import Migration, Site, channels_of, choose, quantized_rule
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


class EqualizeRanges(Pass[Program]):
    """Unlike channels between two projections are made alike, in the weights before and behind them."""

    name: ClassVar[str] = "equalize-ranges"
    stage: ClassVar[Stage] = "smooth"
    effect: ClassVar[Effect] = "exact"

    def __init__(
        self,
        options: Frozen | None = None,
        *,
        scheme: QuantScheme | None = None,
        ranges: Mapping[str, ValueEntry] | None = None,
        samples: Sequence[tuple[Tensor, ...]] = (),
        keep: Sequence[str] = (),
    ) -> None:
        """Without a scheme, ranges of channels and samples, nothing is found; arguments as of smooth-activations."""
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
        sites: list[tuple[Site, _Chain]] = []
        for found in _chains(ir):
            if isinstance(found, NearMiss):
                yield found
                continue
            if provenance.decision(found.value) == EQUALIZED:
                continue
            rules = ((each, quantized_rule(self.scheme, each, self.keep)) for each in found.readers)
            quantized = tuple((each, rule) for each, rule in rules if rule is not None)
            channels = channels_of(self.ranges, keys[found.value])
            if not quantized:
                yield NearMiss(_PATTERN, found.value, "nothing that reads it is quantized")
            elif channels is None:
                yield NearMiss(_PATTERN, found.value, "the ranges of its channels were not measured")
            else:
                sites.append((Site(keys[found.value], quantized, *channels), found))
        if self._chosen is None and sites:  # on a float64 twin the same is applied, not chosen anew
            self._chosen = choose(ir, [site for site, _ in sites], self.samples)
        for site, chain in sites:
            migration = (self._chosen or {}).get(site.key)
            if migration is None:
                why = f"no factor leaves less than {site.left:g} of the rounding error"
                yield NearMiss(_PATTERN, chain.value, why)
                continue
            nodes = (chain.producer.projection.node, *chain.producer.between, *(each.node for each in chain.readers))
            yield Match(chain.value, tuple(dict.fromkeys(nodes)), (chain, migration))

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Choose once, then apply one by one: calls stay the nodes that they are."""
        found = list(self.find(ir))
        misses = [each for each in found if isinstance(each, NearMiss)]
        matches = [each for each in found if isinstance(each, Match)]
        return [self.apply(ir, match) for match in matches[:limit]], misses

    def apply(self, ir: Program, match: Match) -> Change:
        stored = parameters_stored(ir)
        chain = match.data[0]
        where = [provenance.module_path(each) for each in match.nodes]
        _equalize(ir, chain, match.data[1])
        before, behind = (dialect.plain_name(each.node) for each in (chain.producer.projection, chain.readers[0]))
        return Change(
            what=f"a factor a channel moved from {before} into {behind}", where=tuple(dict.fromkeys(where)),
            saved_parameters=stored - parameters_stored(ir),
        )  # fmt: skip


def equalized_channels(ir: Program) -> Wanted:
    """Which values the ranges of single channels are wanted of, for equalization."""
    axes = {each.value: each.axis for each in _chains(ir) if isinstance(each, _Chain)}
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


def _equalize(ir: Program, chain: _Chain, migration: Migration) -> None:
    producer = chain.producer
    weight, bias = divided(ir, producer.projection, producer.factors(migration.factor))
    with_weights(ir, producer.projection, weight, bias, suffix="equalized")
    for each in chain.readers:
        weight, _ = behind_affine(ir, each, migration.factor, None)
        with_weights(ir, each, weight, None, suffix="equalized")
    # A value of the captured graph is computed by the readers only.
    between = dict.fromkeys((producer.projection.node, *producer.between, chain.value))
    restamp(between, value_of=chain.readers[-1].node, decision=EQUALIZED)
