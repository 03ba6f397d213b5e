"""A self-slimmed vision transformer: between stages, a softmax-weighted sum replaces all patch tokens by fewer ones.

Source: Zong et al. 2022, "Self-slimmed Vision Transformer" (arXiv 2111.12624), sections 3.1 (token slimming) and 3.2
(reverse token slimming); the host is LV-ViT (Jiang et al. 2021, arXiv 2104.10858) with one convolution for the patches.

Nothing is selected, so nothing hostile is left to freeze: every count is a constant of the weights. In training,
each block's tokens are recovered to the full number, to be compared with a teacher's; that part (``rtsm``) has more
weights than the rest of a small model. In eval mode it is not called, so a captured model does not hold it.

Parameters carry the names of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block with norms in front, its branches divided by ``skip``."""

    def __init__(self, width: int, heads: int, skip: float) -> None:
        super().__init__()
        self.skip = skip
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) / self.skip
        return x + self.mlp(self.norm2(x)) / self.skip


class TokenSlimming(nn.Module):
    """``[B, N, C]`` → ``[B, kept, C]``: each new token is a weighted sum of all, the weights by softmax over N."""

    def __init__(self, width: int, kept: int) -> None:
        super().__init__()
        self.weight = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, kept)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.weight(x) * self.scale).softmax(1)
        return shares.transpose(1, 2) @ x


class TokenRecovery(nn.Module):
    """``[B, kept, C]`` → ``[B, all, C]``, in training only."""

    def __init__(self, width: int, kept: int, everything: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mlp1 = Mlp(kept, 4 * everything, everything)
        self.norm2 = nn.LayerNorm(width)
        self.mlp2 = Mlp(width, 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp2(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Patches of an image, as tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class SelfSlimmedViT(nn.Module):
    """Logits ``[B, classes]`` of images ``[B, 3, side, side]``; in training also each block's tokens, recovered.

    Args:
        side: Of the image, in pixels.
        patch: Of a patch, in pixels.
        width: Channels of a token.
        stages: Blocks of each stage; tokens are slimmed between stages.
        heads: Of each block.
        ratio: Share of the patch tokens that a slimming keeps.
        classes: Of the head.
        skip: What the branches of a block are divided by.
    """

    def __init__(
        self, *, side: int = 32, patch: int = 4, width: int = 32, stages: Sequence[int] = (1, 1, 2), heads: int = 4,
        ratio: float = 0.5, classes: int = 10, skip: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__()
        everything = (side // patch) ** 2
        kept = [int(everything * ratio**stage) for stage in range(len(stages))]
        self.ends = [sum(stages[: stage + 1]) for stage in range(len(stages) - 1)]
        self.patch_embed = PatchEmbedding(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, everything + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, skip) for _ in range(sum(stages)))
        self.tsm = nn.ModuleList(TokenSlimming(width, count) for count in kept[1:])
        self.rtsm = nn.ModuleList(
            TokenRecovery(width, kept[self._stage(block)], everything) if self._stage(block) else nn.Identity()
            for block in range(1, sum(stages) + 1)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def _stage(self, blocks: int) -> int:
        """How many slimmings lie behind so many blocks."""
        return sum(end <= blocks for end in self.ends)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        recovered = []
        for count, block in enumerate(self.blocks, 1):
            x = block(x)
            if count in self.ends:
                x = torch.cat([x[:, :1], self.tsm[self.ends.index(count)](x[:, 1:])], 1)
            if self.training:
                recovered.append(self.rtsm[count - 1](x[:, 1:]))
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return (logits, recovered) if self.training else logits
