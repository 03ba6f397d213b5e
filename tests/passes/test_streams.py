"""Heads of residual streams: which convolutions stay in float, since every block would carry their noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.passes.quantizing import SCHEMES, images, program_of, quantizer
from vlexport.core.numerics import sqnr_db
from vlexport.ir.program import Program
from vlexport.passes.quantization import stream
from vlexport.passes.quantization.placement import place

WIDTH, TOKENS = 32, 16
BLOCKS = 10


class Embedded(nn.Module):
    """A patch embedding in front of blocks of tokens; ``read`` makes a branch, ``behind`` what blocks see of it."""

    def __init__(
        self,
        behind: Callable[[Embedded, Tensor], Tensor],
        read: Callable[[Embedded, Tensor], Tensor],
        *,
        summed: bool = True,
        twice: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.behind, self.read, self.summed, self.twice = behind, read, summed, twice
        self.stem, self.other = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(3, WIDTH, 4, 4)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        self.begin, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(BLOCKS))
        self.downs = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image) + self.other(image) if self.twice else self.stem(image)
        x = self.behind(self, x)
        for up, down in zip(self.ups, self.downs, strict=True):
            made = down(nn.functional.gelu(up(self.read(self, x))))
            x = x + made if self.summed else made
        return self.norm(x)[:, 0]


def tokens(_: Embedded, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def placed(net: Embedded, x: Tensor) -> Tensor:
    return torch.cat([net.first.expand(x.shape[0], -1, -1), tokens(net, x)], 1) + net.places


def normed(net: Embedded, x: Tensor) -> Tensor:
    return net.norm(x)


def mixed_on_the_grid(net: Embedded, x: Tensor) -> Tensor:
    return net.norm(tokens(net, net.depthwise(x.transpose(1, 2).unflatten(2, (4, 4)))))


def refused(net: nn.Module) -> dict[str, str]:
    """Module of each convolution that stays in float → why."""
    program = program_of(net)
    found = place(program, SCHEMES["static-u8s8"]).refused
    return {str(node.args[1]): why for node, why in found.items() if "conv" in str(node.target)}


def kept_db(program: Program) -> tuple[float, list[str]]:
    """What is left of the output behind quantization, and why what stays in float does."""
    after, image = program.copy(), images(8, 5)
    _, misses = quantizer(program).run(after)
    found = sqnr_db(after.run(image)[0].numpy(), program.run(image)[0].numpy())
    return found, [miss.reason for miss in misses]


HEADS: dict[str, Callable[[], Embedded]] = {
    "patch embedding, class token and positions": lambda: Embedded(placed, normed),
    "norm at the stem": lambda: Embedded(lambda net, x: net.begin(tokens(net, x)), normed),
    "clipped": lambda: Embedded(lambda net, x: tokens(net, x.relu()), normed),
}
NOT_HEADS: dict[str, Callable[[], Embedded]] = {
    "blocks read the stream itself, rounded": lambda: Embedded(placed, lambda net, x: x),
    "a convolution reads it": lambda: Embedded(tokens, mixed_on_the_grid),
    "nothing is added to it": lambda: Embedded(placed, normed, summed=False),
    "an activation reads it": lambda: Embedded(lambda net, x: tokens(net, x).tanh(), normed),
}


@pytest.mark.parametrize("name", HEADS)
def test_convolution_stays_in_float_when_its_result_begins_a_stream(name: str) -> None:
    ((_, why),) = refused(HEADS[name]()).items()
    assert why == stream.WHY


@pytest.mark.parametrize("name", NOT_HEADS)
def test_convolution_is_quantized_when(name: str) -> None:
    assert stream.WHY not in refused(NOT_HEADS[name]()).values()


def test_both_stay_in_float_when_the_stream_begins_as_their_sum() -> None:
    assert list(refused(Embedded(tokens, normed, twice=True)).values()) == [stream.WHY, stream.WHY]


def test_heads_are_quantized_when_they_are_much_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net = HEADS["norm at the stem"]()
    monkeypatch.setattr(stream, "LARGEST_SHARE", 0.01)
    assert refused(net) == {}


def test_less_is_lost_and_the_reason_is_told_when_the_head_stays_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding one value far off makes all steps of the embedding's result coarse."""
    net = HEADS["norm at the stem"]()
    with torch.no_grad():
        net.stem.bias[0] = 40.0  # type: ignore[index]
    program = program_of(net)
    kept, reasons = kept_db(program)
    assert reasons == [stream.WHY]
    monkeypatch.setattr(stream, "LARGEST_SHARE", 0.0)
    rounded, reasons = kept_db(program)
    assert reasons == []
    assert kept >= rounded + 3.0  # measured: 43.1 against 38.9 dB
