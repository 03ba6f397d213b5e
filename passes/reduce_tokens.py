"""reduce-tokens: a plain vision transformer goes on with fewer tokens, chosen or merged by what it attends to.

Before → after (evit:keep=0.7 in a block of a ViT with 196 patches)::

    %1 = attention(q, k, v)                    %1 = attention(q, k, v)
    %2 = add(x, proj(%1))   [b,197,c]    →     %2 = add(x, proj(%1))                          [b,197,c]
    %3 = add(%2, mlp(norm(%2)))                %3 = topk(mean(softmax(q[:,:,:1]·kᵀ))[1:], 138)
                                               %4 = cat([%2[:, :1], gather(%2[:, 1:], %3), Σ others])
                                               %5 = add(%4, mlp(norm(%4)))                    [b,140,c]

Methods (``--tokens METHOD:key=value,…``): ``evit`` keeps the patches that the class token attends to most and fuses the
rest into one; ``random`` keeps a seeded choice, the same for every sample: what any method must beat.

Equation: see ``passes/tokens/evit`` and its neighbours. Blocks are attentions over one residual stream; which tokens
are protected (class, distillation, registers) is read off where the stream begins. Counts are constants: no sort,
scatter or nonzero, and attention stays one operator.

Does not apply when: there is no such stream (windows, grids, causal attention); an attention has a mask or a bias for
each pair of tokens; positions enter in every block (rotary embeddings); tokens are needed on their grid between blocks;
evit finds no class token. What needs all tokens behind the last block (a dense head, an output of all tokens) gets them
back: each former token is the one that it went into (``unmerge``).

Numerical effect: approximate. Accuracy is for the gates to judge, on the user's data (``--max-drop``); the pass itself
promises no more than finite outputs whose cosine with the former ones is at least ``min_cosine``.

Source: Liang et al., Not All Patches are What You Need, ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from vlexport.core.artifact import Frozen
from vlexport.core.errors import UsageError
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, SampledPass, Stage
from vlexport.passes.statistic import Statistic
from vlexport.passes.tokens.blocks import PATTERN, Block, Encoder, find_encoder
from vlexport.passes.tokens.evit import Evit
from vlexport.passes.tokens.pick import Pick
from vlexport.passes.tokens.sweep import Reduction, Sweep, refused


def _plus(value: object) -> object:
    return tuple(part.strip() for part in value.split("+")) if isinstance(value, str) else value


class ReduceTokensOptions(Frozen):
    """Options of reduce-tokens; --tokens METHOD:key=value,… gives them.

    Attributes:
        method: How tokens are reduced; --tokens names it.
        keep: Share of the patch tokens that stay at each layer (evit, random).
        layers: Blocks where it is done, counted from 1 and joined by +; none means a quarter, half and three quarters
            of the way (4+7+10 of 12).
        fuse: The tokens that do not stay become one (evit); the authors' code leaves that out, their paper does not.
        seed: Of the choice (random).
        unmerge: What needs all tokens gets them back; else such a model is refused.
        min_cosine: Least cosine of every output with what it was before. Untrained weights are far off at any rate, so
            nothing more is promised than the gates on your data judge.
    """

    method: Literal["evit", "random"] = "evit"
    keep: float = Field(default=0.7, gt=0.0, le=1.0)
    layers: Annotated[tuple[int, ...], BeforeValidator(_plus)] = ()
    fuse: bool = True
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    unmerge: bool = True
    min_cosine: float = Field(default=0.0, ge=-1.0, le=1.0)


class ReduceTokens(SampledPass[Program]):
    """A plain vision transformer goes on with fewer tokens."""

    name: ClassVar[str] = "reduce-tokens"
    stage: ClassVar[Stage] = "tokens"
    effect: ClassVar[Effect] = "approximate"
    Options: ClassVar[type[Frozen]] = ReduceTokensOptions
    options: ReduceTokensOptions

    @property
    def statistic(self) -> Statistic:
        """Cosine, leniently."""
        hint = f"reduce fewer tokens or later, or accept more (--set {self.name}.min_cosine=…)"
        return Statistic("cosine", self.options.min_cosine, agreement=0.0, hint=hint)

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """One match per layer, and why other attentions are no blocks.

        Raises:
            UsageError: VLX0703 for layers or rates that the model does not have.
        """
        encoder, misses = find_encoder(ir)
        if encoder is not None and not _is_done(encoder):
            for each in self._planned(encoder):
                yield Match(each.block.joined, (each.block.joined, each.block.attention), (encoder, each))
        yield from misses

    def apply(self, ir: Program, match: Match) -> Change:
        """Reduce at one block, and derive every shape behind it."""
        encoder, reduction = match.data
        (change,) = self._swept(ir, encoder, [reduction])
        return change

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Reduce at all blocks in one walk: shapes behind the last are then derived once.

        Raises:
            InputError: VLX0411 for a model without tokens to reduce, with the reason.
        """
        encoder, misses = find_encoder(ir)
        if encoder is None:
            reason = misses[0].reason if misses else f"the model has no {PATTERN}"
            raise refused(misses[0].node if misses else ir.output, reason)
        if _is_done(encoder):
            return [], misses
        return self._swept(ir, encoder, self._planned(encoder)[:limit]), misses

    def _swept(self, ir: Program, encoder: Encoder, reductions: list[Reduction]) -> list[Change]:
        return Sweep(ir, reductions, encoder.protected, encoder.tokens, self.options.unmerge).run()

    def _planned(self, encoder: Encoder) -> list[Reduction]:
        """What to do at which block."""
        options = self.options
        if options.method == "evit" and not encoder.protected:
            raise refused(
                encoder.blocks[0].attention, "evit reads the class token's attention, and there is no class token"
            )
        count = encoder.tokens
        made: list[Reduction] = []
        for block in self._layers(encoder):
            patches = count - encoder.protected
            keep = math.ceil(options.keep * patches)
            if keep >= patches:
                continue
            if options.method == "evit":
                made.append(Evit(block, keep, options.fuse))
            else:
                made.append(Pick(block, keep, options.seed + block.number))
            count = encoder.protected + keep + (options.fuse and options.method == "evit")
        return made

    def _layers(self, encoder: Encoder) -> list[Block]:
        total = len(encoder.blocks)
        wanted = self.options.layers or tuple(sorted({total * i // 4 + 1 for i in (1, 2, 3)}))
        for number in wanted:
            if not 1 <= number <= total:
                raise UsageError(
                    "VLX0703", f"--tokens {self.options.method}: there is no layer {number}", where="--tokens",
                    hint=f"the model has layers 1 to {total}",
                )  # fmt: skip
        return [block for block in encoder.blocks if block.number in wanted]


def _is_done(encoder: Encoder) -> bool:
    """Whether tokens were reduced before: doing it again would drop more."""
    return any(provenance.decision(block.attention) for block in encoder.blocks)


