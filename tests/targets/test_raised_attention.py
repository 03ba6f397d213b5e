"""What raise-attention makes lowers to every target, in every form of mask, scale and shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.artifact import DimRange
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.pipeline import run_pipeline
from vlexport.passes.raise_attention import RaiseAttention
from vlexport.targets.base import Brief, Target
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget
from vlexport.targets.tensorrt import TensorRTOptions, TensorRTTarget

TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Forms(nn.Module):
    """One attention in each form that the pass makes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("per_head", torch.randn(2, 6, 6, generator=generator))
        self.register_buffer("windows", torch.randn(3, 2, 2, generator=generator))
        self.register_buffer("seen", torch.rand(6, 6, generator=generator).add(torch.eye(6)) > 0.5)
        self.temperature = nn.Parameter(torch.rand(2, 1, 1, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.reshape(-1, 6, 2, 4).transpose(1, 2)

        def scores(shift: float) -> Tensor:
            return (heads + shift) @ heads.transpose(-2, -1)

        causal = torch.ones(6, 6, dtype=torch.bool, device=x.device).triu(1)
        padded = torch.where(x[:, None, None, :, 0] > 0.5, -3.4e38, 0.0)
        windows = x.reshape(-1, 2, 4)  # rank 3, with a mask that is repeated over the batch
        inside = (windows @ windows.transpose(1, 2)).reshape(-1, 3, 2, 2) + self.windows
        five = x.reshape(-1, 3, 2, 2, 4).transpose(2, 3)
        grouped = heads[:, :1].repeat_interleave(2, 1)
        return (
            (scores(0) / 2).softmax(-1) @ heads,
            (scores(1) * 0.3 + self.per_head).softmax(-1) @ heads,
            (scores(2) + padded).softmax(-1) @ heads[..., :3],
            scores(3).masked_fill(causal, -torch.inf).softmax(-1) @ heads,
            scores(4).masked_fill(~self.seen, -1e9).softmax(-1) @ heads,
            (scores(5) + self.per_head).masked_fill(~self.seen, -torch.inf).softmax(-1) @ heads,
            (scores(6) * self.temperature).softmax(-1) @ heads,
            inside.reshape(-1, 2, 2).softmax(-1) @ windows,
            (five @ five.transpose(-2, -1)).softmax(-1) @ five,
            (heads @ grouped.transpose(-2, -1)).softmax(-1) @ grouped,
        )


FORMS = 10


@pytest.fixture(scope="module")
def source() -> Program:
    return captured(Forms(), TOKENS)


@pytest.fixture(scope="module")
def raised(source: Program) -> Program:
    made, _ = run_pipeline(source, [Canonicalize(), FoldConstants(), RaiseAttention()], gate=None)
    assert len(made.calls("aten.scaled_dot_product_attention.default")) == FORMS
    assert not made.calls("aten.softmax.int")
    return made


def agrees(target: Target, brief: Brief, source: Program, raised: Program, folder: Path) -> None:
    artifact = target.lower(raised, folder, brief)
    session = target.open(folder, artifact, threads=1)
    given = torch.cat([TOKENS, TOKENS.flip(1)])  # another batch than the captured one
    found = session.run({source.signature.inputs[0].name: given.numpy()})
    wanted = source.run(given)
    for spec, value in zip(source.signature.outputs, wanted, strict=True):
        np.testing.assert_allclose(found[spec.name], value.numpy(), rtol=0, atol=2e-5)


def test_every_form_agrees_when_lowered_to_onnxruntime(source: Program, raised: Program, tmp_path: Path) -> None:
    agrees(OnnxRuntimeTarget(), Brief(OnnxRuntimeOptions(), threads=1), source, raised, tmp_path)


def test_every_form_agrees_when_lowered_to_typed_onnx(source: Program, raised: Program, tmp_path: Path) -> None:
    agrees(TensorRTTarget(), Brief(TensorRTOptions(engine="off"), threads=1), source, raised, tmp_path)


@pytest.mark.parametrize(("deployment", "largest"), [("iOS18", 4)])
def test_every_form_converts_when_lowered_to_coreml(
    deployment: str, largest: int, raised: Program, tmp_path: Path
) -> None:
    brief = Brief(CoreMLOptions(deployment_target=deployment), precision="fp32", threads=1)
    sized = narrowed(raised, {"batch": DimRange(min=2, opt=2, max=largest)})
    spelled, _ = run_pipeline(sized, CoreMLTarget().program_passes(brief), gate=None)
    artifact = CoreMLTarget().lower(spelled, tmp_path, brief)
    assert (tmp_path / artifact.path).exists()
