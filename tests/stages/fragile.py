"""Small nets that 8-bit integers hurt: in one layer, in a tenth of the layers, in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import vlexport

WIDTH = 12
CLASSES = 4
SPIKE = 4000.0
"""What a rare sample puts into the range of a fragile layer; nothing reads it."""


class Chain(nn.Module):
    """Linears in a row, each near the identity; into a fragile one goes a value that is rarely 0, and then huge.

    The weights that read that value are 0, so a model in float does not notice it, but a scale for all values of the
    layer has to span it.

    Args:
        depth: Linears.
        fragile: Which of them have such a value.
    """

    def __init__(self, depth: int, fragile: Sequence[int]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.fragile = tuple(fragile)
        self.layers = nn.ModuleList(nn.Linear(WIDTH + (i in fragile), WIDTH) for i in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.zero_()
                layer.weight[:, :WIDTH] = torch.eye(WIDTH) + 0.02 * torch.randn(WIDTH, WIDTH)
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        spike = SPIKE * torch.relu(x[:, :1] - 1.5)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(torch.cat([x, spike], 1) if i in self.fragile else x))
        return self.head(x)


def inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def save_chain(folder: Path, depth: int, fragile: Sequence[int], samples: int = 240) -> Path:
    """A model file with calibration samples and labelled ones beside it; the labels are the model's own answers."""
    folder.mkdir(parents=True, exist_ok=True)
    net = Chain(depth, fragile).eval()
    vlexport.save(net, folder / "model.pt", inputs={"x": inputs(2, 0)})
    np.savez(folder / "calib.npz", x=inputs(64, 1).numpy())
    given = inputs(samples, 2)
    with torch.inference_mode():
        labels = net(given).argmax(1)
    np.savez(folder / "data.npz", x=given.numpy(), label=labels.numpy())
    return folder
