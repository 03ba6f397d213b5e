"""Adapters: a bottleneck with a non-linearity stays, whatever stands beside it; what is linear around it is folded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured, randomize
from vlexport.core.config import BuildConfig
from vlexport.ir import dialect
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pipeline
from vlexport.passes.probes import make_probes
from vlexport.stages.choices import passes_of


class Adapted(nn.Module):
    """A linear with an adapter (Houlsby et al. 2019, arXiv 1902.00751): down, activation, up, scale, residual."""

    def __init__(self, activation: nn.Module, *, parallel: bool) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.down, self.activation, self.up = nn.Linear(8, 2), activation, nn.Linear(2, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = self.linear(x)
        return y + self.up(self.activation(self.down(x if self.parallel else y))) * self.scale


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh()], ids=lambda a: type(a).__name__)
def test_adapter_is_not_claimed_as_merged_when_it_is_not_linear(activation: nn.Module, parallel: bool) -> None:
    torch.manual_seed(0)
    program = captured(randomize(Adapted(activation, parallel=parallel)), torch.randn(2, 3, 8))
    probes = make_probes(program, calibration=None, seed=0)
    after, _ = run_pipeline(program, passes_of(BuildConfig(model="m.pt")), gate=NumericGate(program, probes))
    left = Counter(map(dialect.plain_name, after.calls()))
    assert left["linear"] == 3, "the adapter's two projections and the linear beside them"
    assert left["relu"] + left["gelu"] + left["silu"] + left["tanh"] == 1
    assert left["mul"] == 0, "its scale is part of the projection up"
    for probe in probes:
        assert torch.allclose(after.run(*probe.values)[0], program.run(*probe.values)[0], atol=1e-5)
