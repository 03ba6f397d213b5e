"""What the zoo says of a model that half precision does not suit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo_half import cause


class Chooses(nn.Module):
    """Returns its candidates in the order of their scores, which lie closer than fp16 can tell."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.score = nn.Identity()
        self.gap = gap

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x[:, :1] * torch.tensor([1.0, 1.0 + self.gap, 1.0 - self.gap]))
        return torch.gather(x, 1, scores.topk(2, dim=1).indices)


@pytest.mark.parametrize(("gap", "moved"), [(1e-5, True), (0.5, False)])
def test_cause_says_whether_a_selection_hangs_on_rounding(gap: float, moved: bool) -> None:
    made: Any = SimpleNamespace(
        module=Chooses(gap),
        draw=lambda batch, generator: {"x": torch.rand(batch, 3, generator=generator) + 1},
        named=lambda out: {"output": out},
    )
    assert ("orders its candidates otherwise" in cause(made)) is moved


def test_cause_gives_what_rounded_matrices_leave() -> None:
    made: Any = SimpleNamespace(
        module=nn.Linear(8, 8),
        draw=lambda batch, generator: {"input": torch.randn(batch, 8, generator=generator)},
        named=lambda out: {"output": out},
    )
    with torch.no_grad():
        made.module.weight.copy_(torch.full((8, 8), 1 + 2**-11))  # halfway between two numbers of fp16: rounds to 1
        made.module.bias.zero_()
    assert cause(made).startswith("matrices alone rounded to fp16 leave 66 dB")  # 20·log10(2^11)
