"""migration: which scale, and which shift, a channel should lose so that rounding costs its readers least.

A value whose channels span unlike ranges is rounded at one scale for all of them: most channels get few of the levels.
Where something before it can divide each channel by a factor, and its readers multiply their weights by it, the same
is computed and the levels are shared fairly. Factors that do the whole work make unlike weights instead. So some
strengths are tried between none and all, and the one is taken whose rounded readers err least on samples::

    factor = reach(x)^a / reach(w)^(1-a)       a of STRENGTHS;  shift = middle of the channel's range, or none

``reach`` is the largest magnitude of a channel behind the shift, and of the weights that meet it.
Source: Xiao et al. 2023, arXiv 2211.10438 (SmoothQuant); Li et al. 2023, arXiv 2212.08254 (RepQ-ViT: factor and shift
behind a LayerNorm); Nagel et al. 2019, arXiv 1906.04721 (equalization).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from vlexport.core.grids import GRIDS
from vlexport.core.scheme import LayerRule, QuantScheme, TensorRule
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.passes.projections.projection import Projection, along, for_inputs
from vlexport.passes.quantization.decide import scaling
from vlexport.passes.quantization.weights import rounded_weight

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
LEFT = 0.9
"""The error that is left, as a share of what it was, above which nothing is changed."""
LEFT_BY_PRODUCT = 0.5
"""The same where a multiplication a value has to be added: 3 dB are worth it."""
_WIDEST = 1e4
"""Factors lie within 1/this and this: the rest of a channel that hardly varies would be multiplied beyond its noise."""


@dataclass(frozen=True, eq=False)
class Migration:
    """What each channel is to lose: readers see ``(x - shift) / factor``.

    Attributes:
        factor: Float64, one a channel, positive.
        shift: Likewise; None for none.
        strength: Of :data:`STRENGTHS`.
    """

    factor: Tensor
    shift: Tensor | None
    strength: float


@dataclass(frozen=True, eq=False)
class Site:
    """A value whose channels could be scaled.

    Attributes:
        key: Names it among others.
        readers: Quantized calls that read its channels, with the rule for each.
        low: Least value of each channel over all samples, float64.
        high: Likewise the largest.
        may_shift: Whether what stands before it and all its readers can take a shift.
        left: The error that may be left at most, as a share of what it was; else nothing is changed.
    """

    key: str
    readers: tuple[tuple[Projection, LayerRule], ...]
    low: Tensor
    high: Tensor
    may_shift: bool = False
    left: float = LEFT


def choose(program: Program, sites: Sequence[Site], samples: Iterable[tuple[Tensor, ...]]) -> dict[str, Migration]:
    """The best migration of every site that gains by one.

    Args:
        program: In float32.
        sites: Where.
        samples: One tensor per input each, with batch dim; each is run once. Without any, nothing is chosen.
    """
    candidates = {site.key: list(_candidates(program, site)) for site in sites}
    errors: dict[str, list[float]] = {key: [0.0] * (1 + len(each)) for key, each in candidates.items()}
    scores = [_Score(program, site, rule, each, candidates[site.key]) for site in sites for each, rule in site.readers]
    by_node = {each.node: each for each in scores}
    inputs = {each.value for each in scores}
    for sample in samples:
        kept: dict[Node, Tensor] = {n: v for n, v in zip(program.placeholders, sample, strict=True) if n in inputs}

        def look(node: Node, value: Any, kept: dict[Node, Tensor] = kept) -> None:
            if node in inputs:
                kept[node] = value
            score = by_node.get(node)
            if score is not None:
                totals = errors[score.site.key]
                for i, error in enumerate(score.errors(kept[score.value])):
                    totals[i] += error

        program.run(*sample, observe=look)
    found = {}
    for site in sites:
        totals = errors[site.key]
        best = int(np.argmin(totals))
        if best and totals[best] < site.left * totals[0]:
            found[site.key] = candidates[site.key][best - 1]
    return found


def _candidates(program: Program, site: Site) -> Iterator[Migration]:
    shifts: list[Tensor | None] = [None]
    if site.may_shift:
        shifts.append((site.low + site.high) / 2)
    weights = torch.stack([_weight_reach(program, reader) for reader, _ in site.readers]).amax(0)
    for shift in shifts:
        offset = shift if shift is not None else torch.zeros_like(site.low)
        reach = torch.maximum((site.low - offset).abs(), (site.high - offset).abs())
        for strength in STRENGTHS:
            factor = reach**strength / weights ** (1.0 - strength)
            usable = torch.isfinite(factor) & (factor > 0.0)
            if not bool(usable.any()):
                continue
            middle = factor[usable].log().mean().exp()
            factor = torch.where(usable, factor / middle, torch.ones_like(factor)).clamp(1.0 / _WIDEST, _WIDEST)
            yield Migration(factor, shift, strength)


def _weight_reach(program: Program, reader: Projection) -> Tensor:
    """Largest magnitude of the weights that meet each input channel."""
    weight = reader.tensor(program).double().abs()
    size = weight.shape[reader.in_axis]
    if not reader.is_convolution:
        return weight.movedim(reader.in_axis, 0).reshape(size, -1).amax(1)
    groups = int(_operand(reader.node, "groups"))
    return weight.reshape(groups, weight.shape[0] // groups, size, -1).amax((1, 3)).reshape(-1)


def _operand(node: Node, name: str) -> Any:
    return dict(zip(dialect.operand_names(node), dialect.operands(node), strict=True))[name]


class _Score:
    """The error of one reader for every candidate of its site."""

    def __init__(
        self, program: Program, site: Site, rule: LayerRule, reader: Projection, candidates: Sequence[Migration]
    ) -> None:
        assert rule.activation is not None
        assert rule.weight is not None
        self.site, self.node, self.reader = site, reader.node, reader
        self.value: Node = reader.operand(reader.x)
        self.program = program
        self.axis = 1 if reader.is_convolution else -1
        self.weight = reader.tensor(program)
        one = torch.ones_like(site.low)
        self.tried = []
        for each in (Migration(one, None, 0.0), *candidates):
            scaled = (self.weight.double() * for_inputs(each.factor, reader, self.weight)).float()
            if reader.out_axis == 0:
                scaled = rounded_weight(scaled, rule.weight.type)
            self.tried.append((each, scaled, _range(site, each, rule.activation)))

    def errors(self, value: Tensor) -> Iterator[float]:
        """Of each candidate, nothing changed first: squared error of the result as a share of its square."""
        wanted = self._made(value, self.weight)
        size = float(wanted.double().square().sum()) or 1.0
        for each, weight, (scale, point) in self.tried:
            axis = self.axis % value.ndim
            factor = along(each.factor.float(), axis, value.ndim)
            moved, due = value, wanted
            if each.shift is not None:
                shift = along(each.shift.float(), axis, value.ndim)
                moved = value - shift
                due = wanted - self._made(shift.expand(*[1] * axis, -1, *value.shape[axis + 1 :]), self.weight)
            stored = torch.ops.vlexport.quantize.default(moved / factor, scale, point)
            found = self._made(torch.ops.vlexport.dequantize.default(stored, scale, point), weight)
            yield float((found - due).double().square().sum()) / size

    def _made(self, value: Tensor, weight: Tensor) -> Tensor:
        return self.reader.again(self.program, value, weight, with_bias=False)


def _range(site: Site, migration: Migration, rule: TensorRule) -> tuple[Tensor, Tensor]:
    offset = migration.shift if migration.shift is not None else torch.zeros_like(site.low)
    low, high = (site.low - offset) / migration.factor, (site.high - offset) / migration.factor
    scale, point = scaling(float(low.min()), float(high.max()), rule)
    kind: torch.dtype = getattr(torch, GRIDS[rule.type].dtype)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(point).to(kind)


def quantized_rule(scheme: QuantScheme, reader: Projection, keep: Sequence[str]) -> LayerRule | None:
    """How a projection will be quantized; None where it will not be, or has no weight that is."""
    rule = scheme.layer(dialect.plain_name(reader.node))
    if rule is None or rule.activation is None or rule.weight is None:
        return None
    return None if any(provenance.lies_in(reader.node, each) for each in keep) else rule


def channels_of(entries: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor] | None:
    """Least and largest value of each channel of a value, float64, or None where they were not measured."""
    entry = entries.get(key)
    if entry is None or entry.channels is None:
        return None
    return tuple(torch.tensor(each, dtype=torch.float64) for each in (entry.channels.low, entry.channels.high))  # type: ignore[return-value]
