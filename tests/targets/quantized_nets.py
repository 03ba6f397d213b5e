"""A small transformer and a small convolutional net, quantized by the scheme of a target and typed as a build does."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.harness import captured
from tests.passes.quantizing import Mixed, images
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.methods import Method
from vlexport.core.scheme import QuantScheme
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.cast_floats import CastFloats
from vlexport.passes.fold_casts import FoldCasts
from vlexport.passes.quantization.decide import wanted_values
from vlexport.passes.quantize import Quantize
from vlexport.targets import open_target
from vlexport.targets.base import Brief


class TinyViT(nn.Module):
    """A block of attention over 16 patches, width 64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.patches, self.place = nn.Conv2d(3, 64, 4, 4), nn.Parameter(torch.randn(1, 16, 64) * 0.1)
        self.first, self.second, self.head = nn.LayerNorm(64), nn.LayerNorm(64), nn.Linear(64, 10)
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(a, b) for a, b in ((64, 192), (64, 64), (64, 128), (128, 64))
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.first(x)).reshape(-1, 16, 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, 64)
        x = x + self.out(seen)
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return self.head(x.mean(1))


class Residual(nn.Module):
    """As a ResNet: a block that adds what it was given, and one that adds a convolution of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.short, self.third, self.last = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 32, 3, 1, 1), nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(image).relu(), 2)
        x = (x + self.second(self.first(x).relu())).relu()
        x = (self.last(self.third(x).relu()) + self.short(x)).relu()
        return self.head(x.mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {"vit": TinyViT, "cnn": Mixed, "resnet": Residual}


def scheme_of(target: str, name: str) -> QuantScheme:
    return next(each for each in open_target(target).schemes() if each.id == name)


@cache
def program_of(net: str) -> Program:
    program = captured(NETS[net]().eval(), images(1, 0), dynamic=False)
    Canonicalize().run(program)
    return program


@cache
def quantized(net: str, target: str, name: str) -> Program:
    """As ``quantize_component`` makes it, without gates."""
    program, scheme, made = program_of(net), scheme_of(target, name), open_target(target)
    ranges = {}
    if scheme.kind == "static":
        samples = dataset(images(16, 1).numpy(), program)
        ranges = calibrate(program, samples, wanted_values(program, scheme), Method(name="min-max")).by_value()
    after = program.copy()
    Quantize(scheme=scheme, ranges=ranges, emit=made.emit_quant).run(after)
    if made.float_precision(scheme.precision) == "fp16":
        CastFloats(samples=[(images(1, 2),)]).run(after)
        FoldCasts().run(after)
    for each in made.quantized_passes(scheme, min_sqnr_db=10.0):
        each.run(after)
    for each in made.program_passes(Brief(made.check_options({}), precision=scheme.precision)):
        each.run(after)
    return after
