"""Small transformers, each spelled in its own way, lowered to ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from tests.harness import captured, randomize
from tests.passes.quantizing import SCHEMES, ranges
from vlexport.ir.program import Program
from vlexport.passes.quantize import Quantize, QuantizeOptions
from vlexport.targets.onnx.lower import onnx_from_program, write_onnx
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.emit_quant import emit_quant

WIDTH, HEADS, TOKENS = 24, 3, 5


class Packed(nn.Module):
    """Query, key and value from one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        packed = self.qkv(self.norm(image)).reshape(batch, tokens, 3, HEADS, width // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        made = self.attend(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(made)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value)


class Scaled(Packed):
    """With a scale of its own."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=0.21)


class Spelled(Packed):
    """Without the operator for it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.transpose(-1, -2) / 3.0, -1) @ value


class Masked(Packed):
    """A constant bias is added to the scores."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = torch.linspace(-1.0, 1.0, TOKENS * TOKENS).reshape(TOKENS, TOKENS)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias)


class Causal(Packed):
    """Each token looks at itself and those before it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Placed(Packed):
    """Each head has a learnt bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=self.bias.unsqueeze(0))


class Padded(Packed):
    """Tokens with a negative first number are no tokens; a sample may have none at all."""

    def forward(self, image: Tensor, kept: Tensor | None = None) -> Tensor:
        self.kept = image[:, None, None, :, 0] > 0 if kept is None else kept
        return super().forward(image)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=self.kept)


class Layers(nn.Module):
    """Two layers that share a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Padded(), Padded()

    def forward(self, image: Tensor) -> Tensor:
        kept = image[:, None, None, :, 0] > 0
        return self.second(self.first(image, kept), kept)


class HeadMasked(Packed):
    """Each head has a mask of its own, made of the input."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=query[..., :1] > 0)


class FirstQuery(Packed):
    """The first token alone asks."""

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        packed = self.qkv(self.norm(image)).reshape(batch, tokens, 3, HEADS, width // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(query[:, :, :1], key, value).transpose(1, 2).reshape(batch, 1, width))


class Reversed(FirstQuery):
    """Queries stand in another order than keys."""

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        packed = self.qkv(self.norm(image)).reshape(batch, tokens, 3, HEADS, width // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        turned = torch.cat([query[:, :, 1:], query[:, :, :1]], 2)
        return self.out(self.attend(turned, key, value).transpose(1, 2).reshape(batch, tokens, width))


class ScaledValues(Packed):
    """Values are scaled behind their projection."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value * 0.5)


class Apart(nn.Module):
    """Query, key and value from linears of their own; the key has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        read = self.norm(image)
        made = [each(read) for each in (self.query, self.key, self.value)]
        query, key, value = (each.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for each in made)
        joined = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(gelu(joined))


class Crossed(Apart):
    """Keys are projected from another value."""

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        read = self.norm(image)
        made = [self.query(read), self.key(image), self.value(read)]
        query, key, value = (each.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for each in made)
        joined = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(joined)


class Watched(Apart):
    """What the query is projected to is returned, too."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        batch, tokens, width = image.shape
        read = self.norm(image)
        made = [each(read) for each in (self.query, self.key, self.value)]
        query, key, value = (each.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for each in made)
        joined = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(joined), made[0]


class Pooled(nn.Module):
    """Keys and values are of every second token; a head's values are twice as wide as its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.key = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        read = self.norm(image)
        made = [self.query(read), self.key(read[:, ::2]), self.value(read[:, ::2])]
        query, key, value = (each.reshape(batch, each.shape[1], HEADS, -1).transpose(1, 2) for each in made)
        joined = self.attend(query, key, value).transpose(1, 2).reshape(batch, tokens, 2 * width)
        return image + self.out(joined)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value)


class PlacedPooled(Pooled):
    """With a learnt bias a head, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, TOKENS, (TOKENS + 1) // 2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=self.bias.unsqueeze(0), scale=0.3)


class MaskedPooled(Pooled):
    """With a bias that depends on the query."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=query[:, :1, :, :1].tanh())


class ClassQuery(nn.Module):
    """The first token alone asks; keys and values of each head lie side by side in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        query = self.query(image[:, :1]).reshape(batch, 1, HEADS, -1).transpose(1, 2)
        pair = self.pairs(image)
        key, value = pair.reshape(batch, tokens, HEADS, -1).transpose(1, 2).split(width // HEADS, -1)
        return self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, 1, width))

    def pairs(self, image: Tensor) -> Tensor:
        found: Tensor = self.pair(image)
        return found


class SharedPair(ClassQuery):
    """The linear of keys and values is read once more."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + self.pairs(image)[..., :WIDTH].mean(1, keepdim=True)

    def pairs(self, image: Tensor) -> Tensor:
        self.kept = super().pairs(image) if image is not getattr(self, "image", None) else self.kept
        self.image = image
        return self.kept


class Windowed(Packed):
    """Tokens of all samples attend to each other."""

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        packed = self.qkv(self.norm(image)).reshape(1, batch * tokens, 3, HEADS, width // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        made = self.attend(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return image + self.out(made)


class Side(nn.Module):
    """Several nets that read one input; their outputs one after the other."""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, image: Tensor) -> list[Tensor]:
        made: list[Tensor] = []
        for net in self.nets:
            found = net(image)
            made += [found] if isinstance(found, Tensor) else list(found)
        return made


def tokens(batch: int, seed: int = 0) -> Tensor:
    """(batch, tokens, width)."""
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def program_of(*kinds: type[nn.Module]) -> Program:
    """Side by side, captured with seeded weights and a dynamic batch."""
    return captured(randomize(Side(*(kind() for kind in kinds)).eval()), tokens(2))


def quantized(program: Program, scheme: str) -> Program:
    """In integers, by a scheme of the target."""
    made, chosen = program.copy(), SCHEMES[scheme]
    dynamic = chosen.kind == "dynamic"
    found = {} if dynamic else ranges(program, chosen, tokens(16, 1)).by_value()
    options = QuantizeOptions(activations="dynamic" if dynamic else "static")
    Quantize(options, scheme=chosen, ranges=found, emit=emit_quant).run(made)
    return made


def lowered(program: Program, *, opset: int = 20) -> OnnxModel:
    """As a lowered pass gets it."""
    return OnnxModel(onnx_from_program(program, opset=opset), program.signature)


def computed(model: OnnxModel, file: Path, values: Tensor) -> list[np.ndarray]:
    """Outputs at ONNX Runtime's lowest level."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    write_onnx(model.model, file.parent, file=file.name)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    return found
