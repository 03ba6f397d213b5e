"""Where the time goes: what is read of ONNX Runtime's profiler, and that it comes through the child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir
import pytest

from tests.targets.onnx_passes import net
from vlexport.core.artifact import Artifact
from vlexport.core.isolate import IsolatedSession
from vlexport.report.figures import operators_phrase
from vlexport.stages.profile import _by_operator
from vlexport.targets.onnx.operator_times import summed


def kernel(operator: str, microseconds: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"n_{operator}_kernel_time", "dur": microseconds, "args": {"op_name": operator}}


def test_kernels_are_summed_by_operator_and_averaged_over_runs_the_longest_first() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "dur": 9000, "args": {}},
        *[kernel("Relu", 100), kernel("MatMul", 900), kernel("MatMul", 700)] * 2,
        {"cat": "Node", "name": "n_Relu_fence_before", "dur": 5000, "args": {"op_name": "Relu"}},
    ]
    found = summed(events, runs=2)
    assert found == {"MatMul": (2, 1.6), "Relu": (1, 0.1)}
    assert list(found) == ["MatMul", "Relu"]


@pytest.mark.parametrize(("p50_ms", "runs"), [(0.1, 10), (250.0, 8), (2000.0, 3), (None, 10)])
def test_profiler_watches_fewer_runs_when_they_take_long(p50_ms: float | None, runs: int) -> None:
    class Watched:
        def operator_times(self, inputs: object, *, runs: int) -> dict[str, tuple[int, float]]:
            return {"Relu": (runs, 1.0)}

    (found,) = _by_operator(cast("Any", Watched()), {}, p50_ms)
    assert found.count == runs


@pytest.mark.parametrize("timing", ["real", "emulated"])
def test_operators_are_told_by_the_child_where_times_mean_something(timing: Any, tmp_path: Path) -> None:
    model = net()
    onnx_ir.save(model.model, tmp_path / "main.onnx")
    artifact = Artifact(
        target="onnxruntime", path="main.onnx", inputs=model.signature.inputs, outputs=model.signature.outputs,
        session_options={"graph_optimization": "none"},
    )  # fmt: skip
    with IsolatedSession("vlexport.targets.onnx.session:open_session", tmp_path, artifact, threads=1) as session:
        session.timing = timing
        found = _by_operator(session, {"x": np.ones((1, 3, 4), np.float32)}, p50_ms=1.0)
    counts = {each.operator: each.count for each in found}
    assert counts == ({"Relu": 2, "MatMul": 1, "Add": 1} if timing == "real" else {})
    assert all(each.ms > 0 for each in found)
    assert list(tmp_path.iterdir()) == [tmp_path / "main.onnx"], "the trace is gone"
    if found:
        assert f"in 2 {'Relu'}" in operators_phrase(found)
