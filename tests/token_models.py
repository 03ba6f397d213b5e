"""Vision transformers that drop or merge tokens, small, in the forms in which their authors publish them.

They are written from the papers, and their outputs are those of the authors' code from the same weights: what that code
computed is recorded in ``tests/golden/token_models.npz`` (``tests/record_token_models.py`` says how). Parameters carry
the names of published checkpoints (``blocks.0.attn.qkv.weight``), which are those of timm's plain ViT.

A selection is spelled as authors spell it: sorts of the full length, scatters, complements by sorting, flattened
batches.

Shapes: images ``[B, 3, side, side]`` of float32; tokens ``[B, N, C]``, the class token first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

Merge = Callable[[Tensor, str], Tensor]
"""Tokens on axis −2, and how those that fall together are reduced (``sum``, ``mean``, ``amax``)."""


class PatchEmbedding(nn.Module):
    """Patches of an image, as tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention that also gives what token reduction looks at."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each ``[B, heads, N, C / heads]``."""
        q, k, v = self.some(x, 0, 3)
        return q, k, v

    def some(self, x: Tensor, first: int, last: int) -> Sequence[Tensor]:
        """Those of queries, keys, values (0, 1, 2) from ``first`` to before ``last``, and no other is computed."""
        b, n, c = x.shape
        rows = slice(first * c, last * c)
        made = nn.functional.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return made.reshape(b, n, last - first, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q: Tensor, k: Tensor, size: Tensor | None = None) -> Tensor:
        """Attention weights ``[B, heads, N, N]``; by ``size`` ``[B, N, 1]`` tokens count for several."""
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if size is not None:
            scores = scores + size.log()[:, None, None, :, 0]
        return scores.softmax(-1)

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        """What the block adds to the residual stream, ``[B, N, C]``."""
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A block with norms in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.parts(self.norm1(x))
        return self.feed(x + self.attn.mix(self.attn.weights(q, k), v))

    def feed(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """A vision transformer with a class token that keeps all its tokens.

    Args:
        side: Of the image, in pixels.
        patch: Of a patch, in pixels.
        width: Channels of a token.
        depth: Blocks.
        heads: Of each block.
        classes: Of the head.
    """

    def __init__(
        self, *, side: int = 32, patch: int = 4, width: int = 32, depth: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = (side // patch) ** 2
        self.patch_embed = PatchEmbedding(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patches + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def embed(self, image: Tensor) -> Tensor:
        """The tokens that enter the first block."""
        x = self.patch_embed(image)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed

    def classify(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` from the class token."""
        return self.head(self.norm(x)[:, 0])

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


# -- EViT (Liang et al. 2022, arXiv 2202.07800) -----------------------------------------------------------------------


def complement(index: Tensor, size: int) -> Tensor:
    """Which of ``range(size)`` the last axis of ``index`` ``[B, k]`` leaves out, in order: ``[B, size − k]``.

    What is chosen is written over with 0, and sorts to the front.
    """
    places = torch.arange(size, device=index.device).expand(index.shape[0], -1)
    return places.scatter(-1, index, 0).sort(-1).values[:, index.shape[-1] :]


class EViT(PlainViT):
    """Keeps the patch tokens that the class token attends to most; may fuse the others into one.

    Args:
        keep: Share of the tokens behind the class token that a reducing block keeps, rounded up; the token that an
            earlier block fused counts among them.
        layers: Reducing blocks, from 1.
        fuse: Whether what is dropped adds up to one token, weighted by attention. The authors' code does not do so by
            default; the paper's figures are with it.
        sizes: Other arguments of :class:`PlainViT`.
    """

    def __init__(self, *, keep: float = 0.7, layers: Sequence[int] = (2, 3), fuse: bool = True, **sizes: int) -> None:
        super().__init__(**sizes)
        self.keep, self.layers, self.fuse = keep, tuple(layers), fuse

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for layer, block in enumerate(self.blocks, 1):
            q, k, v = block.attn.parts(block.norm1(x))
            weights = block.attn.weights(q, k)
            x = x + block.attn.mix(weights, v)
            if layer in self.layers:
                x = self.reduce(x, weights[:, :, 0, 1:].mean(1))
            x = block.feed(x)
        return self.classify(x)

    def reduce(self, x: Tensor, importance: Tensor) -> Tensor:
        """``x`` ``[B, N, C]`` by ``importance`` ``[B, N − 1]`` of the tokens behind the class token."""
        count = importance.shape[1]
        kept = math.ceil(self.keep * count)
        if kept == count:
            return x
        index = importance.topk(kept, 1).indices
        wide = lambda which: which.unsqueeze(-1).expand(-1, -1, x.shape[-1])  # noqa: E731
        rest = x[:, 1:]
        pieces = [x[:, :1], rest.gather(1, wide(index))]
        if self.fuse:
            others = complement(index, count)
            pieces.append((rest.gather(1, wide(others)) * importance.gather(1, others).unsqueeze(-1)).sum(1, True))
        return torch.cat(pieces, 1)


# -- DynamicViT (Rao et al. 2021, arXiv 2106.02034) -------------------------------------------------------------------


class Predictor(nn.Module):
    """Log-probabilities ``[B, N, 2]`` of keeping and dropping each patch token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2), nn.LogSoftmax(-1),
        )  # fmt: skip

    def forward(self, x: Tensor, alive: Tensor) -> Tensor:
        x = self.in_conv(x)
        half = x.shape[-1] // 2
        everywhere = (x[..., half:] * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True)
        return self.out_conv(torch.cat([x[..., :half], everywhere.expand(-1, x.shape[1], -1)], -1))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` ``[B, k]`` of ``x`` ``[B, N, C]``, looked up in the flattened batch: ``[B, k, C]``."""
    b, n, c = x.shape
    offset = torch.arange(b, dtype=index.dtype, device=x.device).view(b, 1) * n
    return x.reshape(b * n, c)[(index + offset).reshape(-1)].reshape(b, index.shape[1], c)


class DynamicViT(PlainViT):
    """Keeps a fixed share of the first patch tokens, by a predictor in front of the pruning blocks (inference only).

    Args:
        ratios: Share of the patches left by each pruning block, rounded down.
        layers: Pruning blocks, from 1.
        sizes: Other arguments of :class:`PlainViT`.
    """

    def __init__(self, *, ratios: Sequence[float] = (0.7, 0.49), layers: Sequence[int] = (2, 3), **sizes: int) -> None:
        super().__init__(**sizes)
        self.counts = {layer: int(self.patches * ratio) for layer, ratio in zip(layers, ratios, strict=True)}
        self.score_predictor = nn.ModuleList(Predictor(self.norm.weight.numel()) for _ in layers)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        alive = torch.ones(x.shape[0], self.patches, 1, dtype=x.dtype, device=x.device)
        predictors = iter(self.score_predictor)
        for layer, block in enumerate(self.blocks, 1):
            if layer in self.counts:
                score = next(predictors)(x[:, 1:], alive)[..., 0]
                index = score.argsort(1, descending=True)[:, : self.counts[layer]]
                x = take(x, torch.cat([torch.zeros_like(index[:, :1]), index + 1], 1))
                alive = take(alive, index)
            x = block(x)
        return self.classify(x)


# -- ToMe (Bolya et al. 2023, arXiv 2210.09461) -----------------------------------------------------------------------


def one_way(scores: Tensor, count: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` strongest edges of a bipartite graph, one from each source at most.

    Args:
        scores: ``[B, sources, targets]``; a source that must stay has −inf.
        count: Sources to merge.
        protected: Whether those that stay are put in order, so that protected ones keep their places.

    Returns:
        Sources that stay ``[B, sources − count]``, those that are merged and their targets, each ``[B, count]``.
    """
    best, target = scores.max(-1)
    order = best.argsort(-1, descending=True)
    stays, merged = order[:, count:], order[:, :count]
    return (stays.sort(1).values if protected else stays), merged, target.gather(1, merged)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``index`` ``[B, k]`` as wide as ``x`` ``[B, …, N, C]``: ``[B, …, k, C]``."""
    middle = x.shape[1:-2]
    spread = index.reshape(index.shape[0], *(1 for _ in middle), index.shape[1], 1)
    return spread.expand(x.shape[0], *middle, index.shape[1], x.shape[-1])


def _into(targets: Tensor, sources: Tensor, index: Tensor, how: str) -> Tensor:
    return targets.scatter_reduce(-2, _rows(targets, index), sources, reduce=how)


class ToMe(PlainViT):
    """Merges similar tokens between attention and MLP; the class token stays.

    Args:
        merged: Tokens that each block merges; a block merges half of the tokens at most.
        proportional: Whether attention counts a token as many as it stands for.
        sizes: Other arguments of :class:`PlainViT`.
    """

    def __init__(self, *, merged: Sequence[int] = (8, 8, 8, 8), proportional: bool = True, **sizes: int) -> None:
        super().__init__(**sizes)
        self.merged, self.proportional = tuple(merged), proportional

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        size: Tensor | None = None
        for wanted, block in zip(self.merged, self.blocks, strict=True):
            q, k, v = block.attn.parts(block.norm1(x))
            x = x + block.attn.mix(block.attn.weights(q, k, size if self.proportional else None), v)
            count = min(wanted, (x.shape[1] - 1) // 2)
            if count > 0:
                merge = self.matching(k.mean(1), count)
                size = torch.ones_like(x[..., :1]) if size is None else size
                x, size = merge(x * size, "sum"), merge(size, "sum")
                x = x / size
            x = block.feed(x)
        return self.classify(x)

    def matching(self, metric: Tensor, count: int) -> Merge:
        """Pairs each even token with the odd one whose ``metric`` ``[B, N, C]`` is nearest by cosine."""
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
        scores[:, 0] = -math.inf
        stays, merged, target = one_way(scores, count, 1)

        def merge(x: Tensor, how: str) -> Tensor:
            even, odd = x[..., ::2, :], x[..., 1::2, :]
            left = even.gather(-2, _rows(even, stays))
            return torch.cat([left, _into(odd, even.gather(-2, _rows(even, merged)), target, how)], -2)

        return merge


# -- MCTF (Lee et al. 2024, arXiv 2403.10030) -------------------------------------------------------------------------


class MCTF(PlainViT):
    """Fuses tokens that are similar, uninformative and small, both ways, by the attention of the block they enter.

    Args:
        merged: Tokens that a reducing block merges, in both directions together.
        layers: Reducing blocks, from 1.
        temperatures: Of similarity, informativeness and size: a criterion counts to the power of 1 / temperature, 0
            leaves it out.
        least: Tokens that a block leaves at least.
        sizes: Other arguments of :class:`PlainViT`.
    """

    def __init__(
        self, *, merged: int = 12, layers: Sequence[int] = (2, 3, 4),
        temperatures: tuple[float, float, float] = (1, 20, 40), least: int = 10, **sizes: int,
    ) -> None:  # fmt: skip
        super().__init__(**sizes)
        self.merged, self.layers, self.temperatures, self.least = merged, tuple(layers), temperatures, least

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        size: Tensor | None = None
        for layer, block in enumerate(self.blocks, 1):
            q, k = block.attn.some(block.norm1(x), 0, 2)
            weights = block.attn.weights(q, k, size)
            count = min(self.merged, x.shape[1] - self.least, (x.shape[1] - 1) // 2)
            if layer in self.layers and count > 0:
                x, size, weights = self.fuse(x, weights, size, count)
            (v,) = block.attn.some(block.norm1(x), 2, 3)
            x = block.feed(x + block.attn.mix(weights, v))
        return self.classify(x)

    def fuse(self, x: Tensor, weights: Tensor, size: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their sizes, and the attention weights that the fused tokens have (one step ahead)."""
        received = weights.mean((1, 2))
        merge = self.matching(x, received, size, count)
        size = torch.ones_like(x[..., :1]) if size is None else size
        weight = received.unsqueeze(-1) * (size / size.amax(-2, keepdim=True))
        total = merge(weight, "sum")
        ahead = merge(weights.unsqueeze(-1), "sum").squeeze(-1)
        ahead = merge(ahead * weight[:, None], "sum").squeeze(-1) / total[:, None]  # a no-op, as theirs
        return merge(x * weight, "sum") / total, merge(size, "sum"), ahead

    def matching(self, x: Tensor, received: Tensor, size: Tensor | None, count: int) -> Merge:
        """Half of ``count`` from the even tokens into the odd ones, then the rest the other way round."""
        first, second = count // 2, count - count // 2
        similarity, information, magnitude = self.temperatures
        unit = x / x.norm(dim=-1, keepdim=True)
        scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
        scores = ((scores + 1) / 2) ** (1 / similarity) if similarity else torch.ones_like(scores)
        if information:
            scores = scores * _both(1 / received.unsqueeze(-1)) ** (1 / information)
        if magnitude and size is not None:
            scores = scores * _both(1 / size) ** (1 / magnitude)
        scores[:, :1] = -math.inf
        stays, merged, target = one_way(scores, first, 1)
        back = scores.gather(-2, stays[..., None].repeat(1, 1, scores.shape[-1])).transpose(1, 2)
        back_stays, back_merged, back_target = one_way(back, second, 0)

        def merge(x: Tensor, how: str) -> Tensor:
            even, odd = x[..., ::2, :], x[..., 1::2, :]
            left = even.gather(-2, _rows(even, stays))
            right = _into(odd, even.gather(-2, _rows(even, merged)), target, how)
            left = _into(left, right.gather(-2, _rows(right, back_merged)), back_target, how)
            return torch.cat([left, right.gather(-2, _rows(right, back_stays))], -2)

        return merge


def _both(value: Tensor) -> Tensor:
    """``value`` ``[B, N, 1]`` over its largest, of an even token times an odd one: ``[B, even, odd]``."""
    value = value / value.amax(1, keepdim=True)
    return value[:, ::2] * value[:, 1::2].transpose(1, 2)


# -- A-ViT (Yin et al. 2022, arXiv 2112.07658) ------------------------------------------------------------------------


class AViT(PlainViT):
    """Every token halts by itself; what it gives is the mean of its states, weighted by how likely it halted there.

    No token is taken away: one that has halted is multiplied by 0, and hidden from attention as a key.

    Args:
        gamma: Scale of the halting score, ``sigmoid(gamma · x[0] + beta)`` of a token's first channel.
        beta: Its shift.
        rest: A token halts where its cumulated score reaches ``1 − rest``.
        hide: How a token is hidden: ``additive`` adds a large negative number to the scores, ``fill`` writes it.
        pool: What is classified: the class token's output, or the mean over all tokens.
        sizes: Other arguments of :class:`PlainViT`.
    """

    def __init__(
        self, *, gamma: float = 5.0, beta: float = -2.0, rest: float = 0.01, hide: str = "additive",
        pool: str = "class", **sizes: int,
    ) -> None:  # fmt: skip
        super().__init__(**sizes)
        self.gamma, self.beta, self.rest, self.hide, self.pool = gamma, beta, rest, hide, pool

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        cumulated = torch.zeros_like(x[..., 0])
        left, mask = torch.ones_like(cumulated), torch.ones_like(cumulated)
        output = torch.zeros_like(x)
        for layer, block in enumerate(self.blocks, 1):
            x = self.advance(block, x * mask.unsqueeze(-1), mask)
            score = torch.sigmoid(self.gamma * x[..., 0] + self.beta)
            if layer == len(self.blocks):
                score = torch.ones_like(score)
            state = x * mask.unsqueeze(-1)
            cumulated = cumulated + score
            halts = (cumulated >= 1 - self.rest).to(x.dtype) * mask
            goes_on = (cumulated < 1 - self.rest).to(x.dtype)
            output = output + state * (left * halts).unsqueeze(-1) + state * (score * goes_on).unsqueeze(-1)
            left = left - score * goes_on
            mask = goes_on
        if self.pool == "mean":
            return self.head(self.norm(output).mean(1))
        return self.classify(output)

    def advance(self, block: Block, x: Tensor, mask: Tensor) -> Tensor:
        """A block in which tokens with ``mask`` ``[B, N]`` of 0 are attended to by none."""
        q, k, v = block.attn.parts(block.norm1(x))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.hide == "additive":
            scores = scores + (1 - mask)[:, None, None] * -1e4
        else:
            scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        return block.feed(x + block.attn.mix(scores.softmax(-1), v))


# -- weights and inputs -----------------------------------------------------------------------------------------------

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "evit": lambda: EViT(fuse=False),
    "evit_fused": lambda: EViT(fuse=True),
    "dynamic_vit": lambda: DynamicViT(side=28, patch=2),
    "tome": ToMe,
    "mctf": MCTF,
}
"""Name → the model as it was recorded. DynamicViT's authors fix 14 × 14 patches."""


def side_of(name: str) -> tuple[int, int]:
    """Pixels of the image and of a patch that a recorded model takes."""
    return (28, 2) if name == "dynamic_vit" else (32, 4)


SCALES: Mapping[str, float] = {"diffuse": 1.0, "concentrated": 12.0}
"""What queries are multiplied by: diffuse attention hides errors in fused tokens."""


def drawn(shapes: Mapping[str, Sequence[int]], kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Weights by name, the same on every machine: uniform numbers, in the order of the names.

    Args:
        shapes: Name → shape. A norm's scale is around 1, all biases are drawn too.
        kind: Of :data:`SCALES`, or ``ties``: diffuse, with all patches at one position.
        seed: Of numpy's frozen Mersenne Twister.
    """
    generator = np.random.RandomState(seed)
    found = {}
    for name, shape in sorted(shapes.items()):
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        values = generator.random_sample(tuple(shape)) * 2 - 1
        if len(shape) == 1:
            values = values * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif len(shape) == 3:
            values = values * 0.5
        else:
            values = values * math.sqrt(3 / fan_in)
        if name.endswith("attn.qkv.weight"):
            values[: len(values) // 3] *= SCALES.get(kind, 1.0)
        if name == "pos_embed" and kind == "ties":
            values[:, 2:] = values[:, 1:2]
        found[name] = torch.from_numpy(values.astype(np.float32))
    return found


def images(kind: str, count: int, side: int, patch: int, seed: int = 1) -> Tensor:
    """Images ``[count, 3, side, side]``; of kind ``ties`` every second patch repeats the one before it exactly."""
    values = np.random.RandomState(seed).random_sample((count, 3, side, side)) * 4 - 2
    if kind == "ties":
        strips = values.reshape(count, 3, side, side // patch, patch)
        strips[:, :, :, 1::2] = strips[:, :, :, ::2]
    return torch.from_numpy(values.astype(np.float32))
