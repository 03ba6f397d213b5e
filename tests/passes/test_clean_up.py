"""The passes that run once more behind all that targets share: what folding leaves, and that it is a fixed point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, randomize
from vlexport.ir.text import text
from vlexport.passes import CATALOGUE, CLEAN_UP, pass_class
from vlexport.passes.pipeline import run_pipeline


class NormedTokens(nn.Module):
    """Linears over tokens, each with the batch norm that wants the tokens in the batch, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)
        self.down, self.last = nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.up(x)
        made = self.down(F.hardswish(self.norm(made.flatten(0, 1)).reshape_as(made)))
        return x + self.last(made.flatten(0, 1)).reshape_as(made)


def test_nothing_is_left_to_do_when_the_catalogue_and_the_clean_up_have_run() -> None:
    torch.manual_seed(0)
    program = captured(randomize(NormedTokens()), torch.randn(2, 5, 8))
    once, _ = run_pipeline(program, [pass_class(name)() for name in CATALOGUE], gate=None)
    cleaned, records = run_pipeline(once, [pass_class(name)() for name in CLEAN_UP], gate=None)
    assert [record.name for record in records if record.changes] == ["eliminate-round-trips"]
    assert len(cleaned.calls()) < len(once.calls())
    again, records = run_pipeline(cleaned, [pass_class(name)() for name in CATALOGUE], gate=None)
    assert text(again) == text(cleaned)
    assert not any(record.changes for record in records)
    torch.testing.assert_close(cleaned.run(*program.example)[0], program.run(*program.example)[0], rtol=1e-5, atol=1e-5)
