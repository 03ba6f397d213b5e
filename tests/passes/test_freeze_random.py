"""freeze-tokens on random Programs: every sample with a place for all its tokens is computed as it was."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings

from tests.harness import one_thread
from tests.token_grammar import TOKENS, WIDTH, pruning_programs
from vlexport.ir.program import Program
from vlexport.passes.pipeline import verify
from vlexport.passes.tokens.counts import count
from vlexport.passes.tokens.freezing import freeze, masks_in

SAMPLES = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(11))
FLOAT32_TOLERANCE = 1e-4
"""Of the largest value, or of 1 where all are smaller: a mean of what was centred is rounding alone."""
_DYNAMIC = ("aten.nonzero.default", "aten.index.Tensor", "aten.masked_select.default", "aten._assert_scalar.default")


@settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(pruning_programs())
def test_every_sample_is_computed_as_it_was_when_all_its_tokens_find_a_place(program: Program) -> None:
    with one_thread():
        masks = list(dict.fromkeys(masks_in(program).values()))
        counts = count(program, masks, [(SAMPLES,)])
        whole = [row for row, kept in enumerate(zip(*counts.by_mask.values(), strict=True)) if all(kept)]
        wanted = torch.cat([program.run(SAMPLES[row : row + 1])[0] for row in whole])
        frozen = program.copy()
        here = dict(zip(program.graph.nodes, frozen.graph.nodes, strict=True))
        places = {here[mask]: k for mask, k in counts.places(100.0).items()}
        freeze(frozen, places, batch=len(SAMPLES), by_score=len(program.calls()) % 2 == 0, overflow=False)
        verify(frozen, made_by="freeze")
        assert not frozen.calls(*_DYNAMIC)
        found = frozen.run(SAMPLES)[0]
        assert bool(torch.isfinite(found).all()), "a sample without tokens gives no number"
        scale = max(float(wanted.abs().max()), 1.0)
        assert float((found[whole] - wanted).abs().max()) <= FLOAT32_TOLERANCE * scale
