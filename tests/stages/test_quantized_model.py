"""A model that PyTorch's tools quantized is built as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import vlexport
from tests.frontends.test_decomposed import Outer, example
from vlexport.core.config import BuildConfig


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantized")
    vlexport.save(Outer().eval(), place / "model.pt", inputs=example())
    vlexport.build(BuildConfig(model=str(place / "model.pt"), output=str(place / "out"), profile=False))
    return place / "out"


def test_artifact_quantizes_where_the_model_does_when_built(bundle: Path) -> None:
    made = [node.op_type for node in onnx.load(bundle / "artifact" / "main.onnx").graph.node]
    assert (made.count("QuantizeLinear"), made.count("DequantizeLinear")) == (2, 5)


def test_values_are_the_models_but_for_single_steps_when_run(bundle: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    with vlexport.load(bundle) as session:
        (found,) = session.run({"x": x}).values()
    net = Outer()
    wanted = net(torch.from_numpy(x)).numpy()
    noise = ((found - wanted) ** 2).sum()
    assert 10.0 * np.log10((wanted**2).sum() / max(noise, 1e-12)) > 30.0
