"""Models whose tokens were merged are converted for Core ML and for TensorRT: nothing in a merge is unknown there."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.harness import one_thread
from tests.passes.test_reduce_tokens import SIZES, TOLERANCE, raised, reduced, weighted
from tests.token_models import PlainViT
from vlexport.core.numerics import relative_error
from vlexport.ir.program import Program
from vlexport.targets import open_target
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions
from vlexport.targets.coreml.legalize_spelling import LegalizeSpelling


@pytest.fixture(scope="module")
def plain() -> Program:
    """Two blocks over 16 patches, raised."""
    with one_thread():
        net = weighted(PlainViT(**(SIZES | {"depth": 2})), "concentrated")
        return raised(net, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_merged_tokens_are_converted_for_core_ml(method: str, plain: Program, tmp_path: Path) -> None:
    program = reduced(plain, method=method, r="2")
    LegalizeSpelling().run(program)
    target = open_target("coreml")
    artifact = target.lower(program, tmp_path, Brief(CoreMLOptions(shapes="batch=1"), threads=1))
    assert [tuple(spec.shape) for spec in artifact.outputs] in ([(1, 10)], [("batch", 10)])
    assert (tmp_path / artifact.path).exists()


def test_graph_for_tensorrt_computes_the_same_when_tokens_merged_both_ways(plain: Program, tmp_path: Path) -> None:
    program = reduced(plain, method="mctf", r="2")
    target = open_target("tensorrt")
    artifact = target.lower(program, tmp_path, Brief(target.Options(), threads=1))
    session = onnxruntime.InferenceSession(str(tmp_path / artifact.path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (wanted,) = program.run(x)
    assert relative_error(found, wanted.numpy()) <= TOLERANCE
