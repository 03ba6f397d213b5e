"""ONNX files that reach out of their folder or carry compiled code are refused before ONNX Runtime sees them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlexport.core.artifact import Artifact, TensorSpec
from vlexport.core.errors import VlexportError
from vlexport.targets.onnx import guard, session
from vlexport.targets.onnx.guard import require_contained

SPEC = TensorSpec(name="x", dtype="float32", shape=(2,))


def external(name: str, location: str) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_with(*tensors: onnx.TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    nodes = nodes or [helper.make_node("Add", ["x", tensors[0].name if tensors else "x"], ["y"])]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], initializer=list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def in_branch(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """The tensor in a constant of a graph in an attribute."""
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    inner = helper.make_graph([helper.make_node("Constant", [], ["z"], value=tensor)], "b", [], [out])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    return model_with(numpy_helper.from_array(np.array(True), "c"), nodes=[node])


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = model_with()
    node = helper.make_node("Constant", [], ["z"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["z"], [node], [helper.make_opsetid("", 20)]))
    return model


def written(folder: Path, model: onnx.ModelProto) -> Path:
    (folder / "main.onnx").write_bytes(model.SerializeToString())
    (folder / "weights.bin").write_bytes(np.ones(2, np.float32).tobytes())
    return folder


def refusal(folder: Path) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        require_contained(folder, "main.onnx")
    return caught.value


@pytest.mark.parametrize("make", [model_with, in_branch, in_function])
def test_file_is_let_through_when_its_weights_lie_beside_it(make: object, tmp_path: Path) -> None:
    require_contained(written(tmp_path, make(external("w", "weights.bin"))), "main.onnx")  # type: ignore[operator]


LEAVING = (
    "../weights.bin",
    "/etc/hostname",
    "a/../../weights.bin",
    "absent.bin",
    "",
    ".",
    "C:weights.bin",
    "NUL",
    "link",
)


@pytest.mark.parametrize("make", [model_with, in_branch, in_function])
@pytest.mark.parametrize("location", LEAVING)
def test_file_is_refused_when_its_weights_lie_elsewhere(location: str, make: object, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    (folder / "link").symlink_to(tmp_path / "weights.bin")
    error = refusal(written(folder, make(external("w", location))))  # type: ignore[operator]
    missing = location in ("absent.bin", ".")
    assert (error.code, error.exit_code) == (("VLX0505", 4) if missing else ("VLX0605", 1))


@pytest.mark.parametrize("place", ["graph", "branch", "function"])
def test_file_is_refused_when_it_carries_compiled_code(place: str, tmp_path: Path) -> None:
    compiled = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="/e")
    model = model_with(nodes=[compiled]) if place == "graph" else model_with()
    if place == "branch":
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
        inner = helper.make_graph([compiled], "b", [], [out])
        model = model_with(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)])
    elif place == "function":
        model.functions.append(
            helper.make_function("d", "f", ["x"], ["y"], [compiled], [helper.make_opsetid("com.microsoft", 1)])
        )
    assert refusal(written(tmp_path, model)).code == "VLX0509"


def test_fields_are_those_of_onnx_when_its_schema_is_asked() -> None:
    kinds = {
        "model": onnx.ModelProto, "training": onnx.TrainingInfoProto, "function": onnx.FunctionProto,
        "graph": onnx.GraphProto, "node": onnx.NodeProto, "attribute": onnx.AttributeProto,
        "sparse": onnx.SparseTensorProto, "tensor": onnx.TensorProto, "external": onnx.StringStringEntryProto,
    }  # fmt: skip
    names = {kind.DESCRIPTOR.name: name for name, kind in kinds.items()}
    for name, kind in kinds.items():
        wanted = {}
        for field in kind.DESCRIPTOR.fields:
            holds = names.get(field.message_type.name) if field.message_type is not None else None
            if holds is not None and (holds != "external" or field.name == "external_data"):
                wanted[field.number] = holds
        known = {number: holds for number, holds in guard._FIELDS[name].items() if holds not in guard._BYTES}
        assert known == wanted, f"{name}: every message that may hold a tensor or a node is walked"


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\x0f", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20, b"\x3a\x02\x0a\x05"]
)
def test_file_is_refused_when_it_is_no_protocol_buffer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "main.onnx").write_bytes(content)
    assert refusal(tmp_path).code == "VLX0505"


def test_file_is_refused_when_its_graphs_are_nested_without_end(tmp_path: Path) -> None:
    message = b""
    for _ in range(200):
        for tag in (0x32, 0x2A, 0x0A):  # graph of an attribute of a node
            size, length = len(message), b""
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            message = bytes([tag]) + length + bytes([size]) + message
    (tmp_path / "main.onnx").write_bytes(model_with().SerializeToString() + b"\x3a" + _length(message) + message)
    error = refusal(tmp_path)
    assert (error.code, "nested deeper" in error.message) == ("VLX0505", True)


def _length(message: bytes | int) -> bytes:
    """The bytes of a length, or of any number, as protocol buffers write it."""
    size, found = message if isinstance(message, int) else len(message), b""
    while size > 127:
        found, size = found + bytes([size & 127 | 128]), size >> 7
    return found + bytes([size])


@pytest.mark.parametrize("above", [1 << 32, 1 << 34])
def test_file_is_refused_when_a_field_has_bits_that_a_runtime_drops(above: int, tmp_path: Path) -> None:
    model = model_with(external("w", "weights.bin"))
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    tag = 7 << 3 | 2
    rest, graph = model.SerializeToString(), _length(len(graph)) + graph
    content = [rest + _length(number) + graph for number in (tag, tag + above)]
    plain, wide = written(tmp_path, model) / "main.onnx", tmp_path / "wide.onnx"
    plain.write_bytes(content[0])
    wide.write_bytes(content[1])
    for file in (plain, wide):  # the runtime finds the graph, and its weights, in both
        made = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(made.run(None, {"x": np.zeros(2, np.float32)})[0], np.ones(2, np.float32))
    require_contained(tmp_path, plain.name)
    with pytest.raises(VlexportError, match="impossible number") as caught:
        require_contained(tmp_path, wide.name)
    assert caught.value.code == "VLX0505"


def test_other_format_is_not_read_when_a_file_is_named_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "main.ort")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(model_with().SerializeToString(), options, providers=["CPUExecutionProvider"])
    onnxruntime.InferenceSession(tmp_path / "main.ort", providers=["CPUExecutionProvider"])  # it is read by its name
    monkeypatch.setattr(session, "require_contained", lambda *_: None)  # a file may be both formats at once
    with pytest.raises(VlexportError, match="INVALID_PROTOBUF"):
        session.open_session(tmp_path, artifact().model_copy(update={"path": "main.ort"}), 1)


def artifact(**options: int | str) -> Artifact:
    outputs = (TensorSpec(name="y", dtype="float32", shape=(2,)),)
    return Artifact(target="onnxruntime", path="main.onnx", inputs=(SPEC,), outputs=outputs, session_options=options)


def test_session_sees_no_file_when_the_guard_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    written(folder, model_with(external("w", "../weights.bin")))
    (tmp_path / "weights.bin").write_bytes(bytes(8))

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("ONNX Runtime was asked")

    monkeypatch.setattr("onnxruntime.InferenceSession", opened)
    with pytest.raises(VlexportError) as caught:
        session.open_session(folder, artifact(), 1)
    assert caught.value.code == "VLX0605"
    os.rename(tmp_path / "weights.bin", folder / "main.onnx")
    with pytest.raises(VlexportError) as caught:
        session.open_session(folder, artifact(), 1)
    assert caught.value.code == "VLX0505"


@pytest.mark.parametrize(
    "options",
    [{"threads": 10**9}, {"threads": -1}, {"threads": "x"}, {"graph_optimization": "most"}, {"provider": "evil.so"},
     {"dynamic_block_base": 10**12}],
)  # fmt: skip
def test_session_is_refused_when_a_bundle_records_an_impossible_option(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(VlexportError) as caught:
        session.open_session(written(tmp_path, model_with(external("w", "weights.bin"))), artifact(**options), 0)
    assert (caught.value.code, next(iter(options)) in caught.value.message) == ("VLX0505", True)
