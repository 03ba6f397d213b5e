"""Model archives round-trip, are reproducible and name nothing of the machine that wrote them."""

from __future__ import annotations

import getpass
import io
import json
import socket
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

from vlexport.core.errors import BundleError, ModelFileError
from vlexport.frontends.archive import check_archive, read_archive, strip_paths, write_archive
from vlexport.frontends.archive_expression import ExpressionError, check_expression
from vlexport.frontends.archive_targets import refusal_of
from vlexport.frontends.archive_zip import read_members, write_members
from vlexport.frontends.model_file import kind_of


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 2)
        self.register_buffer("mean", torch.arange(3.0).reshape(1, 3, 1, 1))

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.norm(self.conv(image - self.mean)).relu_() * scale
        rows = features.reshape(image.shape[0] * features.shape[2], -1)
        return {"logits": self.head(features.mean((2, 3))), "rows": rows}


def small_program() -> ExportedProgram:
    torch.manual_seed(0)
    batch, height = Dim("batch", min=1, max=8), Dim("height", min=16, max=64)
    return torch.export.export(
        Small().eval(),
        (torch.randn(2, 3, 16, 16),),
        {"scale": torch.ones(1)},
        dynamic_shapes={"image": {0: batch, 2: height}, "scale": None},
    )


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return small_program()


@pytest.fixture
def path(tmp_path: Path, program: ExportedProgram) -> Path:
    target = tmp_path / "small.pt2"
    write_archive(program, {"dims": {"batch": "s77"}, "name": "α <b>"}, target)
    return target


def assert_same_outputs(left: ExportedProgram, right: ExportedProgram, *args: Any, **kwargs: Any) -> None:
    torch.testing.assert_close(right.module()(*args, **kwargs), left.module()(*args, **kwargs), rtol=0, atol=0)


def test_program_round_trips_when_written_and_read(path: Path, program: ExportedProgram) -> None:
    archive = read_archive(path)
    assert kind_of(path) == "vlexport-archive"
    assert archive.metadata == {"schema": 1, "dims": {"batch": "s77"}, "name": "α <b>"}
    loaded = archive.exported_program()
    assert_same_outputs(program, loaded, torch.randn(5, 3, 40, 16), scale=torch.ones(1))
    assert [node.name for node in loaded.graph.nodes] == [node.name for node in program.graph.nodes]
    assert loaded.range_constraints == program.range_constraints
    assert loaded.example_inputs is not None
    assert loaded.example_inputs[0][0].shape == (2, 3, 16, 16)


def test_custom_node_metadata_survives_when_written_and_read(tmp_path: Path) -> None:
    program = small_program()
    custom = {"origins": [3, 4], "module_path": "blocks.0", "source": 'a "b"'}
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = dict(custom)
    write_archive(program, {}, tmp_path / "model.pt2")
    loaded = read_archive(tmp_path / "model.pt2").exported_program()
    found = [node.meta.get("custom") for node in loaded.graph.nodes if node.target == torch.ops.aten.conv2d.default]
    assert found == [custom]


def test_range_is_still_enforced_when_guards_were_dropped(path: Path) -> None:
    module = read_archive(path).exported_program().module()
    with pytest.raises(AssertionError, match="<= 8"):
        module(torch.randn(9, 3, 16, 16), scale=torch.ones(1))


def test_each_call_makes_a_new_program_when_asked_twice(path: Path) -> None:
    archive = read_archive(path)
    first, second = archive.exported_program(), archive.exported_program()
    assert first is not second
    assert_same_outputs(first, second, torch.randn(1, 3, 16, 16), scale=torch.ones(1))


def test_bytes_are_equal_when_same_model_is_saved_twice(tmp_path: Path, path: Path) -> None:
    again = tmp_path / "other name.pt2"
    write_archive(small_program(), {"name": "α <b>", "dims": {"batch": "s77"}}, again)
    assert again.read_bytes() == path.read_bytes()


def test_bytes_are_equal_when_read_program_is_saved_again(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    shapes = ({0: Dim("batch", min=1, max=8)},)
    first, again = tmp_path / "first.pt2", tmp_path / "again.pt2"
    write_archive(torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes), {}, first)
    write_archive(read_archive(first).exported_program(), {}, again)
    assert again.read_bytes() == first.read_bytes()


