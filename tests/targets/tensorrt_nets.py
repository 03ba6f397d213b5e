"""Small networks that the tests of the tensorrt target lower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cnn(nn.Module):
    """Convolution, norm, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.norm(self.conv(image)).relu(), 2).mean((2, 3)))


class Block(nn.Module):
    """A transformer block on 5 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).reshape(tokens.shape[0], 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape[0], 5, 16)
        tokens = tokens + self.out(mixed)
        return tokens + self.mlp(tokens)


class Half(nn.Module):
    """fp16 between fp32 borders, typed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        kernel, shift = self.conv.weight.half(), self.conv.bias.half()  # type: ignore[union-attr]
        pooled = F.conv2d(image.half(), kernel, shift, padding=1).relu().mean((2, 3))
        return F.linear(pooled, self.head.weight.half(), self.head.bias.half()).float()


class Stem(nn.Module):
    """Dilated pooling, which TensorRT does not take, in a module of its own."""

    def forward(self, image: Tensor) -> Tensor:
        return F.max_pool2d(image, 2, stride=1, dilation=2)


class Dilated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()

    def forward(self, image: Tensor) -> Tensor:
        return self.stem(image * 2) + 1


def image(batch: int = 1) -> Tensor:
    """A seeded photo of 8×8."""
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
