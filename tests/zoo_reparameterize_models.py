"""Models of the reparameterization zoo: each in the form in which it is trained, and as its authors merge it by hand.

Weights are random. Batch-norm statistics are randomised, biases are not zero, and whatever a constructor leaves
constant (scales of norms and layers) is drawn. Then each layer's weight is scaled so that what it makes of some
pictures has the spread that batch norms expect: without that, signals die or explode in depth, and an output that
hardly depends on the picture hides mistakes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlexport.frontends.architecture import factory_from_text

MODELS = (
    "repvgg_a0", "repvgg_a2", "mobileone_s0", "mobileone_s1", "mobileone_s2", "mobileone_s3", "mobileone_s4",
    "fastvit_t8", "fastvit_sa12", "fastvit_ma36", "fastvit_mci0", "repvit_m1_0", "repghostnet_100", "nextvit_small",
    "levit_128s", "efficientformer_l1", "efficientformerv2_s0", "edgenext_xx_small", "tiny_vit_5m_224",
    "mobilenetv4_hybrid_medium", "fmvit_small",
)  # fmt: skip
SMALL = "fmvit_tiny"
"""Of the FMViT sample, for a test."""
PICTURES = 8
"""Inputs over which outputs must vary."""


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        module: As it is trained, in eval mode.
        shape: Of one picture: channels, height, width.
        oracle: Makes the merged form of ``module`` by hand; leaves ``module`` as it is.
        switch: What ``oracle`` calls, in words.
    """

    module: nn.Module
    shape: tuple[int, int, int]
    oracle: Callable[[nn.Module], nn.Module]
    switch: str


def subject(name: str) -> Subject:
    """A model with random weights."""
    torch.manual_seed(0)
    if name.startswith("fmvit"):
        from samples.zoo.fmvit.merge import merged
        from samples.zoo.fmvit.model import SMALL, TINY, FMViT

        config, size = (TINY, 32) if name == "fmvit_tiny" else (SMALL, 224)
        return Subject(_lively(FMViT(config), (3, size, size)), (3, size, size), merged, "samples/zoo/fmvit/merge.py")
    made = factory_from_text(f"timm:{name}")
    channels, height, width = made.inputs.shape[1:]
    return Subject(_lively(made.module, (channels, height, width)), (channels, height, width), _by_timm, "timm")


def pictures(shape: tuple[int, int, int], count: int = PICTURES, seed: int = 7) -> torch.Tensor:
    """Blurred noise of different scales, colours and contrasts: averages over white noise would all be the same."""
    generator = torch.Generator().manual_seed(seed)
    channels, *sizes = shape
    drawn = []
    for index in range(count):
        grain = torch.randn(1, channels, 2 + index, 3 + index, generator=generator)
        coarse = F.interpolate(grain, size=sizes, mode="bilinear", align_corners=False)
        colour = torch.randn(1, channels, 1, 1, generator=generator)
        drawn.append(coarse * (0.5 + index / 4) + colour + 0.3 * torch.randn(1, *shape, generator=generator))
    return torch.cat(drawn)


def _by_timm(module: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(copy.deepcopy(module))


def _lively(module: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Draw everything that is constant, then scale the weight of each layer as it is first reached."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.running_mean is not None:
                each.running_mean.normal_(0, 0.3, generator=generator)
                each.running_var.uniform_(0.5, 1.5, generator=generator)
        for parameter in module.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0, 0.1, generator=generator)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.uniform_(0.5, 1.5, generator=generator)
    reached: set[nn.Module] = set()

    def scale(layer: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor | None:
        if layer in reached:
            return None
        reached.add(layer)
        spread = float(output.flatten(1).std(0).mean())
        if spread < 1e-6:  # a table of positions: nothing of the picture comes here
            return None
        bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * _behind_channels(layer, output))
        layer.weight.div_(spread)
        return (output - bias) / spread + bias

    hooks = [each.register_forward_hook(scale) for each in module.modules() if isinstance(each, _LAYERS)]
    with torch.no_grad():
        module.eval()(pictures(shape, 4, seed=3))
    for hook in hooks:
        hook.remove()
    return module


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def _behind_channels(layer: nn.Module, output: torch.Tensor) -> int:
    """Axes of an output behind that of its channels."""
    return 0 if isinstance(layer, nn.Linear) else output.ndim - 2
