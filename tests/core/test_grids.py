"""Integers of a grid: the rules of ONNX, which onnxruntime's own operators confirm."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vlexport.core.grids import GRIDS, INT7, INT8, INT32, UINT8, Grid, dequantize, quantize

KINDS = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}


def onnx_model(dtype: str, *, axis: int | None) -> onnxruntime.InferenceSession:
    """QuantizeLinear, and DequantizeLinear of its result."""
    size = [] if axis is None else ["n"]
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    f32, kind = TensorProto.FLOAT, KINDS[dtype]
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
         helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", f32, None), helper.make_tensor_value_info("s", f32, size),
         helper.make_tensor_value_info("z", kind, size)],
        [helper.make_tensor_value_info("q", kind, None), helper.make_tensor_value_info("d", f32, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions() -> dict[tuple[str, int | None], onnxruntime.InferenceSession]:
    return {(dtype, axis): onnx_model(dtype, axis=axis) for dtype in KINDS for axis in (None, 1)}


@pytest.mark.parametrize("grid", [INT8, UINT8])
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    scale=st.floats(2.0**-12, 64.0, width=32),
    share=st.floats(0.0, 1.0),
)
def test_integers_are_those_of_onnxruntime_when_one_scale_serves_all(
    sessions: dict[tuple[str, int | None], onnxruntime.InferenceSession],
    grid: Grid, values: list[float], scale: float, share: float,
) -> None:  # fmt: skip
    x, s = np.array(values, np.float32), np.array(scale, np.float32)
    z = np.array(grid.low + round(share * (grid.levels - 1)), grid.dtype)
    q, d = sessions[grid.dtype, None].run(None, {"x": x, "s": s, "z": z})
    ours = quantize(x, s, z, grid)
    np.testing.assert_array_equal(ours, q)
    np.testing.assert_array_equal(dequantize(ours, s, z), d)


@pytest.mark.parametrize("grid", [INT8, UINT8])
def test_integers_are_those_of_onnxruntime_when_channels_have_their_own(
    sessions: dict[tuple[str, int | None], onnxruntime.InferenceSession], grid: Grid
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 50)).astype(np.float32) * 5
    s = np.array([0.5, 0.03, 0.011], np.float32)
    z = np.array([grid.low, grid.low + 100, grid.high], grid.dtype)
    q, d = sessions[grid.dtype, 1].run(None, {"x": x, "s": s, "z": z})
    np.testing.assert_array_equal(quantize(x, s, z, grid, axis=1), q)
    np.testing.assert_array_equal(dequantize(q, s, z, axis=1), d)


def test_halves_go_to_the_even_neighbour_when_rounded() -> None:
    steps = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert quantize(steps, np.float32(1), np.int8(0), INT8).tolist() == [-2, -2, 0, 0, 2, 2]
    assert quantize(steps, np.float32(1), np.int8(1), INT8).tolist() == [-1, -1, 1, 1, 3, 3], "before the zero point"


def test_values_saturate_when_they_lie_beyond_the_grid() -> None:
    far = np.array([-1e30, -65.0, 64.0, 1e30, np.inf, -np.inf], np.float32)
    assert quantize(far, np.float32(1), np.int8(0), INT7).tolist() == [-64, -64, 63, 63, 63, -64]
    assert quantize(far, np.float32(1), np.uint8(3), UINT8).tolist() == [0, 0, 67, 255, 255, 0]
    assert quantize(np.float32([np.nan]), np.float32(1), np.uint8(3), UINT8).tolist() == [3]


def test_bias_keeps_every_bit_when_it_is_int32() -> None:
    bias = np.array([0.1, -3.7, 12.5])
    scale = np.array([1e-7, 3e-8, 2e-7])
    stored = quantize(bias, scale, np.zeros(3, np.int32), INT32, axis=0)
    assert stored.dtype == np.int32
    np.testing.assert_array_equal(stored, np.rint(bias / scale).astype(np.int64))


def test_grids_lie_in_their_dtype_when_listed() -> None:
    for grid in GRIDS.values():
        info = np.iinfo(grid.dtype)
        assert info.min <= grid.low < grid.high <= info.max
    assert 2 * UINT8.high * abs(INT7.low) < 1 << 15, "two products of uint8 and int7 fit into 16 bits"
    assert 2 * UINT8.high * INT8.high > 1 << 15, "of uint8 and int8 they do not"
