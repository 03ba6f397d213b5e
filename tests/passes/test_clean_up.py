"""The passes that run once more behind all that targets share: what folding leaves, and that it is a fixed point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.harness import captured, randomize
from vlexport.ir.text import text
from vlexport.passes import CATALOGUE, CLEAN_UP, pass_class
from vlexport.passes.pipeline import run_pipeline


class NormedTokens(nn.Module):
    """Linears over tokens, each with the batch norm that wants the tokens in the batch, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            made = linear(x)
            x = x + torch.relu(norm(made.flatten(0, 1)).reshape_as(made))
        return x


def test_nothing_is_left_to_do_when_the_catalogue_and_the_clean_up_have_run() -> None:
    torch.manual_seed(0)
    program = captured(randomize(NormedTokens()), torch.randn(2, 5, 8), dynamic=False)
    once, _ = run_pipeline(program, [pass_class(name)() for name in CATALOGUE], gate=None)
    cleaned, records = run_pipeline(once, [pass_class(name)() for name in CLEAN_UP], gate=None)
    assert [record.name for record in records if record.changes] == ["eliminate-round-trips"]
    assert len(cleaned.calls()) < len(once.calls())
    again, records = run_pipeline(cleaned, [pass_class(name)() for name in CATALOGUE], gate=None)
    assert text(again) == text(cleaned)
    assert not any(record.changes for record in records)
    torch.testing.assert_close(cleaned.run(*program.example)[0], program.run(*program.example)[0], rtol=1e-5, atol=1e-5)
