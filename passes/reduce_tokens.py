"""reduce-tokens: a plain vision transformer goes on with fewer tokens, chosen or merged by what it attends to.

Before → after (evit:keep=0.7 in a block of a ViT with 196 patches)::

    %1 = attention(q, k, v)                    %1 = attention(q, k, v)
    %2 = add(x, proj(%1))   [b,197,c]    →     %2 = add(x, proj(%1))                          [b,197,c]
    %3 = add(%2, mlp(norm(%2)))                %3 = topk(mean(softmax(q[:,:,:1]·kᵀ))[1:], 138)
                                               %4 = cat([%2[:, :1], gather(%2[:, 1:], %3), Σ others])
                                               %5 = add(%4, mlp(norm(%4)))                    [b,140,c]

Methods (``--tokens METHOD:key=value,…``): ``evit`` keeps the patches that the class token attends to most and fuses the
rest into one, or into the kept ones most like it; ``tome`` merges the r tokens most alike in every block; ``mctf``
merges by similarity, information and size, and attends one step ahead; ``cls`` gives out fewer patches behind the
encoder, for what reads them; ``random`` keeps a seeded choice, the same for every sample: what any method must beat.

Equation: see ``passes/tokens/evit`` and its neighbours. Blocks are attentions over one residual stream; which tokens
are protected (class, distillation, registers) is read off where the stream begins. Counts are constants: no sort,
scatter or nonzero. Attention stays one operator, but for mctf: it merges the matrix itself, which is written out.

Does not apply when: there is no such stream (windows, grids, causal attention); an attention has a mask or a bias for
each pair of tokens; positions enter in every block (rotary embeddings); tokens are needed on their grid between blocks;
evit finds no class token. What needs all tokens behind the last block (a dense head, an output of all tokens) gets them
back: each former token is the one that it went into (``unmerge``).

Numerical effect: approximate. Accuracy is for the gates to judge, on the user's data (``--max-drop``); the pass itself
promises no more than finite outputs whose cosine with the former ones is at least ``min_cosine``.

Source: Liang et al. (EViT), ICLR 2022; Bolya et al. (ToMe), ICLR 2023; Lee et al. (MCTF), CVPR 2024; Wei et al. (TPS:
squeezing), CVPR 2023; VTC-CLS, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from vlexport.core.artifact import Frozen
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Effect, Match, NearMiss, SampledPass, Stage
from vlexport.passes.statistic import Statistic
from vlexport.passes.tokens.blocks import PATTERN, Encoder, find_encoder
from vlexport.passes.tokens.options import ReduceTokensOptions
from vlexport.passes.tokens.plan import plan
from vlexport.passes.tokens.sweep import MARK, Reduction, Sweep, refused


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
        fewer = self.options.method == "cls"
        return Statistic("cosine", self.options.min_cosine, agreement=0.0, hint=hint, fewer_rows=fewer)

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        """One match per layer, why other attentions are no blocks, and layers where nothing is left to do.

        Raises:
            UsageError: VLX0703 for layers or rates that the model does not have.
            InputError: VLX0411 where the method needs a class token.
        """
        if is_done(ir):
            return
        encoder, misses = find_encoder(ir)
        yield from misses
        if encoder is None:
            return
        reductions, idle = plan(encoder, self.options)
        yield from idle
        for each in reductions:
            yield Match(each.block.joined, (each.block.joined, each.block.attention), (encoder, each))

    def apply(self, ir: Program, match: Match) -> Change:
        """Reduce at one block, and derive every shape behind it."""
        encoder, reduction = match.data
        (change,) = self._swept(ir, encoder, [reduction])
        return change

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        """Reduce at all blocks in one walk: counts follow from one another, and shapes are derived once.

        Raises:
            UsageError: VLX0703 for layers or rates that the model does not have.
            InputError: VLX0411 for a model without tokens to reduce, with the reason.
        """
        found = list(self.find(ir))
        misses = [each for each in found if isinstance(each, NearMiss)]
        matches = [each for each in found if isinstance(each, Match)]
        if not found and not is_done(ir):
            raise refused(ir.output, f"the model has no {PATTERN}", hint="leave --tokens out")
        if not matches and misses and misses[0].pattern == PATTERN:
            raise refused(misses[0].node, misses[0].reason)
        if not matches[:limit]:
            return [], misses
        encoder = matches[0].data[0]
        return self._swept(ir, encoder, [match.data[1] for match in matches[:limit]]), misses

    def _swept(self, ir: Program, encoder: Encoder, reductions: list[Reduction]) -> list[Change]:
        fewer = self.options.method == "cls"
        return Sweep(ir, reductions, encoder.protected, encoder.tokens, self.options.unmerge, fewer).run()


def is_done(ir: Program) -> bool:
    """Whether tokens were reduced before: doing it again would drop more."""
    return any(provenance.decision(node).startswith(MARK) for node in ir.calls())
