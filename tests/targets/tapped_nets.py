"""Attention of which others read a part: a row of the class token, keys, values, and what no operator gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.targets.attention_nets import HEADS, TOKENS, WIDTH, Apart, Packed

SCALE = (WIDTH // HEADS) ** -0.5


class Tapped(Packed):
    """Something else is computed of query, key and value, before the attention."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        batch, tokens, width = image.shape
        packed = self.qkv(self.norm(image)).reshape(batch, tokens, 3, HEADS, width // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        beside = self.beside(query, key, value)
        made = self.attend(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(made), beside

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError


class ClassRow(Tapped):
    """How much the class token attends to each."""

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query[:, :, :1] @ key.transpose(-1, -2) * SCALE, -1).mean((1, 2))


class WeighedRow(ClassRow):
    """The same where tokens count as several, which is added to the scores of both."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(1, 1, 1, TOKENS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=self.weights)

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query[:, :, :1] @ key.transpose(-1, -2) * SCALE + self.weights
        return torch.softmax(scores, -1).mean((1, 2))


class PaddedRow(ClassRow):
    """The same where a mask may leave a row nothing to look at."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.kept = image[:, None, None, :, 0] > 0
        return super().forward(image)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=self.kept)


class MeanKeys(Tapped):
    """What merging compares tokens by."""

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return key.mean(1)


class LastRowOfAll(Tapped):
    """A query in the middle beside keys and values, these the other way round."""

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([query[:, :, 3:4] @ key.transpose(-1, -2), value.permute(0, 1, 3, 2).cumsum(-1)], 2)


class ApartRow(Apart):
    """A row of the class token where query, key and value have linears of their own."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        batch, tokens, width = image.shape
        read = self.norm(image)
        made = [each(read) for each in (self.query, self.key, self.value)]
        query, key, value = (each.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for each in made)
        row = torch.softmax(query[:, :, :1] @ key.transpose(-1, -2) * SCALE, -1).mean((1, 2))
        joined = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(joined), row


class TwoQueries(Tapped):
    """Queries of two tokens are read."""

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query[:, :, :2].exp()


class FewKeys(Tapped):
    """Keys of some tokens are read."""

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return key[:, :, 1:].exp()


class GivenKeys(Tapped):
    """Keys are an output."""

    def beside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return key


class ScaledKeys(Tapped):
    """What is read is half of the keys, as what the scores are computed of."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, width = image.shape
        packed = self.qkv(self.norm(image)).reshape(batch, tokens, 3, HEADS, width // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        key = key * 0.5
        made = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
        return image + self.out(made.transpose(1, 2).reshape(batch, tokens, width)), key.exp()


class Narrow(Tapped):
    """Values are of half the width of keys, which are read."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH + half), nn.Linear(half, WIDTH)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, width = image.shape
        made = self.qkv(self.norm(image)).split([width, width, width // 2], -1)
        query, key, value = (each.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for each in made)
        joined = self.attend(query, key, value).transpose(1, 2).reshape(batch, tokens, width // 2)
        return image + self.out(joined), key.mean(1)
