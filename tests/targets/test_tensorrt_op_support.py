"""The table of TensorRT's operators: what fires, what nearly does, and what the compiler says of the same models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from vlexport.core.device_profiles import DeviceProfile, Fact, device_profiles
from vlexport.targets.tensorrt.op_support import largest_opset, oldest_tensorrt, table, unsupported

JETSON = device_profiles()["jetson-orin-jp6"]
RTX = device_profiles()["rtx"]
THIS = device_profiles()["this"]
Value = tuple[str, int, list[int]]


def single(
    operator: str, inputs: Sequence[Value], outputs: Sequence[Value], constants: Sequence[Any] = (), **attributes: Any
) -> onnx.ModelProto:
    """A model of one node, named ``odd <node>``; ``opset`` and ``domain`` among the attributes are the model's."""
    opset, domain = attributes.pop("opset", 20), attributes.pop("domain", "")
    stored = [numpy_helper.from_array(np.asarray(value), f"c{i}") for i, value in enumerate(constants)]
    names = [name for name, _, _ in inputs] + [tensor.name for tensor in stored]
    node = helper.make_node(operator, names, [o[0] for o in outputs], name="odd <node>", domain=domain, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs], stored,
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def reasons(model: onnx.ModelProto, device: DeviceProfile = RTX) -> list[str]:
    return [problem.reason for problem in unsupported(onnx_ir.from_proto(model), device)]


def top_k(k: int) -> onnx.ModelProto:
    shape = [1, k]
    return single("TopK", [("x", T.FLOAT, [1, 5000])], [("v", T.FLOAT, shape), ("i", T.INT64, shape)], [np.array([k])])


def resize(**attributes: Any) -> onnx.ModelProto:
    constants = [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)]
    return single("Resize", [("x", T.FLOAT, [1, 3, 8, 8])], [("v", T.FLOAT, [1, 3, 16, 16])], constants, **attributes)


def max_pool(size: int, **attributes: Any) -> onnx.ModelProto:
    out = [("v", T.FLOAT, [1, 1, size, size])]
    return single("MaxPool", [("x", T.FLOAT, [1, 1, 8, 8])], out, kernel_shape=[2, 2], **attributes)


def scatter_nd(**attributes: Any) -> onnx.ModelProto:
    inputs = [("x", T.FLOAT, [4]), ("i", T.INT64, [1, 1]), ("u", T.FLOAT, [1])]
    return single("ScatterND", inputs, [("v", T.FLOAT, [4])], **attributes)


def scatter_elements(**attributes: Any) -> onnx.ModelProto:
    inputs = [("x", T.FLOAT, [4]), ("i", T.INT64, [1]), ("u", T.FLOAT, [1])]
    return single("ScatterElements", inputs, [("v", T.FLOAT, [4])], **attributes)


def plain(operator: str, kind: int, rank: int = 2) -> onnx.ModelProto:
    return single(operator, [("x", kind, [2] * rank)], [("v", kind, [2] * rank)])


def dequantize(kind: int, zero: Any) -> onnx.ModelProto:
    return single("DequantizeLinear", [("x", kind, [2, 4])], [("v", T.FLOAT, [2, 4])], [np.float32(0.1), zero])


def layer_norm(outputs: int) -> onnx.ModelProto:
    found = [("v", T.FLOAT, [2, 4]), ("m", T.FLOAT, [2, 1])][:outputs]
    return single("LayerNormalization", [("x", T.FLOAT, [2, 4])], found, [np.ones(4, np.float32)])


