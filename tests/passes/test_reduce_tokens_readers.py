"""What reads the tokens in unusual ways gets what it got before; models that tell tokens apart by place are refused.

Pictures are of equal tokens in pairs, merged to one of each pair: whoever knows how many a token stands for loses
nothing. A sum over tokens, a softmax over them, a second attention: each is wrong if it counts a pair as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, one_thread
from tests.passes.test_reduce_tokens_independent import (
    GRID,
    PATCHES,
    TOLERANCE,
    WIDTH,
    Vit,
    paired,
    pictures,
    prepared,
    vit,
    without_positions,
)  # fmt: skip
from vlexport.core.errors import InputError
from vlexport.core.numerics import relative_error
from vlexport.core.tokens import tokens_from_text
from vlexport.ir.program import Program
from vlexport.passes import pass_class
from vlexport.passes.base import NearMiss


class Readers(nn.Module):
    """A plain transformer whose tokens, class token included, are read in every way at once."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.net: Vit = without_positions(vit())  # type: ignore[assignment]
        self.net.blocks = self.net.blocks[:2]
        self.one = nn.Linear(WIDTH, 1)
        self.many = nn.Linear(1 + PATCHES, 4)
        self.query = nn.Parameter(torch.randn(1, 2, 3, WIDTH // 2))
        self.conv = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self._names = names

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.net.embed(image)
        for block in self.net.blocks:
            x = block(x)
        return {name: READERS[name](self, x) for name in self._names}


def _pooled(net: Readers, x: Tensor) -> Tensor:
    return (net.one(x).softmax(1) * x).sum(1)


def _attended(net: Readers, x: Tensor) -> Tensor:
    heads = x.reshape(x.shape[0], -1, 2, WIDTH // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(net.query.expand(x.shape[0], -1, -1, -1), heads, heads).flatten(1)


def _grid(x: Tensor) -> Tensor:
    return x[:, 1:].transpose(1, 2).reshape(x.shape[0], WIDTH, GRID, GRID)


READERS: dict[str, Callable[[Readers, Tensor], Tensor]] = {
    "mean_of_all": lambda net, x: x.mean(1),
    "sum_over_a_constant": lambda net, x: x[:, 1:].sum(1) / PATCHES,
    "largest": lambda net, x: x[:, 1:].amax(1),
    "deviation": lambda net, x: x.std(1),
    "softmax_over_tokens": _pooled,
    "second_attention": _attended,
    "one_patch": lambda net, x: x[:, 6],
    "last_token": lambda net, x: x[:, -1],
    "every_second_patch": lambda net, x: x[:, 1::2],
    "backwards": lambda net, x: x.flip(1)[:, :3],
    "moved_on": lambda net, x: x.roll(1, 1)[:, :3],
    "linear_over_tokens": lambda net, x: net.many(x.transpose(1, 2)),
    "norm_over_tokens": lambda net, x: F.layer_norm(x.transpose(1, 2), (1 + PATCHES,))[:, :, 0],
    "convolution": lambda net, x: net.conv(_grid(x)),
    "mean_of_a_grid": lambda net, x: _grid(x).mean((2, 3)),
    "pooled_grid": lambda net, x: F.avg_pool2d(_grid(x), 2),
    "similarity_of_tokens": lambda net, x: (x @ x.transpose(1, 2))[:, 0],
    "class_token_repeated": lambda net, x: (x - x[:, :1]).abs().amax(2),
    "flat": lambda net, x: x.flatten(1),
    "flat_batch": lambda net, x: x.reshape(-1, WIDTH).reshape(x.shape)[:, 0],
}


def outcome(program: Program, tokens: str) -> tuple[Program | None, list[str]]:
    """A prepared program reduced, or None with the reasons."""
    request = tokens_from_text(tokens)
    kind = pass_class(request.pass_name)
    after = program.copy()
    applied = kind(kind.Options.model_validate(request.values))
    try:
        changes, misses = applied.run(after)
    except InputError as error:
        if error.code != "VLX0411":
            raise
        return None, [error.message]
    reasons = [miss.reason for miss in misses if isinstance(miss, NearMiss)]
    return (after if changes else None), reasons


def judged(names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Reader → what it loses on equal tokens, and on different ones."""
    torch.manual_seed(5)
    image, other = paired(3, 1), pictures(3)
    program = captured(Readers(names).eval(), image[:2])
    after, reasons = outcome(prepared(program), f"tome:r={(PATCHES - 1) // 2},layers=1")
    assert after is not None, reasons
    found = {}
    with torch.inference_mode(), one_thread():
        runs = [each.run(pixels) for pixels in (image, other) for each in (after, program)]
    for name, equal, dense, different, whole in zip(names, *runs, strict=True):
        found[name] = relative_error(equal.numpy(), dense.numpy()), relative_error(different.numpy(), whole.numpy())
    return found


def test_readers_lose_nothing_when_equal_tokens_are_merged() -> None:
    """All at once, of which some need every token back."""
    for name, (equal, different) in judged(list(READERS)).items():
        assert equal <= TOLERANCE, name
        assert different > 1e-6, f"{name}: nothing was merged, a blind test"


@pytest.mark.parametrize("name", ["mean_of_all", "softmax_over_tokens", "second_attention", "mean_of_a_grid"])
def test_reader_loses_nothing_when_it_is_the_only_one(name: str) -> None:
    """No other asks for the tokens back, so it reads merged ones, where it can."""
    ((equal, different),) = judged([name]).values()
    assert equal <= TOLERANCE
    assert different > 1e-6, "nothing was merged: a blind test"


class Biased(nn.Module):
    """Attention with something stored for each pair, or each place, of tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = vit()
        self.net.blocks = self.net.blocks[:2]
        self.kind = kind
        self.bias = nn.Parameter(torch.randn(1, 2, 1 + PATCHES, 1 + PATCHES))
        self.turn = nn.Parameter(torch.randn(1 + PATCHES, WIDTH // 2))
        self.mix = nn.Linear(1 + PATCHES, 1 + PATCHES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.net.embed(image)
        for block in self.net.blocks:
            q, k, v = block.heads(x)
            if self.kind == "turned":
                q, k = q * self.turn, k * self.turn
            mask = self.bias if self.kind == "bias" else None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "causal")
            x = x + block.proj(mixed.transpose(1, 2).reshape(x.shape))
            if self.kind == "mixer":
                x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
            if self.kind == "places":
                x = x + self.net.positions
            x = block.widen(x)
        return self.net.read(x)


SAID = {
    "bias": "has a mask, or a bias",
    "turned": "it reads another value for each of the 17 tokens",
    "causal": "its attention is causal",
    "mixer": "nothing behind it would work on fewer: linear follows, and it mixes the tokens",
    "places": "nothing behind it would work on fewer: add follows, and it reads another value for each of the",
}
"""What tells tokens apart → why they cannot be reduced."""


@pytest.mark.parametrize("kind", SAID)
def test_model_is_refused_when_tokens_are_told_apart_by_place(kind: str) -> None:
    torch.manual_seed(6)
    program = prepared(captured(Biased(kind), pictures(2)))
    for tokens in ("tome:r=3", "evit:keep=0.5,layers=1"):
        after, reasons = outcome(program, tokens)
        assert after is None
        assert any(SAID[kind] in reason for reason in reasons), reasons