def test_source_hash_is_equal_when_file_and_stem_are_renamed(tmp_path: Path, path: Path) -> None:
    expected = read_archive(path).source_hash
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes(write_members(read_members(path.read_bytes()), stem="renamed"))
    assert read_archive(renamed).source_hash == expected
    assert len(expected) == 64


def test_source_hash_differs_when_one_weight_differs(tmp_path: Path, path: Path) -> None:
    members = dict(read_members(path.read_bytes()))
    weight = bytearray(members["data/weights/weight_0"])
    weight[0] ^= 1
    changed = check_archive(write_members({**members, "data/weights/weight_0": bytes(weight)}))
    assert changed.source_hash != read_archive(path).source_hash


def test_file_names_no_path_user_or_host_when_written(tmp_path: Path, path: Path) -> None:
    data = path.read_bytes()
    words = ["/root", "/home", str(tmp_path), str(Path.cwd()), socket.gethostname(), f"/{getpass.getuser()}/"]
    assert not [word for word in words if word.encode() in data]
    assert b"site-packages" not in data


def test_stack_traces_keep_package_file_and_line_when_stripped(path: Path) -> None:
    program = json.loads(bytes(read_members(path.read_bytes())["models/model.json"]))
    traces = [node["metadata"].get("stack_trace", "") for node in program["graph_module"]["graph"]["nodes"]]
    assert any('File "test_archive.py", line ' in trace for trace in traces)
    assert any('File "torch/nn/modules/conv.py", line ' in trace for trace in traces)


def test_archive_of_torch_itself_is_readable_when_stripped(program: ExportedProgram) -> None:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"vlexport.json": '{"schema": 1}'})
    archive = check_archive(strip_paths(buffer.getvalue()))
    assert_same_outputs(program, archive.exported_program(), torch.randn(3, 3, 16, 16), scale=torch.ones(1))


