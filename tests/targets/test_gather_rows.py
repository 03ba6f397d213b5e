"""gather-rows: a selection of tokens copies rows, whatever the batch, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.onnx_passes import model_of
from vlexport.targets.onnx.level import ONNX
from vlexport.targets.onnx.model import OnnxModel
from vlexport.targets.onnxruntime.gather_rows import GatherRows

NET = """
<ir_version: 10, opset_import: ["" : 20]>
main ({values} x, {index} i) => ({made} y)
<int64[1] last = {{-1}}, int64[{rank}] shape = {{{shape}}}>
{{
  rows = Unsqueeze(i, last)
  all = Expand(rows, shape)
  y = GatherElements<axis={axis}>(x, all)
}}
"""
BARE = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[2,5,{width}] x, int64[2,3,{taken}] i) => (float[2,3,{taken}] y)
{{
  y = GatherElements<axis=1>(x, i)
}}
"""


def net(values: tuple[int, ...], kept: int, *, shape: tuple[int, ...] = (), axis: int | None = None) -> OnnxModel:
    """``kept`` rows of ``values``, whose index is stretched to ``shape``."""
    axis = len(values) - 2 if axis is None else axis
    shape = shape or (*values[:-2], kept, values[-1])
    index = (*values[:-2], kept)
    said = {"values": f"float{list(values)}", "index": f"int64{list(index)}", "made": f"float{list(shape)}"}
    model = model_of(NET.format(**said, rank=len(values), shape=",".join(map(str, shape)), axis=axis))
    for name, dims in (("rows", (*index, 1)), ("all", shape)):
        value = next(v for node in model.nodes() for v in node.outputs if v.name == name)
        value.shape, value.dtype = onnx_ir.Shape(dims), onnx_ir.DataType.INT64
    return model


def run(model: OnnxModel, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model.model).SerializeToString())
    found: np.ndarray = session.run(None, inputs)[0]
    return found


def reasons(model: OnnxModel) -> list[str]:
    changes, misses = GatherRows().run(model)
    assert changes == []
    return [each.reason for each in misses]


@settings(max_examples=25, deadline=None)
@given(
    front=st.lists(st.integers(1, 3), max_size=2), rows=st.integers(1, 6), width=st.integers(2, 5),
    kept=st.integers(1, 7), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_the_same_when_they_are_copied_whole(
    front: list[int], rows: int, width: int, kept: int, seed: int
) -> None:
    model, draw = net((*front, rows, width), kept), np.random.default_rng(seed)
    values = draw.standard_normal((*front, rows, width), np.float32)
    index = draw.integers(-rows, rows, (*front, kept))
    before, after = model, model.copy()
    changes, misses = GatherRows().run(after)
    assert ([each.saved_nodes for each in changes], misses) == ([1], [])
    assert [node.op_type for node in after.nodes()] == ["Unsqueeze", "GatherND"]
    assert after.nodes("GatherND")[0].attributes["batch_dims"].as_int() == len(front)
    assert list(ONNX.problems(after)) == []
    assert GatherRows().run(after.copy()) == ([], [])
    np.testing.assert_array_equal(run(after, x=values, i=index), run(before, x=values, i=index))


def test_an_index_of_rows_of_one_value_needs_no_stretching() -> None:
    model = model_of(BARE.format(width=1, taken=1))
    assert len(GatherRows().run(model)[0]) == 1
    assert [node.op_type for node in model.nodes()] == ["GatherND"]


def test_near_misses_say_why() -> None:
    assert reasons(model_of(BARE.format(width=4, taken=4))) == ["the index differs within a row"]
    assert reasons(model_of(BARE.format(width=4, taken=1))) == ["it takes a part of each row"]
    assert reasons(net((2, 3, 4), 3, axis=0)) == ["it gathers along another axis than the last but one"]
    assert reasons(net((2, 5, 4), 3, shape=(2, 3, 2))) == ["it takes a part of each row"]


def test_a_batch_that_is_cut_or_broadcast_is_left_alone() -> None:
    model = net((2, 5, 4), 3)
    model.model.graph.inputs[0].shape = onnx_ir.Shape((3, 5, 4))
    assert reasons(model) == ["dims in front are broadcast or cut"]


def test_dims_without_a_name_are_not_taken_for_equal() -> None:
    model = net((2, 5, 4), 3)
    named, nameless = onnx_ir.SymbolicDim("batch"), onnx_ir.SymbolicDim(None)
    values = [*model.model.graph.inputs, *(v for node in model.nodes() for v in node.outputs)]
    for dim, found in ((nameless, ["shapes are not known"]), (named, [])):
        for value in values:
            assert value.shape is not None
            value.shape = onnx_ir.Shape((dim, *tuple(value.shape)[1:]))
        if found:
            assert reasons(model) == found
        else:
            assert len(GatherRows().run(model)[0]) == 1


@pytest.mark.parametrize("unknown", ["x", "rows", "all"])
def test_nothing_is_done_where_shapes_are_not_known(unknown: str) -> None:
    model = net((2, 5, 4), 3)
    values = [*model.model.graph.inputs, *(v for node in model.nodes() for v in node.outputs)]
    next(v for v in values if v.name == unknown).shape = None
    assert reasons(model) == ["shapes are not known"]


def test_one_row_that_is_taken_several_times_is_no_gather_of_rows() -> None:
    assert reasons(net((2, 5, 4), 1, shape=(2, 3, 4))) == ["dims in front are broadcast or cut"]
