"""The product that speeds are set beside: an ONNX file that others read, with the numbers that it should give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from vlexport.core.artifact import Artifact
from vlexport.core.bundle_schema import Ceiling, LatencyResult
from vlexport.report.figures import speed_phrase
from vlexport.stages import ceiling
from vlexport.targets.base import ProductKind
from vlexport.targets.onnxruntime import OnnxRuntimeTarget
from vlexport.targets.onnxruntime.plain_product import COLUMNS, INNER, ROWS, plain_product

LIKE = Artifact(target="onnxruntime", path="main.onnx", inputs=(), outputs=(), session_options={"threads": 1})


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_file_is_onnx_and_multiplies_when_opened(kind: ProductKind, tmp_path: Path) -> None:
    made = plain_product(tmp_path, kind, LIKE)
    model = onnx.load(tmp_path / made.artifact.path)
    onnx.checker.check_model(model, full_check=True)
    ((tensor),) = model.graph.initializer
    weight = numpy_helper.to_array(tensor)
    assert (made.macs, weight.shape) == (ROWS * INNER * COLUMNS, (INNER, COLUMNS))
    (spec,) = made.artifact.inputs
    x = np.random.default_rng(2).integers(0, 9, spec.shape).astype(spec.dtype)
    found = OnnxRuntimeTarget().open_here(tmp_path, made.artifact, threads=1).run({"x": x})["y"]
    wide = x.astype(np.float64) @ weight.astype(np.float64)
    assert np.abs(found - wide).max() <= (1e-5 * np.abs(wide).max() if kind == "fp32" else 0)


def test_both_products_are_measured_when_the_artifact_is_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "SECONDS", 0.01)
    found = ceiling.ceilings(OnnxRuntimeTarget(), LIKE, "int8", threads=1)
    assert [each.kind for each in found] == ["fp32", "int8"]
    assert all(each.gops > 0.1 for each in found)


def test_nothing_is_measured_when_another_provider_runs_the_artifact() -> None:
    other = LIKE.model_copy(update={"session_options": {"provider": "openvino"}})
    assert ceiling.ceilings(OnnxRuntimeTarget(), other, "fp32", threads=1) == ()


def test_speed_counts_a_multiplication_and_an_addition_when_told() -> None:
    assert ceiling.gops(2_000_000_000, 100.0) == pytest.approx(40.0)
    measured = LatencyResult(
        p50_ms=1.0, load_ms=1.0, runs=1, threads=1, gops=100.0,
        ceilings=(Ceiling(kind="fp32", gops=80.0), Ceiling(kind="int8", gops=400.0)),
    )  # fmt: skip
    said = "100.0 GOP/s, 25 % of the 400.0 of a plain product in int8, 125 % of the 80.0 of a plain product in fp32"
    assert speed_phrase(measured) == said
    assert speed_phrase(measured.model_copy(update={"ceilings": ()})) == "speed in operations not measured"
