"""Adaptive token sampling branches on how many tokens an image has left: refused, with the line that does it.

A block after Fayyaz et al. 2022, arXiv 2111.15667, section 3: tokens are scored by the class token's attention times
the length of their values; where evenly spaced levels cross the sum of the sorted scores, tokens stay, each once. Never
more are drawn than are left, as in the authors' ``ats_block.py`` (adaptivetokensampling/ATS 9271257a).
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.errors import CaptureError

WIDTH, TOKENS, MOST = 8, 17, 9


class Sampling(nn.Module):
    """Attention whose queries are the class token and the sampled ones."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        drawn = MOST
        if drawn > x.shape[1]:  # here
            drawn = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1)
        score = seen[:, 0, 1:] * v[:, 1:].norm(dim=-1)
        ordered, order = score.sort(-1)
        reached = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
        levels = torch.linspace(0, 1, drawn)[None, :, None]
        place = (reached[:, None] - levels).abs().argmin(-1)
        fresh = torch.cat([torch.ones_like(place[:, :1], dtype=torch.bool), place[:, 1:] > place[:, :-1]], 1)
        kept = 1 + order.gather(1, place)[0][fresh[0]]
        kept = torch.cat([torch.zeros_like(kept[:1]), kept])
        return x[:, kept] + (seen @ v)[:, kept]


def sampler() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Sampling(), Sampling()).eval()


def test_model_keeps_other_numbers_of_tokens_of_other_images() -> None:
    model = sampler()
    generator = torch.Generator().manual_seed(1)
    counts = {model(3.0 * torch.randn(1, TOKENS, WIDTH, generator=generator)).shape[1] for _ in range(20)}
    assert len(counts) > 1
    assert max(counts) <= MOST + 1


def test_capture_is_refused_with_the_line_that_compares_the_number_of_tokens() -> None:
    with pytest.raises(CaptureError, match="VLX0303") as refused:
        captured(sampler(), torch.randn(1, TOKENS, WIDTH), dynamic=False)
    lines, first = inspect.getsourcelines(Sampling)
    line = first + next(i for i, text in enumerate(lines) if text.endswith("# here\n"))
    assert refused.value.where == f"test_adaptive_sampling.py:{line}"