def test_torch_reads_the_file_when_vlexport_wrote_it(path: Path, program: ExportedProgram) -> None:
    loaded = torch.export.load(io.BytesIO(path.read_bytes()))
    assert_same_outputs(program, loaded, torch.randn(3, 3, 16, 16), scale=torch.ones(1))


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
def test_timm_model_round_trips_when_batch_is_dynamic(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    shapes = ({0: Dim("batch", min=1, max=32)},)
    program = torch.export.export(model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=shapes, strict=False)
    write_archive(program, {}, tmp_path / "model.pt2")
    loaded = read_archive(tmp_path / "model.pt2").exported_program()
    assert_same_outputs(program, loaded, torch.randn(1, 3, 224, 224))


def test_shared_and_viewed_weights_round_trip_when_tied(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.register_buffer("tail", self.first.weight.detach()[2:, ::2])

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.second(self.first(x)), self.tail.sum() + torch.tensor([2.0])

    program = torch.export.export(Tied().eval(), (torch.randn(2, 4),))
    write_archive(program, {}, tmp_path / "tied.pt2")
    assert_same_outputs(program, read_archive(tmp_path / "tied.pt2").exported_program(), torch.randn(2, 4))


def addresses(program: ExportedProgram) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in program.state_dict.items()}


def test_weights_are_in_memory_once_when_an_archive_is_read(path: Path, program: ExportedProgram) -> None:
    archive = read_archive(path)
    first, second = archive.exported_program(), archive.exported_program()
    assert addresses(first) == addresses(second)
    assert addresses(first) != addresses(program)
    assert {n: (type(t), t.stride(), t.requires_grad) for n, t in first.state_dict.items()} == {
        n: (type(t), t.stride(), t.requires_grad) for n, t in program.state_dict.items()
    }
    in_memory = check_archive(path.read_bytes())  # bytes may not be written to: those weights are copies
    assert_same_outputs(program, in_memory.exported_program(), torch.randn(1, 3, 16, 16), scale=torch.ones(1))


def test_checked_content_is_used_when_the_file_changes_after_it_was_read(path: Path, program: ExportedProgram) -> None:
    archive = read_archive(path)
    path.write_bytes(bytes(path.stat().st_size))  # the same file, every byte of it overwritten
    assert_same_outputs(program, archive.exported_program(), torch.randn(1, 3, 16, 16), scale=torch.ones(1))


def test_no_file_is_left_when_the_program_is_refused(tmp_path: Path) -> None:
    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch._foreach_abs([x])[0]

    program = torch.export.export(Named(), (torch.ones(2),))
    with pytest.raises(ModelFileError) as caught:
        write_archive(program, {}, tmp_path / "model.pt2")
    assert caught.value.code == "VLX0106"
    assert "_foreach_abs" in caught.value.message
    assert "node" in caught.value.where
    assert list(tmp_path.iterdir()) == []


def test_error_names_the_file_when_its_folder_does_not_exist(tmp_path: Path, program: ExportedProgram) -> None:
    with pytest.raises(BundleError) as caught:
        write_archive(program, {}, tmp_path / "no" / "model.pt2")
    assert caught.value.code == "VLX0607"


@pytest.mark.parametrize("expression", [
    "Symbol('s77', positive=True, integer=True)",
    "Add(Mul(Integer(4), FloorDiv(Add(Symbol('s53', integer=True), Integer(-3)), Integer(2))), Integer(1))",
    "Pow(Symbol('u0', integer=True), Integer(2))",
    "Float('0.5', precision=53)",
    "And(GreaterThan(Symbol('s0'), Integer(2)), StrictLessThan(Symbol('s0'), int_oo))",
    "Mul(Rational(1, 2), Symbol('zuf12'))",
    "true",
])  # fmt: skip
def test_shape_expression_is_accepted_when_torch_could_have_written_it(expression: str) -> None:
    check_expression(expression)


@pytest.mark.parametrize("expression", [
    "", "s0", "1", "Integer(1) + Integer(2)", "Integer(1).evalf()", "Symbol('s0').name", "().__class__",
    "Integer(__import__('os').system('true'))", "Lambda(Symbol('s0'), Integer(1))", "Symbol('__import__')",
    "Symbol('s0', commutative=False)", "Symbol('s999999')", "Pow(Integer(9), Integer(999999999))",
    "Pow(Integer(9), Pow(Integer(9), Integer(8)))",
    "Pow(Pow(Pow(Pow(Integer(9), Integer(8)), Integer(8)), Integer(8)), Integer(8))",
    "LShift(Integer(1), Integer(99999999))", "Integer(" + "9" * 5000 + ")", "Add(" * 100 + "Integer(1)" + ")" * 100,
    "Max(" + ", ".join(["Integer(1)"] * 3000) + ")", "Integer(1), Integer(2)", "Integer(1",
    "Float('1e99999', precision=53)", "Float('0.5', precision=99999)",
    "Symbol('s0\\x27')", "lambda: 1", "Integer(1)\n\nprint(1)", "-true",
])  # fmt: skip
def test_shape_expression_is_refused_when_it_is_anything_else(expression: str) -> None:
    with pytest.raises(ExpressionError):
        check_expression(expression)


@pytest.mark.parametrize("target", [
    "torch.ops.aten.conv2d.default", "torch.ops.aten.conv2d.padding", "torch.ops.aten.add_.Tensor",
    "torch.ops.aten.sym_size.int", "torch.ops.aten.einsum.default", "torch.ops.aten.full.default",
    "torch.ops.aten._assert_scalar.default", "_operator.floordiv", "torch.sym_max", "math.trunc",
])  # fmt: skip
def test_target_is_allowed_when_models_call_it(target: str) -> None:
    assert refusal_of(target) is None


@pytest.mark.parametrize("target", [
    "torch.hub.load", "torch.load", "os.system", "_operator.attrgetter", "_operator.methodcaller", "math.factorial",
    "torch.sym_max.__globals__", "torch.ops.load_library", "torch.ops.aten.save.default",
    "torch.ops.aten._print.default",
    "torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Storage", "torch.ops.aten.no_such.default",
    "torch.ops.aten.relu", "torch.ops.aten.relu.overloads", "torch.ops.prim.device.default", "#ns:op", "",
    "torch.ops.aten.relu.default.__class__", "torch.ops.vlexport.no_such.default", "torch.ops.higher_order.while_loop",
])  # fmt: skip
def test_target_is_refused_when_it_is_not_on_the_list(target: str) -> None:
    assert refusal_of(target)


def test_zip_holds_stored_sorted_members_of_fixed_date_when_written(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert not [info.filename for info in infos if "serialization_id" in info.filename]
