"""A vision transformer that drops the tokens whose score lies below a threshold: how many stay depends on the image.

The idea is that of Learned Token Pruning (Kim et al., 2022): a threshold, not a number. Where nothing is written, no
token is needed. After two of the four blocks a linear layer scores every token, and those below the threshold go; the
class is read off the mean of what is left.

``forward`` takes one image: every image has a mask of its own. ``vlexport.save(…, dynamic=False)`` saves it so, and
``--tokens freeze`` makes of it a model with constant token counts for any batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS_FILE = Path(__file__).with_name("weights.npz")
IMAGE, PATCH = 28, 4
TOKENS = (IMAGE // PATCH) ** 2
CLASSES = 10
THRESHOLD = 0.5


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (b, n, dim); ``mask`` (b, 1, 1, n) is added to the scores, for training."""
        b, n, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ThresholdViT(nn.Module):
    """Four blocks on 7 × 7 patches; tokens are dropped behind the blocks in ``prune_after``.

    Args:
        dim: Width.
        depth: Blocks.
        heads: Of each attention.
        prune_after: Blocks, from 0, behind which tokens are scored.
    """

    def __init__(self, *, dim: int = 48, depth: int = 4, heads: int = 4, prune_after: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, PATCH, PATCH)
        self.position = nn.Parameter(torch.zeros(1, TOKENS, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.scorers = nn.ModuleDict({str(i): nn.Linear(dim, 1) for i in prune_after})
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)
        self.example_inputs = torch.rand(1, 1, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))

    def tokens(self, image: Tensor) -> Tensor:
        """(b, 1, 28, 28) → (b, 49, dim)."""
        return self.embed(image).flatten(2).transpose(1, 2) + self.position

    def score(self, x: Tensor, block: int) -> Tensor:
        """How much each token is needed, 0 to 1: (b, n)."""
        return self.scorers[str(block)](x)[..., 0].sigmoid()

    def forward(self, image: Tensor) -> Tensor:
        """Scores of the ten digits, (1, 10), of one image (1, 1, 28, 28)."""
        x = self.tokens(image)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if str(i) in self.scorers:
                x = x[:, self.score(x, i)[0] > THRESHOLD]
        return self.head(self.norm(x).mean(1))


def threshold_vit() -> ThresholdViT:
    """The architecture with fresh weights, for ``--arch``."""
    return ThresholdViT()


def load_model() -> ThresholdViT:
    """The trained model, in eval mode. Its weights are stored as float16 and computed with as float32."""
    model = ThresholdViT()
    with np.load(WEIGHTS_FILE) as file:
        model.load_state_dict({name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files})
    return model.eval()