def reduce_sum(axes_known: bool) -> onnx.ModelProto:
    inputs: list[Value] = [("x", T.FLOAT, [2, 4])] + ([] if axes_known else [("a", T.INT64, [1])])
    return single("ReduceSum", inputs, [("v", T.FLOAT, [2, 1])], [np.array([1])] if axes_known else [])


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "k of 3841": (top_k(3841), "k is 3841, TensorRT takes up to 3840"),
    "antialiasing": (resize(mode="linear", antialias=1), "antialiasing is not supported"),
    "dilated pooling": (max_pool(6, dilations=[2, 2]), "dilations other than 1"),
    "scattered sum": (scatter_nd(reduction="add"), "reduction 'add' is not supported"),
    "scattered elements' sum": (scatter_elements(reduction="add"), "reduction 'add' is not supported"),
    "nine dims": (plain("Relu", T.FLOAT, 9), "9 dims, TensorRT takes up to 8"),
    "logarithm of integers": (plain("Exp", T.INT64), "its type is INT64, it takes FLOAT, FLOAT16, BFLOAT16"),
    "unknown operator": (
        single("BitwiseAnd", [("x", T.INT32, [2]), ("y", T.INT32, [2])], [("v", T.INT32, [2])]), "no such operator"),
    "no implementation": (single("NonZero", [("x", T.FLOAT, [1, 6])], [("v", T.INT64, [2, 6])]), "no implementation"),
    "asymmetric": (dequantize(T.INT8, np.int8(3)), "zero point is not 0"),
    "unsigned": (dequantize(T.UINT8, np.uint8(0)), "its type is UINT8"),
    "mean of a norm": (layer_norm(2), "only its first output"),
    "computed axes": (reduce_sum(False), "its axes must be constant"),
}  # fmt: skip

TAKEN: dict[str, onnx.ModelProto] = {
    "k of 3840": top_k(3840),
    "no antialiasing": resize(mode="linear", antialias=0),
    "cubic": resize(mode="cubic"),
    "undilated pooling": max_pool(7, dilations=[1, 1]),
    "scattering": scatter_nd(),
    "scattering by name": scatter_nd(reduction="none"),
    "scattered elements": scatter_elements(),
    "eight dims": plain("Relu", T.FLOAT, 8),
    "logarithm of halves": plain("Exp", T.FLOAT16),
    "doubles, which are cast": plain("Relu", T.DOUBLE),
    "and": single("And", [("x", T.BOOL, [2]), ("y", T.BOOL, [2])], [("v", T.BOOL, [2])]),
    "symmetric": dequantize(T.INT8, np.int8(0)),
    "a norm": layer_norm(1),
    "known axes": reduce_sum(True),
    "clipped integers": single("Clip", [("x", T.INT64, [2])], [("v", T.INT64, [2])], [np.int64(0), np.int64(3)]),
    "summed integers": single("CumSum", [("x", T.INT64, [2, 3])], [("v", T.INT64, [2, 3])], [np.int64(1)]),
    "equal booleans": single("Equal", [("x", T.BOOL, [2]), ("y", T.BOOL, [2])], [("v", T.BOOL, [2])]),
    "chosen booleans": single(
        "Where", [("c", T.BOOL, [2]), ("x", T.INT64, [2]), ("y", T.INT64, [2])], [("v", T.INT64, [2])]),
    "bytes that come in": single("Cast", [("x", T.UINT8, [3])], [("v", T.FLOAT, [3])], to=T.FLOAT),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_node_is_refused_with_its_reason_when_tensorrt_does_not_take_it(name: str) -> None:
    model, said = REFUSED[name]
    (reason,) = reasons(model)
    assert said in reason


@pytest.mark.parametrize("name", TAKEN)
def test_node_is_passed_when_it_is_just_inside_the_limit(name: str) -> None:
    assert reasons(TAKEN[name]) == []


_ASK = """
import json, sys
from pathlib import Path
from vlexport.targets.tensorrt.compiler import Request, _compiled
found = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    engine, report = _compiled(file, Request(compute_capabilities=("8.9",)))
    found[file.stem] = [len(engine), [each.reason for each in report.refusals]]
print("FOUND" + json.dumps(found))
"""


def test_compiler_agrees_with_the_table_when_asked_about_the_same_models(tmp_path: Path) -> None:
    names = {f"{i:02}": name for i, name in enumerate((*REFUSED, *TAKEN))}
    for stem, name in names.items():
        model = REFUSED[name][0] if name in REFUSED else TAKEN[name]
        (tmp_path / f"{stem}.onnx").write_bytes(model.SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(tmp_path)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])
    wrong = {names[stem]: said for stem, (size, said) in found.items() if (size == 0) != (names[stem] in REFUSED)}
    assert wrong == {}


