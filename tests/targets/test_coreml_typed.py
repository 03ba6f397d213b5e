"""A program that says its types is converted with these: numbers of Python do not make it fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.pipeline import run_pipeline
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.coreml.mil import MilSummary, read_package

ROWS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).half()
BIAS = torch.randn(8, generator=torch.Generator().manual_seed(2)).half()


class Half(nn.Module):
    """A function of fp16 as a model of fp32."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.half()).float()


def converted(function: Callable[[Tensor], Tensor], folder: Path) -> MilSummary:
    brief = Brief(CoreMLOptions())
    program = captured(Half(function), ROWS, dynamic=False)
    program, _ = run_pipeline(program, [Canonicalize(), *CoreMLTarget().program_passes(brief)], gate=None)
    return read_package(folder / CoreMLTarget().lower(program, folder, brief).path)


def in_single(found: MilSummary) -> set[str]:
    """Operators that give fp32, without the cast of the output."""
    return {op.type for op in found.operations if "FLOAT32" in op.dtypes and op.type != "cast"}


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda x: 0.3 - (x * 0.1 + 0.2 - 0.7),
    "powers": lambda x: x.abs() ** 1.5 + 2.0**x,
    "quotients": lambda x: x / 3.0 + x / (x.abs() + 1) + 1.0 / (x.abs() + 2),
    "bounds": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp_min(0.2) + x.clamp_max(0.3),
    "scalar": lambda x: x * torch.tensor(0.3).exp(),
    "activations": lambda x: F.gelu(x, approximate="tanh") + F.hardtanh(x, -0.5, 0.5) + F.selu(x) + F.softsign(x),
    "logarithms": lambda x: x.abs().log2() + x.expm1() + x.abs().log10(),
    "norms": lambda x: F.layer_norm(x, (8,), BIAS, BIAS) + F.group_norm(x, 2) + x.var(-1, keepdim=True),
    "addmm": lambda x: torch.addmm(BIAS, x[0] * 0.5, WEIGHT) + torch.addmm(BIAS, x[1], WEIGHT, beta=0.5, alpha=2),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :6], x * 0.3, torch.baddbmm(x, x @ x.mT, x, beta=2, alpha=0.3).mT),
    "attention": lambda x: F.scaled_dot_product_attention(x / (x.abs() + 1) * 0.5, x, x, attn_mask=x[:, :, :6]),
    "normalize": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(0.01),
    "padding": lambda x: F.pad(x, (1, 1), value=0.5),
    "made": lambda x: x + x.new_full((8,), 0.1) + torch.full_like(x, 0.1) + torch.arange(8, dtype=torch.half),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_is_half_when_the_program_says_so(name: str, tmp_path: Path) -> None:
    assert in_single(converted(FUNCTIONS[name], tmp_path)) <= {"fill", "fill_like", "range_1d"}


@pytest.mark.parametrize(
    ("function", "single"),
    [
        (lambda x: x * 1e-7 * 0.5, {"mul"}),
        (lambda x: (x + 1e6) * 0.5, {"add"}),
        (lambda x: x / 60000.0 * 0.5, {"mul"}),
        (lambda x: torch.div(x, 0.3, rounding_mode="floor") * 0.5, {"floor_div"}),
        (lambda x: x * x.float().mean() * 0.5, {"mul", "reduce_mean"}),
    ],
)
def test_operator_is_single_and_what_follows_half_when_half_cannot_hold_a_number(
    function: Callable[[Tensor], Tensor], single: set[str], tmp_path: Path
) -> None:
    found = converted(function, tmp_path)
    assert in_single(found) == single
    assert any(op.type == "mul" and op.dtypes == ("FLOAT16",) for op in found.operations)


def test_coremltools_is_as_it_was_when_a_conversion_is_done(tmp_path: Path) -> None:
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil import Builder

    def parts() -> list[Any]:
        return [Builder.__dict__["_add_op"], ops.promote_input_dtypes, type(ops._TORCH_OPS_REGISTRY).get_func]

    before = parts()
    converted(lambda x: x * 0.5, tmp_path)
    assert parts() == before
