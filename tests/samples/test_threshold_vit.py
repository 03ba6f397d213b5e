"""The threshold ViT: its weights work, it is frozen for one image and for eight, and what is lowered is static."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import vlexport
from samples.zoo.threshold_vit import data
from samples.zoo.threshold_vit.model import load_model
from tests.harness import captured
from vlexport.core.numerics import relative_error
from vlexport.frontends.source import open_archive
from vlexport.ir.program import Program
from vlexport.ir.text import text
from vlexport.passes.freeze_tokens import TOLERANCE, FreezeTokens, FreezeTokensOptions
from vlexport.targets import open_target
from vlexport.targets.base import Brief
from vlexport.targets.onnxruntime.session import open_session

IMAGES, LABELS = data.few()
DIGITS = torch.from_numpy(data.prepared(IMAGES))
SAMPLES = [(DIGITS[i : i + 1],) for i in range(16)]
HOSTILE = {"NonZero", "Compress", "ScatterND", "ScatterElements", "Unique", "Loop", "If"}
MAX_K = 3840


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model()


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    return captured(model, DIGITS[:1], dynamic=False)


@pytest.fixture(scope="module")
def eager(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for (x,) in SAMPLES])


def frozen(program: Program, batch: int) -> Program:
    after = program.copy()
    FreezeTokens(FreezeTokensOptions(percentile=100, batch=batch), samples=SAMPLES).run(after)
    return after


def test_committed_weights_know_the_digits(model: Any) -> None:
    with torch.no_grad():
        found = [int(model(image[None]).argmax()) for image in DIGITS]
    assert np.mean(np.array(found) == LABELS) > 0.75


def test_how_many_tokens_stay_depends_on_the_image(model: Any) -> None:
    with torch.no_grad():
        x = model.blocks[0](model.tokens(DIGITS[:16]))
        kept = (model.score(x, 0) > 0.5).sum(1)
    assert len(set(kept.tolist())) > 3


def test_saved_file_holds_the_selections_and_can_be_frozen(model: Any, program: Program, tmp_path: Path) -> None:
    vlexport.save(model, tmp_path / "model.pt", inputs=DIGITS[:1], dynamic=False)
    loaded = open_archive(tmp_path / "model.pt").program
    assert text(loaded) == text(program)
    assert text(frozen(loaded, 1)) == text(frozen(program, 1))


@pytest.mark.parametrize("batch", [1, 8])
def test_frozen_model_is_static_and_equal_on_onnxruntime(
    program: Program, eager: torch.Tensor, tmp_path: Path, batch: int
) -> None:
    after = frozen(program, batch)
    rows = torch.cat([x for (x,) in SAMPLES[:batch]])
    assert relative_error(after.run(rows)[0].numpy(), eager[:batch].numpy()) <= TOLERANCE
    target = open_target("onnxruntime")
    artifact = target.lower(after, tmp_path, Brief(target.Options()))
    session = open_session(tmp_path, artifact, 1)
    found = session.run({after.signature.inputs[0].name: rows.numpy()})
    assert relative_error(found["output"], eager[:batch].numpy()) <= TOLERANCE
    session.close()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / artifact.path, options, providers=["CPUExecutionProvider"])
    for file in (tmp_path / artifact.path, tmp_path / "loaded.onnx"):
        require_static(onnx.load(file).graph)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / artifact.path), strict_mode=True, data_prop=True)
    for value in inferred.graph.value_info:
        assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name


def require_static(graph: onnx.GraphProto) -> None:
    """No selection whose length the data decides; every slice, top-k and expand takes constants."""
    constants = {each.name for each in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    kinds = {node.op_type for node in graph.node}
    assert not kinds & HOSTILE
    assert "TopK" in kinds
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Slice", "TopK", "Expand"):
            assert set(filter(None, node.input[1:])) <= constants, f"{node.op_type} {node.name} takes computed numbers"
        if node.op_type == "TopK":
            assert int(values[node.input[1]].item()) <= MAX_K
