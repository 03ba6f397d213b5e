"""Selections whose length the data decides are captured; Python that branches on a length is refused with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlexport
from tests.harness import captured
from vlexport.core.errors import CaptureError
from vlexport.core.numerics import relative_error
from vlexport.frontends.source import open_archive
from vlexport.ir.text import text

X = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1))


class Selecting(nn.Module):
    """A selection, then what torch refuses behind a length that may be 0: a reshape, attention, a mean."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choose, self.qkv = choose, nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.choose(x, x[0, :, 0])
        q, k, v = self.qkv(x).reshape(1, x.shape[1], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).mean((1, 2))


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask": lambda x, s: x[:, s > 0],
    "where": lambda x, s: x[:, torch.where(s > 0)[0]],
    "masked_select": lambda x, s: x.masked_select((s > 0)[None, :, None]).reshape(1, -1, 4),
    "unique": lambda x, s: x[:, torch.unique((s * 2).long().clamp(0, 8))],
    "slice by a count": lambda x, s: x[:, s.argsort(descending=True)][:, : (s > 0).sum().item()],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_selection_is_captured_saved_and_read_back(name: str, tmp_path: Path) -> None:
    model = Selecting(SPELLINGS[name]).eval()
    vlexport.save(model, tmp_path / "model.pt", inputs=X, dynamic=False)
    program = open_archive(tmp_path / "model.pt").program
    for shift in (0.0, 0.7):  # other samples keep other numbers of tokens
        with torch.no_grad():
            assert relative_error(program.run(X + shift)[0].numpy(), model(X + shift).numpy()) <= 1e-5


def test_sample_that_keeps_nothing_is_refused_when_it_is_run() -> None:
    program = captured(Selecting(SPELLINGS["mask"]), X, dynamic=False)
    with pytest.raises(RuntimeError, match="u0 >= 1"):
        program.run(X - 100.0)


def test_models_without_such_selections_are_captured_without_checks() -> None:
    assert "_assert" not in text(captured(Selecting(lambda x, s: x), X, dynamic=False))


@pytest.mark.parametrize(
    ("choose", "line"),
    [
        (lambda x, s: x[:, s > 0] if (s > 0).sum() > 3 else x, "branch"),
        (lambda x, s: x[:, s.topk(int((s > 0).sum())).indices], "top-k by a count"),
    ],
)
def test_python_that_branches_on_a_count_is_refused_with_its_line(
    choose: Callable[[Tensor, Tensor], Tensor], line: str
) -> None:
    with pytest.raises(CaptureError, match="VLX0303") as refused:
        captured(Selecting(choose), X, dynamic=False)
    assert refused.value.where.startswith("test_size_checks.py:"), line
