"""reduce-tokens from outside: against references written for this file, and where merging must change nothing.

Tokens that are equal can be merged without any loss, when attention knows how many each stands for: so a picture whose
patches come in pairs, in a model without positions, is reduced to half of its tokens *exactly*. That holds whatever the
spelling, and needs no reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, one_thread
from tests.zoo_target_models import OfPixels
from vlexport.core.numerics import relative_error
from vlexport.core.tokens import tokens_from_text
from vlexport.ir import dialect
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.base import STAGES
from vlexport.passes.tokens.blocks import find_encoder

WIDTH, HEADS, DEPTH, PATCH, GRID = 24, 2, 3, 4, 4
PATCHES = GRID * GRID
ATTENTION = "aten.scaled_dot_product_attention.default"
HOSTILE = ("scatter", "nonzero", "sort", "masked_select", "index_put")
TOLERANCE = 2e-5
"""float32, three blocks; measured below 3e-6."""


class Block(nn.Module):
    def __init__(self, fused: bool, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scaled = scaled
        if scaled:
            self.scale1, self.scale2 = (nn.Parameter(torch.rand(WIDTH) + 0.3) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, channels) each."""
        normed = self.norm1(x)
        if self.fused:
            q, k, v = self.qkv(normed).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (each(normed).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        return q, k, v

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        mixed = self.proj(mixed)
        return x + (mixed * self.scale1 if self.scaled else mixed)

    def widen(self, x: Tensor) -> Tensor:
        made = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (made * self.scale2 if self.scaled else made)

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.attend(x))


