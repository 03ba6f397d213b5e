"""FMViT, a vision transformer that mixes features of several frequencies, in the form in which it is trained.

Tan, Geng, Xie: FMViT: A multiple-frequency mixing Vision Transformer, 2023, https://arxiv.org/abs/2311.05707.
The paper's parts have their names in the docstrings; what was chosen here stands in README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.zoo.fmvit.branches import Branches, downsampling, pointwise, spatial


@dataclass(frozen=True)
class Stage:
    """One resolution.

    Attributes:
        width: Channels.
        convolutional: Convolutional fusion blocks.
        mixing: Multi-frequency blocks behind them.
        pooling: Keys and values of attention are averages over so many positions in each direction.
    """

    width: int
    convolutional: int
    mixing: int
    pooling: int


@dataclass(frozen=True)
class Config:
    """A model.

    Attributes:
        stem: Channels of the stem.
        stages: Each at half the height and width of the one before; the first at a quarter of the picture's.
        group_width: Channels of a group of spatial convolutions; divides a quarter of every width.
        head_width: Channels of one head of attention; divides half of every width.
        expansion: Of hidden channels.
        classes: Logits.
    """

    stem: int
    stages: tuple[Stage, ...]
    group_width: int = 32
    head_width: int = 32
    expansion: int = 3
    classes: int = 1000


SMALL = Config(64, (Stage(64, 2, 0, 8), Stage(128, 2, 1, 4), Stage(256, 4, 1, 2), Stage(512, 0, 2, 1)))
TINY = Config(8, (Stage(16, 1, 0, 4), Stage(32, 1, 1, 2)), group_width=4, head_width=8, expansion=2, classes=10)
"""For tests: pictures of 32 x 32."""


class GroupedMlp(nn.Module):
    """gMLP: two layers of 1x1 convolutions, each trained with branches of different numbers of groups."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.expand = pointwise(width, expansion * width, (1, 2, 4))
        self.reduce = pointwise(expansion * width, width, (1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(F.relu(self.expand(x)))


class PooledAttention(nn.Module):
    """RLMHSA: attention of every position to averages over windows, with projections trained as branches.

    ``(N, width, H, W)`` to the same. Averages see low frequencies; that is what this part is for.
    """

    def __init__(self, width: int, head_width: int, pooling: int) -> None:
        super().__init__()
        self.heads, self.pooling = width // head_width, pooling
        self.query, self.key, self.value, self.proj = (pointwise(width, width) for _ in range(4))
        self.norm = nn.BatchNorm2d(width) if pooling > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        pooled = self.norm(F.avg_pool2d(x, self.pooling) if self.pooling > 1 else x)
        query, key, value = (
            each.reshape(batch, self.heads, width // self.heads, -1).transpose(2, 3)
            for each in (self.query(x), self.key(pooled), self.value(pooled))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(2, 3).reshape(batch, width, height, wide))


class SpatialMixer(nn.Module):
    """Convolution in groups, trained as branches, and a projection: sees high frequencies."""

    def __init__(self, width: int, kernel: int, group_width: int) -> None:
        super().__init__()
        self.spatial = spatial(width, kernel, group_width)
        self.proj = pointwise(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.spatial(x)))


class ConvolutionalFusion(nn.Module):
    """CFB: neighbours, then channels, each beside a shortcut."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.mixer = SpatialMixer(width, 3, config.group_width)
        self.norm = nn.BatchNorm2d(width)
        self.mlp = GroupedMlp(width, config.expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.mlp(self.norm(x))


class MultiFrequency(nn.Module):
    """FMB: half of the channels from attention, a quarter each from 3x3 and 5x5 convolutions, mixed by gMLP."""

    def __init__(self, width: int, pooling: int, config: Config) -> None:
        super().__init__()
        low, high = width // 2, width // 4
        self.reduce = pointwise(width, low)
        self.norm1 = nn.BatchNorm2d(low)
        self.attention = PooledAttention(low, config.head_width, pooling)
        self.spread = pointwise(low, 2 * high)
        self.fine = SpatialMixer(high, 3, config.group_width)
        self.coarse = SpatialMixer(high, 5, config.group_width)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = GroupedMlp(width, config.expansion)

    def forward(self, x: Tensor) -> Tensor:
        low = self.reduce(x)
        low = low + self.attention(self.norm1(low))
        fine, coarse = self.spread(low).chunk(2, dim=1)
        mixed = torch.cat((low, fine + self.fine(fine), coarse + self.coarse(coarse)), dim=1)
        return mixed + self.mlp(self.norm2(mixed))


class FMViT(nn.Module):
    """``(N, 3, H, W)`` to logits ``(N, classes)``; height and width are multiples of what all stages divide by."""

    def __init__(self, config: Config = SMALL) -> None:
        super().__init__()
        half = config.stem // 2
        self.stem = nn.Sequential(
            downsampling(3, half), nn.ReLU(),
            Branches(half, config.stem, [(3, 1), (1, 1)]), nn.ReLU(),
            downsampling(config.stem, config.stages[0].width), nn.ReLU(),
        )  # fmt: skip
        layers: list[nn.Module] = []
        before = config.stages[0].width
        for index, stage in enumerate(config.stages):
            if index:
                layers.append(downsampling(before, stage.width))
            layers += [ConvolutionalFusion(stage.width, config) for _ in range(stage.convolutional)]
            layers += [MultiFrequency(stage.width, stage.pooling, config) for _ in range(stage.mixing)]
            before = stage.width
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, config.classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.stem(image))).mean((2, 3)))


def fmvit_small() -> FMViT:
    """With fresh weights, for pictures of 224 x 224."""
    net = FMViT(SMALL)
    net.example_inputs = torch.rand(1, 3, 224, 224)
    return net
