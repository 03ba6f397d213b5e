"""freeze-tokens: a model that prunes its own tokens by masks gets constant token counts.

Before → after (one mask a sample; N = 196 tokens, K = 120)::

    %1 = gt(score, 0.5)              [196]       %1 = gt(score, 0.5)                      [b,196]
    %2 = index(x, [None, %1])        [1,u0,64]   %2 = topk(%1·196 − [0..195], 120)        [b,120]
    %3 = attention(%2, %2, %2)       [1,u0,64]   %3 = gather(x, %2's places)              [b,120,64]
    %4 = mean(%3, 1)                 [1,64]      %4 = attention(%3, %3, %3, mask=%2 > 0)  [b,120,64]
                                                 %5 = sum(%4 where %2 > 0) / count        [b,64]

Equation: ``key = live·N − index`` is a whole number that no two tokens share, so the K largest are the live tokens in
their order, then others. Places without a live token repeat the first live one; they have weight ``exp(−∞) = 0`` in
every softmax over tokens, and are left out of sums, means and products over tokens.

K of each selection is the percentile of its counts over calibration samples, never below 2, or the largest that a
budget of MACs allows. Boolean masks as an index, ``nonzero``, ``masked_select``, ``where`` with one argument and
``repeat_interleave`` by a mask are selections; what lies behind a slot axis is followed by one table of rules.

A Program without such a selection may hold dense masks: ``x · mask``, with the scores of keys that are left out at −∞
or −1e4. Rows that are left out are not computed where bounds of what they hold
(:mod:`~vlexport.passes.tokens.left_out`) prove that no output depends on them; each further mask has to lie inside the
one before.

Does not apply when: the model is not saved at batch 1 with fixed sizes; a count is decided by more than a mask
(``unique``, ``item``); tokens are cut, ordered or convolved by their place; two selections meet; an output has one row
a token; the mask does not depend on the input; a row that a dense mask leaves out is read, or a later one may bring it
back.

Numerical effect: samples with at most K live tokens are computed exactly but for rounding: ``max|a−b| / max|b|`` is at
most 1e-4 on them. Of a sample with more, the tokens of the lowest score (without a score: the last ones) are left out:
nothing is promised of it, the gate sets it aside and counts it, and ``overflow=output`` says how many tokens were. A
sample of which no token survives, which a model that selects refuses, gives a finite answer of no meaning: that of its
first token. Under a dense mask it is computed as the model does, or NaN both times.

Source: our own. The models: threshold pruning as in Learned Token Pruning (Kim et al., 2022) and A-ViT (Yin et al.,
2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.fx import Node
from typing_extensions import Self

from vlexport.core.artifact import Frozen
from vlexport.core.errors import CapabilityError, UsageError
from vlexport.ir import provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, SampledPass, Stage
from vlexport.passes.statistic import Statistic
from vlexport.passes.tokens.counts import LEAST_PLACES, Counts, count, rows_of
from vlexport.passes.tokens.dense_sites import dense_sites
from vlexport.passes.tokens.freezing import freeze, is_single, masks_in, require_single
from vlexport.passes.tokens.values import CannotFreeze

TOLERANCE = 1e-4
"""Largest ``max|a−b| / max|b|`` on a sample with at most K live tokens."""
_PATTERN = "selection whose length the data decides"
_DENSE = "mask over tokens that stay in their places"
_WITNESSES = 2


class FreezeTokensOptions(Frozen):
    """Options of freeze-tokens.

    Attributes:
        percentile: So many per cent of the calibration samples find a place for all their tokens; 95 unless given.
        macs: Instead of a percentile, the most MACs of one sample, in units of 1e9; the highest percentile that keeps
            to it is taken.
        key: Which tokens stay where there are more than K: those of the highest score, or the first in order.
        overflow: output adds the output truncated_tokens, int64: how many tokens of a sample found no place.
        batch: How many samples the frozen model takes at once, each choosing for itself, 1024 at most; dynamic makes
            it a dim.
    """

    percentile: float | None = Field(default=None, gt=0.0, le=100.0)
    macs: float | None = Field(default=None, gt=0.0)
    key: Literal["score", "order"] = "score"
    overflow: Literal["none", "output"] = "none"
    batch: Literal["dynamic"] | Annotated[int, Field(ge=1, le=1024)] = 1

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.percentile is not None and self.macs is not None:
            raise ValueError("percentile and macs both decide how many tokens stay: leave one of the two out")
        return self


class FreezeTokens(SampledPass[Program]):
    """A model that prunes its own tokens by masks gets constant token counts."""

    name: ClassVar[str] = "freeze-tokens"
    stage: ClassVar[Stage] = "tokens"
    effect: ClassVar[Effect] = "approximate"
    Options: ClassVar[type[Frozen]] = FreezeTokensOptions
    options: FreezeTokensOptions

    _dense: bool = False
    _masks: tuple[int, ...] = ()
    _places: tuple[int, ...] = ()
    _witnesses: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def statistic(self) -> Statistic:
        """Equal but for rounding, on samples that find a place for all their tokens."""
        return Statistic("max_relative", TOLERANCE, agreement=1.0, hint="please report this, with the model's source")

    @property
    def adds(self) -> int:
        """The count of truncated tokens, where it is asked for."""
        return int(self.options.overflow == "output" and bool(self._places))

    @property
    def witnesses(self) -> Sequence[tuple[Tensor, ...]]:
        """Calibration samples that find a place for all their tokens."""
        return self._witnesses

    def unpromised(self, ir: Program, values: tuple[Any, ...]) -> tuple[int, ...]:
        """The one row of a probe, where it has more live tokens than places."""
        nodes = list(ir.graph.nodes)
        masks = [nodes[mask] for mask in self._masks]
        counts = count(ir, masks, [values], empty=True).by_mask if masks else {}
        over = any(counts[mask][0] > places for mask, places in zip(masks, self._places, strict=True))
        return (0,) if over else ()

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """Every selection; a near miss instead where the Program cannot be frozen. Nothing is counted for that.

        Dense masks are looked for where no length is decided by the data; one that is refused hinders no other.
        """
        try:
            selections = masks_in(ir)
            if selections:
                require_single(ir)
                sizes = dict.fromkeys(selections.values(), 2)
                self._frozen(ir.copy(), _positions(ir, sizes), list(sizes.values()))
        except CannotFreeze as error:
            yield NearMiss(_PATTERN, _at(ir, error), error.reason)
            return
        for node, mask in selections.items():
            yield Match(node, (node,), mask)
        if not selections and is_single(ir):
            found = dense_sites(ir)
            try:  # they are found at batch 1
                self._frozen(ir.copy(), _positions(ir, found.masks), [LEAST_PLACES] * len(found.masks))
            except CannotFreeze as error:
                yield NearMiss(_DENSE, _at(ir, error), error.reason)
                return
            for mask in found.masks:
                yield Match(mask, (mask,), mask)
            for node, reason in found.refused:
                yield NearMiss(_DENSE, node, reason)

    def apply(self, ir: Program, match: Match) -> Change:
        """Freeze everything: one selection alone would leave a graph of two kinds of sizes."""
        changes, _ = self.run(ir)
        return changes[0]

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Count, decide, and rebuild the Program once, as a whole: what lies behind a selection changes with it.

        Raises:
            UsageError: VLX0413 for a Program without such a selection, VLX0703 for a budget that cannot be kept.
            CapabilityError: VLX0412 where no rule is known for something behind a selection.
            DataError: VLX0216, VLX0217 as :func:`~vlexport.passes.tokens.counts.count`.
        """
        if limit == 0 or _is_frozen(ir):
            return [], []
        found = list(self.find(ir))
        misses = [each for each in found if isinstance(each, NearMiss)]
        if misses and len(misses) == len(found):
            raise CapabilityError(
                "VLX0412", f"the model's tokens cannot be frozen: {misses[0].reason}",
                where=provenance.describe(misses[0].node),
                hint="rewrite that line, or build without --tokens freeze",
            )  # fmt: skip
        if not found:
            raise UsageError(
                "VLX0413", "the model has no selection of tokens whose length the data decides", where="--tokens",
                hint="leave --tokens freeze out; for a plain ViT, see --tokens evit or tome; masks that leave every "
                "token in its place are found in models saved at batch 1 (vlexport.save(…, dynamic=False))",
            )  # fmt: skip
        selections = {each.node: each.data for each in found if isinstance(each, Match)}
        masks = list(dict.fromkeys(selections.values()))
        self._dense = not masks_in(ir)
        counts = count(ir, masks, self.samples, empty=self._dense)
        places = self._decided(ir, masks, counts)
        sizes = [str(_tokens(mask)) for mask in selections.values()]
        kept = dict(zip(masks, places, strict=True))
        where = [provenance.module_path(node) for node in selections]
        chosen = [kept[mask] for mask in selections.values()]
        self._masks, self._places = tuple(_positions(ir, masks)), tuple(places)
        self._witnesses = self._inside(counts, places)
        before, calls = cost(ir), len(ir.calls())
        self._frozen(ir, _positions(ir, masks), places)
        for node in ir.calls("aten.topk.default"):
            provenance.remember(node, "frozen")
        after = cost(ir)
        changes = [
            Change(what=f"{k} of {n} tokens kept", where=(path,))
            for k, n, path in zip(chosen, sizes, where, strict=True)
        ]
        changes[0] = Change(
            what=changes[0].what, where=changes[0].where, saved_nodes=calls - len(ir.calls()),
            saved_parameters=before.parameters - after.parameters, saved_macs=before.macs - after.macs,
        )  # fmt: skip
        return changes, misses

    def _frozen(self, ir: Program, masks: Sequence[int], places: Sequence[int]) -> Program:
        """``ir`` or a copy of it, frozen; masks by their position in the graph."""
        nodes = list(ir.graph.nodes)
        options = self.options
        dense = [nodes[mask] for mask in masks] if not masks_in(ir) else []
        freeze(
            ir,
            {nodes[mask]: k for mask, k in zip(masks, places, strict=True)},
            batch=None if options.batch == "dynamic" else options.batch,
            by_score=options.key == "score",
            overflow=options.overflow == "output",
            dense=dense,
        )
        return ir

    def _decided(self, ir: Program, masks: Sequence[Node], counts: Counts) -> list[int]:
        """K of every mask."""
        positions = _positions(ir, masks)
        if self.options.macs is None:
            return _places_at(masks, counts, 95.0 if self.options.percentile is None else self.options.percentile)
        low, high = 0, 100
        known: dict[tuple[int, ...], int] = {}
        while low < high:  # the highest percentile that keeps to the budget
            middle = (low + high + 1) // 2
            places = tuple(_places_at(masks, counts, float(middle)))
            if places not in known:
                known[places] = cost(self._frozen(ir.copy(), positions, places)).macs
            fits = known[places] <= self.options.macs * 1e9
            low, high = (middle, high) if fits else (low, middle - 1)
        if not low:
            least = cost(self._frozen(ir.copy(), positions, _places_at(masks, counts, 1.0))).macs / 1e9
            raise UsageError(
                "VLX0703", f"--tokens freeze: macs={self.options.macs:g} cannot be kept", where="--tokens",
                hint=f"with the fewest tokens that a sample kept it takes {least:.3g}; give more, or a percentile",
            )  # fmt: skip
        return _places_at(masks, counts, float(low))

    def _inside(self, counts: Counts, places: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
        """The first samples that find a place for all their tokens."""
        rows = list(zip(*counts.by_mask.values(), strict=True))
        fits = [i for i, row in enumerate(rows) if all(n <= k for n, k in zip(row, places, strict=True))]
        live = [i for i in fits if all(counts.by_mask[mask][i] > 0 for mask in counts.by_mask)]
        wanted = (live or (fits if self._dense else []))[:_WITNESSES]
        found = []
        if wanted:
            for position, (_, values) in enumerate(rows_of(self.samples)):
                if position in wanted:
                    found.append(values)
                if position >= wanted[-1]:
                    break
        return tuple(found)


def _positions(ir: Program, masks: Iterable[Node]) -> list[int]:
    """Where nodes stand in the graph; a copy has its own there."""
    order = {node: position for position, node in enumerate(ir.graph.nodes)}
    return [order[mask] for mask in masks]


def _places_at(masks: Sequence[Node], counts: Counts, percentile: float) -> list[int]:
    places = counts.places(percentile)
    return [places[mask] for mask in masks]


def _tokens(mask: Node) -> Any:
    size = mask.meta["val"].numel()
    return size if isinstance(size, int) else "the kept"


def _is_frozen(ir: Program) -> bool:
    return any(provenance.decision(node) == "frozen" for node in ir.calls("aten.topk.default"))


def _at(ir: Program, error: CannotFreeze) -> Node:
    """The node of ``ir`` at which a freeze of its copy failed."""
    name = error.node.name if error.node is not None else ""
    return next((n for n in ir.graph.nodes if n.name == name), ir.output)