class Vit(nn.Module):
    """A plain vision transformer; ``front`` tokens stand before the patches, the first is the class token."""

    def __init__(self, *, fused: bool = True, scaled: bool = False, front: int = 1, reads: str = "class") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.front = nn.Parameter(torch.randn(1, front, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, front + PATCHES, WIDTH))
        self.blocks = nn.ModuleList([Block(fused, scaled) for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.reads = reads

    def embed(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        return torch.cat((self.front.expand(image.shape[0], -1, -1), x), 1) + self.positions

    def read(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.reads == "class":
            return self.head(x[:, 0])
        if self.reads == "mean":
            return self.head(x[:, self.front.shape[1] :].mean(1))
        return self.head(x[:, : self.front.shape[1]] if self.reads == "front" else x)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.read(x)


def vit(**options: Any) -> Vit:
    """With concentrated attention: a few tokens get nearly all of it."""
    torch.manual_seed(1)
    made = Vit(**options)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
        for block in made.blocks:
            if block.fused:
                block.qkv.weight[: 2 * WIDTH] *= 3
            else:
                block.q.weight.mul_(3)
                block.k.weight.mul_(3)
    return made.eval()


def _eva(pool: str) -> Any:
    """EVA-01 as timm has it: no rotary positions, biases of query and value apart from the weight, none of keys."""
    from timm.models.eva import Eva

    torch.manual_seed(5)
    made = Eva(
        img_size=GRID * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=6144 / 1408,
        num_classes=5, global_pool=pool,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("bias", "_embed", "_token")) or (name.endswith("weight") and parameter.ndim == 2):
                parameter.normal_(std=0.3)
    return made


class EvaBlock(nn.Module):
    """A block of EVA-01 in the halves that references ask for."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.block.attn
        bias = torch.cat((attn.q_bias, torch.zeros(WIDTH), attn.v_bias))
        made = F.linear(self.block.norm1(x), attn.qkv.weight, bias)
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in made.chunk(3, -1))
        return q, k, v

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        made: Tensor = x + self.block.attn(self.block.norm1(x), attn_mask=mask)
        return made

    def widen(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.block.mlp(self.block.norm2(x))
        return made


class EvaVit(nn.Module):
    """EVA-01 whose head reads the class token, with the parts that references ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _eva("token")
        self.front = self.net.cls_token
        self.blocks = nn.ModuleList(EvaBlock(each) for each in self.net.blocks)

    def embed(self, image: Tensor) -> Tensor:
        made: Tensor = self.net._pos_embed(self.net.patch_embed(image))[0]
        return made

    def read(self, x: Tensor) -> Tensor:
        made: Tensor = self.net.forward_head(self.net.norm(x))
        return made

    def forward(self, image: Tensor) -> Tensor:
        made: Tensor = self.net(image)
        return made


def pictures(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(seed))


def prepared(program: Program) -> Program:
    """After every pass up to the stage tokens."""
    after = program.copy()
    for name in CATALOGUE:
        earlier = pass_class(name)
        if STAGES.index(earlier.stage) < STAGES.index("tokens"):
            earlier().run(after)
    return after


def reduced(program: Program, tokens: str) -> Program:
    """A prepared program as ``--tokens`` builds it."""
    request = tokens_from_text(tokens)
    kind = pass_class(request.pass_name)
    after = program.copy()
    changes, misses = kind(kind.Options.model_validate(request.values)).run(after)
    assert changes, [miss.reason for miss in misses]
    return after


def error(program: Program, image: Tensor, expected: Tensor) -> float:
    with torch.inference_mode(), one_thread():
        (found,) = program.run(image)
    assert found.shape == expected.shape
    return relative_error(found.numpy(), expected.numpy())


# -- references ---------------------------------------------------------------------------------------------------


def evit(net: Vit | EvaVit, image: Tensor, keep: float, layers: tuple[int, ...], fuse: bool) -> Tensor:
    """One sample after the other, one token after the other."""
    outputs = []
    for each in image:
        x, front = net.embed(each[None]), net.front.shape[1]
        for number, block in enumerate(net.blocks, 1):
            q, k, _ = block.heads(x)
            x = block.attend(x)
            if number in layers:
                scores = (q[0, :, :1] @ k[0].transpose(1, 2))[:, 0] / math.sqrt(WIDTH // HEADS)
                seen = scores.softmax(-1)
                weight = seen.mean(0)[front:]
                order = sorted(range(len(weight)), key=lambda token: -float(weight[token]))
                kept = order[: math.ceil(keep * len(weight))]
                rows = [x[0, :front], *(x[0, front + token][None] for token in kept)]
                if fuse:
                    rest = order[len(kept) :]
                    rows.append(sum(weight[token] * x[0, front + token] for token in rest)[None])
                x = torch.cat(rows)[None]
            x = block.widen(x)
        outputs.append(net.read(x))
    return torch.cat(outputs)


def tome(net: Vit | EvaVit, image: Tensor, counts: tuple[int, ...]) -> Tensor:
    """One sample after the other, one pair after the other."""
    outputs = []
    for each in image:
        x, front = net.embed(each[None]), net.front.shape[1]
        sizes = [1.0] * x.shape[1]
        for block, count in zip(net.blocks, counts, strict=True):
            _, k, _ = block.heads(x)
            x = block.attend(x, torch.tensor(sizes).log().expand(1, HEADS, x.shape[1], x.shape[1]))
            if count:
                x, sizes = _merged(x, k[0].mean(0), sizes, count, front)
            x = block.widen(x)
        outputs.append(net.read(x))
    return torch.cat(outputs)


def _merged(x: Tensor, keys: Tensor, sizes: list[float], count: int, front: int) -> tuple[Tensor, list[float]]:
    unit = keys / keys.norm(dim=-1, keepdim=True)
    sources, targets = range(0, x.shape[1], 2), range(1, x.shape[1], 2)
    best = {}
    for source in sources:
        if source >= front:
            best[source] = max(
                ((float(unit[source] @ unit[target]), target) for target in targets if target >= front),
                key=lambda pair: pair[0],
            )
    gone = sorted(best, key=lambda source: -best[source][0])[:count]
    sums = {token: x[0, token] * sizes[token] for token in range(x.shape[1])}
    weights = dict(enumerate(sizes))
    for source in gone:
        target = best[source][1]
        sums[target] = sums[target] + x[0, source] * sizes[source]
        weights[target] += sizes[source]
    left = [token for token in (*sources, *targets) if token not in gone]
    # Class and registers stay in front, whatever half they fell into: what reads them finds them at their places.
    left.sort(key=lambda token: (token >= front, token if token < front else 0))
    return torch.stack([sums[token] / weights[token] for token in left])[None], [weights[token] for token in left]


SPELLINGS: dict[str, dict[str, Any]] = {
    "fused": {},
    "separate": {"fused": False},
    "scaled": {"scaled": True},
    "registers": {"fused": False, "scaled": True, "front": 4},
    "registers read": {"front": 3, "reads": "front"},
}
EVA = "eva-01"


@cache
def subject(name: str) -> tuple[Vit | EvaVit, Program]:
    net = EvaVit().eval() if name == EVA else vit(**SPELLINGS[name])
    return net, prepared(captured(net, pictures(2)))


@cache
def without_places() -> tuple[nn.Module, Program]:
    """A plain one without positions, prepared."""
    net = without_positions(vit())
    return net, prepared(captured(net, pictures(2)))


@pytest.mark.parametrize(
    ("name", "fuse"), [*((name, True) for name in (*SPELLINGS, EVA)), ("fused", False), ("registers", False)]
)
def test_evit_equals_the_reference_when_attention_is_concentrated(name: str, fuse: bool) -> None:
    net, program = subject(name)
    after = reduced(program, f"evit:keep=0.6,layers=2+3,fuse={str(fuse).lower()}")
    for batch in (1, 2, 8):
        image = pictures(batch, seed=batch)
        with torch.inference_mode(), one_thread():
            expected = evit(net, image, 0.6, (2, 3), fuse)
        assert relative_error(expected.numpy(), net(image).detach().numpy()) > 0.001, "nothing was lost: a blind test"
        assert error(after, image, expected) <= TOLERANCE


@pytest.mark.parametrize("name", [*SPELLINGS, EVA])
def test_tome_equals_the_reference_when_attention_is_concentrated(name: str) -> None:
    net, program = subject(name)
    after = reduced(program, "tome:r=3+0+2")
    for batch in (1, 2, 8):
        image = pictures(batch, seed=batch)
        with torch.inference_mode(), one_thread():
            expected = tome(net, image, (3, 0, 2))
        assert relative_error(expected.numpy(), net(image).detach().numpy()) > 0.001, "nothing was lost: a blind test"
        assert error(after, image, expected) <= TOLERANCE


# -- equal tokens -------------------------------------------------------------------------------------------------


def paired(batch: int, front: int, patches: int = PATCHES, size: int = GRID * PATCH) -> Tensor:
    """Pictures whose patches are equal in pairs, of which one falls into either half of a bipartite matching."""
    side = math.isqrt(patches)
    patch = size // side
    drawn = torch.randn(batch, patches, 3, patch, patch, generator=torch.Generator().manual_seed(3))
    first = front % 2  # an even place, then an odd one
    for j in range(first, patches - 1, 2):
        drawn[:, j + 1] = drawn[:, j]
    return drawn.reshape(batch, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, size, size)


def without_positions(net: nn.Module) -> nn.Module:
    """Position embeddings are zero; biases are not, nor is anything else."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        found = 0
        for name, parameter in net.named_parameters():
            if "position" in name or "pos_embed" in name:
                parameter.zero_()
                found += 1
            elif name.endswith("bias"):
                parameter.normal_(std=0.3, generator=generator)
    assert found
    return net.eval()


def _transformers(kind: str, output: str) -> nn.Module:
    import transformers

    shared: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        "initializer_range": 0.2,
    }  # fmt: skip
    wide = {**shared, "intermediate_size": 64}
    torch.manual_seed(4)
    made: nn.Module = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**wide)),
        "dinov2_registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**shared, num_register_tokens=4, layerscale_value=0.7)
        ),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**wide)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**wide)),
    }[kind]()
    return OfPixels(without_positions(made), (output,))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "class": (lambda: without_positions(vit()), 1),
    "registers": (lambda: without_positions(vit(front=4, scaled=True, fused=False)), 4),
    "mean": (lambda: without_positions(vit(reads="mean")), 1),
    "every token": (lambda: without_positions(vit(reads="all")), 1),
    "vit, every token": (lambda: _transformers("vit", "last_hidden_state"), 1),
    "dinov2 with registers": (lambda: _transformers("dinov2_registers", "pooler_output"), 5),
    "clip": (lambda: _transformers("clip", "pooler_output"), 1),
    "siglip": (lambda: _transformers("siglip", "pooler_output"), 0),
    "eva-01, mean": (lambda: without_positions(_eva("avg")), 1),
}
"""What merging must not change, with the tokens in front of its patches."""


@cache
def family(name: str) -> tuple[Program, Program]:
    """As captured, and prepared."""
    make, front = FAMILIES[name]
    program = captured(make(), paired(3, front)[:2])
    return program, prepared(program)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_lost_when_equal_tokens_are_merged(name: str) -> None:
    front = FAMILIES[name][1]
    image = paired(3, front)
    pairs = (PATCHES - front % 2) // 2
    program, ready = family(name)
    after = reduced(ready, f"tome:r={pairs},layers=1")
    assert cost(after).macs < 0.8 * cost(program).macs
    with torch.inference_mode(), one_thread():
        (expected,) = program.run(image)
    assert error(after, image, expected) <= TOLERANCE
    # And something is, when they differ: the merge is real.
    other = pictures(3)
    with torch.inference_mode(), one_thread():
        (dense,) = program.run(other)
    assert error(after, other, dense) > 1e-4


@pytest.mark.parametrize("name", [name for name, (_, front) in FAMILIES.items() if front])
def test_nothing_is_lost_when_patches_of_one_colour_are_squeezed(name: str) -> None:
    """All patches are equal: whatever stays stands for all of them. The spelling is that of each family."""
    program, ready = family(name)
    after = reduced(ready, "evit:keep=0.4,layers=1,squeeze=true")
    assert cost(after).macs < 0.85 * cost(program).macs
    image = torch.tensor([0.5, -1.0, 2.0])[:, None, None, None].expand(3, 3, GRID * PATCH, GRID * PATCH)
    with torch.inference_mode(), one_thread():
        (expected,) = program.run(image)
    assert error(after, image, expected) <= TOLERANCE
    other = pictures(3)
    with torch.inference_mode(), one_thread():
        (dense,) = program.run(other)
    assert error(after, other, dense) > 1e-4, "and something is where they differ"


@pytest.mark.parametrize(
    "tokens",
    ["evit:keep=0.6,layers=2+3", "evit:keep=0.6,layers=2+3,count=true", "evit:keep=0.6,layers=2+3,squeeze=true",
     "tome:r=5", "mctf:r=5"],
)  # fmt: skip
def test_output_is_that_of_any_order_when_all_tokens_tie(tokens: str) -> None:
    """Every patch is the same, so every score ties: which of them stay cannot matter, and nothing may be NaN."""
    net, program = without_places()
    after = reduced(program, tokens)
    image = torch.ones(2, 3, GRID * PATCH, GRID * PATCH) * torch.tensor([0.5, -1.0])[:, None, None, None]
    with torch.inference_mode(), one_thread():
        (found,) = after.run(image)
        alone = torch.cat([after.run(each[None])[0] for each in image])
    assert torch.isfinite(found).all()
    assert relative_error(found.numpy(), alone.numpy()) <= TOLERANCE
    if tokens.startswith("tome") or "true" in tokens:  # tokens are counted, so nothing at all is lost
        with torch.inference_mode():
            assert relative_error(found.numpy(), net(image).numpy()) <= TOLERANCE


@pytest.mark.parametrize("tokens", ["evit:keep=0.5,layers=1+3", "tome:r=4", "mctf:r=4", "random:keep=0.5,layers=2"])
def test_sample_gets_the_same_when_others_stand_beside_it(tokens: str) -> None:
    """Each sample selects for itself; the control keeps the same places for all."""
    _, program = subject("registers")
    after = reduced(program, tokens)
    image = pictures(8, seed=9)
    with torch.inference_mode(), one_thread():
        (together,) = after.run(image)
        alone = torch.cat([after.run(each[None])[0] for each in image])
    assert relative_error(together.numpy(), alone.numpy()) <= TOLERANCE


@pytest.mark.parametrize("tokens", ["evit:keep=0.5,layers=1+3", "tome:r=4", "mctf:r=4", "random:keep=0.5,layers=2"])
def test_graph_is_static_and_without_scatter_when_reduced(tokens: str) -> None:
    _, program = subject("separate")
    after = reduced(program, tokens)
    names = {dialect.plain_name(node) for node in after.calls()}
    assert not {name for name in names if any(word in name for word in HOSTILE)}
    assert [spec.shape for spec in after.signature.outputs] == [spec.shape for spec in program.signature.outputs]
    if not tokens.startswith("mctf"):  # it reads the whole map of attention, and spells it out
        assert len(after.calls(ATTENTION)) == len(program.calls(ATTENTION)) == DEPTH


class Clips(Vit):
    """A video's encoder: tubes of two frames are its tokens, places in time and on the grid are added one by one."""

    def __init__(self) -> None:
        super().__init__(reads="mean")
        self.tubes = nn.Conv3d(3, WIDTH, (2, PATCH, PATCH), (2, PATCH, PATCH))
        self.times = nn.Parameter(torch.randn(1, 2, 1, WIDTH))

    def embed(self, image: Tensor) -> Tensor:
        x = self.tubes(image).permute(0, 2, 3, 4, 1).flatten(2, 3) + self.positions[:, None, 1:] + self.times
        return torch.cat((self.front.expand(image.shape[0], -1, -1), x.flatten(1, 2)), 1)


def test_video_of_frames_and_patches_is_one_encoder() -> None:
    torch.manual_seed(7)
    clips = torch.randn(2, 3, 4, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    encoder, misses = find_encoder(prepared(captured(Clips().eval(), clips)))
    assert encoder is not None, misses
    assert (len(encoder.blocks), encoder.tokens, encoder.protected) == (DEPTH, 1 + 2 * PATCHES, 1)


def test_blocks_of_timm_are_found_with_all_tokens_at_the_front() -> None:
    import timm

    torch.manual_seed(8)
    net = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=3, reg_tokens=2, init_values=0.1
    )
    encoder, misses = find_encoder(prepared(captured(net.eval(), pictures(2))))
    assert encoder is not None, misses
    assert (len(encoder.blocks), encoder.tokens, encoder.protected) == (4, PATCHES + 3, 3)
