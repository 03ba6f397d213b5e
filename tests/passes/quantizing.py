"""Small models to quantize, and their ranges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.harness import captured
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.methods import Method
from vlexport.calibration.table import CalibrationTable
from vlexport.core.scheme import QuantScheme, read_schemes
from vlexport.ir.program import Program
from vlexport.passes.quantization.decide import wanted_values
from vlexport.passes.quantize import Quantize, QuantizeOptions
from vlexport.targets.onnxruntime.emit_quant import emit_quant

SCHEMES = {each.id: each for each in read_schemes("vlexport.targets.onnxruntime")}
IMAGE = (3, 16, 16)


class Mixed(nn.Module):
    """Convolutions that are joined, then a residual block of linears over tokens, then a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 8, 1)
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24, bias=False)
        self.head = nn.Linear(24, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        x = torch.cat([self.left(x), self.right(x)], 1).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Joined(nn.Module):
    """A convolution reads the join of two others: all three values share a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.left, self.right, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        joined = torch.cat([self.left(image), self.right(image)], 1)
        return self.last(nn.functional.max_pool2d(joined, 2))


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def ranges(
    program: Program, scheme: QuantScheme, values: Tensor | None = None, method: str = "min-max"
) -> CalibrationTable:
    found = Method.model_validate({"name": method})
    return calibrate(
        program,
        dataset((images(16, 1) if values is None else values).numpy(), program),
        wanted_values(program, scheme),
        found,
    )


def quantizer(
    program: Program, scheme: str = "static-u8s8", table: CalibrationTable | None = None, **options: object
) -> Quantize:
    chosen = SCHEMES[scheme]
    found = ranges(program, chosen) if table is None else table
    return Quantize(
        QuantizeOptions.model_validate(options), scheme=chosen, ranges=found.by_value(), emit=emit_quant
    )  # fmt: skip


def program_of(module: nn.Module) -> Program:
    return captured(module.eval(), images(2, 0))