def test_node_is_refused_when_its_domain_is_not_the_standard_one() -> None:
    model = single("Relu", [("x", T.FLOAT, [2])], [("v", T.FLOAT, [2])], domain="com.microsoft")
    assert reasons(model) == ["its domain com.microsoft is not ONNX's own"]
    assert reasons(plain("Relu", T.FLOAT)) == []


def test_version_decides_when_an_operator_came_later() -> None:
    four = [1, 2, 4, 8]
    model = single("Attention", [(n, T.FLOAT16, four) for n in "qkv"], [("o", T.FLOAT16, four)], opset=23)
    assert reasons(model, JETSON) == ["the operator came with TensorRT 10.14"]
    assert reasons(model, THIS) == []
    powers = single("Pow", [("x", T.INT64, [2])], [("v", T.INT64, [2])], [np.int64(2)])
    assert "its type is INT64" in reasons(powers, JETSON)[0]
    assert reasons(powers, THIS) == []


def test_two_digits_count_as_a_number_when_versions_are_compared() -> None:
    newer = JETSON.model_copy(update={"facts": {"tensorrt": Fact(value="10.14", source="a test")}})
    four = [1, 2, 4, 8]
    model = single("Attention", [(n, T.FLOAT16, four) for n in "qkv"], [("o", T.FLOAT16, four)], opset=23)
    assert reasons(model, newer) == []


def test_runtime_decides_when_only_one_of_them_has_an_implementation() -> None:
    model = single("NonZero", [("x", T.BOOL, [1, 6])], [("v", T.INT64, [2, 6])])
    assert reasons(model, RTX) == ["it ships no implementation of the operator"]
    assert reasons(model, JETSON) == reasons(model, THIS) == []


def test_problem_names_node_and_line_when_listed() -> None:
    model = onnx_ir.from_proto(REFUSED["dilated pooling"][0])
    next(iter(model.graph)).metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'stem', 'stem.pool', 'max_pool2d']"
    (problem,) = unsupported(model, JETSON, {"odd <node>": "net.py:12"})
    assert (problem.node, problem.operator, problem.path, problem.line) == (
        "odd <node>", "MaxPool", "stem.pool", "net.py:12",
    )  # fmt: skip
    error = problem.error(JETSON)
    assert (error.code, error.exit_code) == ("VLX0503", 4)
    assert error.where == "MaxPool in stem.pool (odd <node>), net.py:12"
    assert error.message.startswith("TensorRT 10.3 takes no such MaxPool: dilations")


def test_nodes_of_inner_graphs_are_judged_when_there_are_any() -> None:
    inner = helper.make_graph(
        [helper.make_node("Det", ["x"], ["d"])], "inner", [], [helper.make_tensor_value_info("d", T.FLOAT, [])]
    )
    node = helper.make_node("If", ["c"], ["v"], then_branch=inner, else_branch=inner)
    inputs = [helper.make_tensor_value_info("c", T.BOOL, []), helper.make_tensor_value_info("x", T.FLOAT, [2, 2])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("v", T.FLOAT, [])])
    assert len(reasons(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))) == 2


def test_table_is_whole_when_read() -> None:
    found = table()
    assert len(found["operators"]) > 140
    assert all(len(source) > 20 for source in found["sources"].values())
    for name, rows in found["operators"].items():
        assert onnx.defs.has(name), name
        assert rows, name
        for row in rows:
            groups = row["types"].split()
            assert set(groups) <= set(found["types"]), name
            assert tuple(map(int, row["since"].split("."))) >= (10, 0)
    for names in found["types"].values():
        assert all(hasattr(onnx_ir.DataType, name) for name in names)


def test_opsets_follow_the_device_when_asked() -> None:
    assert (largest_opset(JETSON), largest_opset(RTX), largest_opset(THIS)) == (20, 24, 24)
    assert (oldest_tensorrt(18), oldest_tensorrt(20), oldest_tensorrt(21)) == ("10.0", "10.0", "10.15")
