"""layout: the numbers that it follows are where ONNX Runtime puts the values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.targets.onnx_passes import model_of
from vlexport.targets.onnx.layout import Sizes, Untraceable, moved, numbered, origin

BATCH = 2


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], tuple[int, ...], str]:
    """Operators one behind the other that move values about, what they have stored, the first shape, the last value."""
    start = shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4)))
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    last = "x"

    def add(kind: str, *operands: list[int], outputs: int = 1, taken: int = 0, **attributes: Any) -> None:
        nonlocal last
        step = len(nodes)
        names = [f"c{step}_{i}" for i in range(len(operands))]
        stored.extend(
            helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            for name, values in zip(names, operands, strict=True)
        )
        made = [f"v{step}_{i}" for i in range(outputs)]
        nodes.append(helper.make_node(kind, [last, *names], made, **attributes))
        last = made[taken]

    for _ in range(draw(st.integers(1, 5))):
        axis = draw(st.integers(0, len(shape) - 1))
        kind = draw(st.sampled_from(["Transpose", "Reshape", "Slice", "Split", "Unsqueeze", "Flatten", "Gather"]))
        if kind == "Transpose":
            order = draw(st.permutations(range(len(shape))))
            add(kind, perm=list(order))
            shape = tuple(shape[i] for i in order)
        elif kind == "Reshape":
            first = draw(st.sampled_from([n for n in range(1, math.prod(shape) + 1) if math.prod(shape) % n == 0]))
            add(kind, [first, -1])
            shape = (first, math.prod(shape) // first)
        elif kind == "Slice":
            begin = draw(st.integers(0, shape[axis] - 1))
            add(kind, [begin], [shape[axis]], [axis])
            shape = (*shape[:axis], shape[axis] - begin, *shape[axis + 1 :])
        elif kind == "Split" and shape[axis] % 2 == 0:
            add(kind, outputs=2, taken=draw(st.integers(0, 1)), axis=axis, num_outputs=2)
            shape = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
        elif kind == "Unsqueeze" and len(shape) < 5:
            add(kind, [axis])
            shape = (*shape[:axis], 1, *shape[axis:])
        elif kind == "Flatten":
            add(kind, axis=axis)
            shape = (math.prod(shape[:axis]), math.prod(shape[axis:]))
        elif kind == "Gather":
            picked = draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=3))
            add(kind, picked, axis=axis)
            shape = (*shape[:axis], len(picked), *shape[axis + 1 :])
    if not nodes:
        add("Identity")
    return nodes, stored, start, last


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(chains())
def test_numbers_are_where_the_runtime_puts_values_when_chains_are_random(chain: Any) -> None:
    nodes, stored, shape, last = chain
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 20)]
    proto = helper.make_model(helper.make_graph(nodes, "net", [x], [y], stored), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    (wanted,) = session.run([last], {"x": values})
    model = onnx_ir.from_proto(proto)
    (made,) = model.graph.outputs
    (root,) = model.graph.inputs
    found = moved(made, root, Sizes())
    np.testing.assert_array_equal(found, wanted.astype(np.int64))
    assert origin(made).root is root


def graph(text: str) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    model = onnx_ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> net {text}'))
    return model.graph.inputs[0], model.graph.outputs[0]


def test_dims_without_a_size_get_one_and_shapes_are_computed_from_it() -> None:
    root, made = graph(
        """(float[batch,6] x) => (float[a,b,c] y) <int64[2] tail = {3, 2}> {
             size = Shape <start = 0, end = 1> (x)  whole = Concat <axis = 0> (size, tail)  y = Reshape(x, whole) }"""
    )
    sizes = Sizes()
    np.testing.assert_array_equal(moved(made, root, sizes), np.arange(BATCH * 6).reshape(BATCH, 3, 2))
    assert (sizes.named, numbered(root, sizes).shape) == ({"batch": BATCH}, (BATCH, 6))


def test_factor_of_stored_scalars_is_told() -> None:
    root, made = graph(
        """(float[2,3] x) => (float[3,2] y) <float half = {0.5}, float four = {4.0}> {
             a = Mul(half, x)  b = Transpose <perm = [1, 0]> (a)  y = Div(b, four) }"""
    )
    found = origin(made)
    assert (found.root, found.factor, len(found.between)) == (root, 0.125, 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }", "Relu stands in between"),
        ("(float[2,3] x) => (float[2,3] y) { y = Add(x, x) }", "Add changes values in between"),
        ("(float[2,3] x) => (float16[2,3] y) { y = Cast <to = 10> (x) }", "Cast changes values in between"),
        (
            "(float[2,3] x) => (float[2,3] y)"
            " <int64[1] b = {-1}, int64[1] e = {-9}, int64[1] a = {0}, int64[1] s = {-1}> { y = Slice(x, b, e, a, s) }",
            "a slice runs backwards",
        ),
        (
            "(float[batch,3] x) => (float[n] y) <int64[2] s = {7, 1}> { y = Reshape(x, s) }",
            "Reshape does not take the sizes that stand for y",
        ),
        ("(float[8192,8192] x) => (float[8192,8192] y) { y = Identity(x) }", "more than are followed"),
        ("(float[2,3] x, float[2,3] z) => (float[2,3] y) { y = Identity(z) }", "z is no part of it"),
    ],
)
def test_value_is_not_followed_with_the_reason_when_it_is_computed(text: str, why: str) -> None:
    root, made = graph(text)
    with pytest.raises(Untraceable, match=why):
        moved(made, root, Sizes())


def test_a_number_divided_by_a_value_is_no_scaling_of_it() -> None:
    model = model_of("""
<ir_version: 10, opset_import: ["" : 20]>
main (float[2,3] x) => (float[2,3] y)
<float c = {2.0}>
{
  y = Div(c, x)
}
""")
    made = model.nodes("Div")[0].outputs[0]
    found = origin(made)
    assert (found.root is made, found.factor) == (True, 1.0)
