"""Real hostile files: each is shown to run its canary under torch alone, and is refused by vlexport without running it.

The canary is a file that appears in the test's folder. One child process loads every file with plain torch and goes
as far as the case says: ``load``, then ``module`` (``.module()``), then ``call`` (running the module). Not shown to run
under torch, and refused all the same: custom objects (they need a C++ class that is registered in the process),
compiled ``.so`` members, and the container tricks, which torch's own zip reader mostly refuses or ignores.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vlexport.core.errors import ModelFileError, VlexportError
from vlexport.frontends.archive import check_archive, read_archive, strip_paths
from vlexport.frontends.archive_zip import read_members, write_members
from vlexport.frontends.checkpoint import read_weights

PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
Members = dict[str, bytes]


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return y.relu(), y.reshape(x.shape[0] * 2)


def clean_members() -> Members:
    torch.manual_seed(0)
    program = torch.export.export(
        Tiny().eval(), (torch.ones(3, 2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"vlexport.json": '{"schema": 1}'})
    return {name: bytes(content) for name, content in read_members(strip_paths(buffer.getvalue())).items()}


class Bomb:
    """Unpickling it runs Python."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (self.code,)


def touch(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w')"


def pickled(code: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Bomb(code), buffer)
    return buffer.getvalue()


def edited(members: Members, name: str, edit: Callable[[Any], Any]) -> Members:
    content = json.loads(members[name])
    edit(content)
    return {**members, name: json.dumps(content).encode()}


def nodes_of(program: Any) -> list[Any]:
    nodes: list[Any] = program["graph_module"]["graph"]["nodes"]
    return nodes


def renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {new if key == old else key: renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return new if value == old else value


def sample_pickle(members: Members, canary: Path) -> Members:
    return {**members, SAMPLES: pickled(touch(canary))}


def pickled_weight(members: Members, canary: Path) -> Members:
    changed = edited(members, WEIGHTS, lambda c: c["config"]["linear.bias"].update(use_pickle=True))
    name = json.loads(changed[WEIGHTS])["config"]["linear.bias"]["path_name"]
    return {**changed, f"data/weights/{name}": pickled(touch(canary))}


def pickled_constant(members: Members, canary: Path, file: str = "tensor_0") -> Members:
    payload = dict(json.loads(members[WEIGHTS])["config"]["linear.bias"])
    payload.update(path_name=file, use_pickle=True, is_param=False)
    changed = edited(members, CONSTANTS, lambda c: c["config"].update(c_0=payload))
    raw = pickle.dumps(Bomb(touch(canary))) if file.startswith("opaque") else pickled(touch(canary))
    return {**changed, f"data/constants/{file}": raw}


def opaque_constant(members: Members, canary: Path) -> Members:
    return pickled_constant(members, canary, "opaque_obj_0")


def legacy_weights(members: Members, canary: Path) -> Members:
    return {**members, "data/weights/model.pt": pickled(touch(canary))}


def shape_expression(members: Members, canary: Path) -> Members:
    def edit(program: Any) -> None:
        size = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]
        size["as_expr"]["expr_str"] = touch(canary)

    return edited(members, PROGRAM, edit)


def tree_spec_import(members: Members, canary: Path) -> Members:
    (canary.parent / f"module_of_{canary.name}.py").write_text(touch(canary))

    def edit(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        enum = {"__enum__": True, "fqn": f"module_of_{canary.name}:X", "name": "X"}
        spec = json.loads(signature["out_spec"])
        spec[1]["context"] = json.dumps(enum)
        signature["out_spec"] = json.dumps(spec)

    return edited(members, PROGRAM, edit)


def input_name(members: Members, canary: Path) -> Members:
    program = renamed(json.loads(members[PROGRAM]), "x", f"x={touch(canary)}")
    return {**members, PROGRAM: json.dumps(program).encode()}


def argument_name(members: Members, canary: Path) -> Members:
    """The name occurs in the header of generated source and in its first line: code, then a string, then a comment."""
    name = f"x): pass\n{touch(canary)}\n'''\ndef forward(self, x): #"

    def edit(program: Any) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [name]

    return edited(members, PROGRAM, edit)


def parameter_path(members: Members, canary: Path) -> Members:
    path = f'a") if {touch(canary)} else getattr(self, "linear'
    changed = {**members, PROGRAM: json.dumps(renamed(json.loads(members[PROGRAM]), "linear.bias", path)).encode()}
    return {**changed, WEIGHTS: json.dumps(renamed(json.loads(members[WEIGHTS]), "linear.bias", path)).encode()}


def guard_code(members: Members, canary: Path) -> Members:
    return edited(members, PROGRAM, lambda p: p.update(guards_code=[f"{touch(canary)}"]))


def file_operator(members: Members, canary: Path) -> Members:
    """``aten::from_file`` makes the file that it maps."""

    def edit(program: Any) -> None:
        graph = program["graph_module"]["graph"]
        relu = next(node for node in nodes_of(program) if node["target"].startswith("torch.ops.aten.relu"))
        relu["target"] = "torch.ops.aten.from_file.default"
        relu["inputs"] = [
            {"name": "filename", "arg": {"as_string": str(canary)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 4}, "kind": 1},
        ]
        assert graph["outputs"]

    return edited(members, PROGRAM, edit)


@dataclass(frozen=True)
class Case:
    """How a clean archive becomes hostile, and how far torch must go to run what it brings."""

    make: Callable[[Members, Path], Members]
    stage: str
    member: str


CASES = {
    case.make.__name__: case
    for case in (
        Case(sample_pickle, "load", SAMPLES),
        Case(pickled_weight, "load", WEIGHTS),
        Case(pickled_constant, "load", CONSTANTS),
        Case(opaque_constant, "load", "data/constants/opaque_obj_0"),
        Case(legacy_weights, "load", "data/weights/model.pt"),
        Case(shape_expression, "load", PROGRAM),
        Case(tree_spec_import, "load", PROGRAM),
        Case(input_name, "load", PROGRAM),
        Case(argument_name, "module", PROGRAM),
        Case(parameter_path, "call", PROGRAM),
        Case(guard_code, "call", PROGRAM),
        Case(file_operator, "call", PROGRAM),
    )
}

VICTIM = """
import sys, torch
sys.path.insert(0, ".")
for argument in sys.argv[1:]:
    name, stage = argument.split(":")
    try:
        if stage == "pickle":
            torch.load(name + ".pt2", weights_only=False)
            continue
        program = torch.export.load(name + ".pt2")
        if stage != "load":
            module = program.module()
        if stage == "call":
            module(torch.ones(3, 2))
    except Exception as error:
        print(name, type(error).__name__, str(error)[-300:])
"""


@pytest.fixture(scope="module")
def members() -> Members:
    return clean_members()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory, members: Members) -> tuple[Path, str]:
    """A folder where plain torch has opened every hostile file, and what that printed."""
    folder = tmp_path_factory.mktemp("victim")
    arguments = ["module:pickle"]
    (folder / "module.pt2").write_bytes(pickled(touch(folder / "module")))
    for name, case in CASES.items():
        (folder / f"{name}.pt2").write_bytes(write_members(case.make(members, folder / name)))
        arguments.append(f"{name}:{case.stage}")
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, *arguments], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    return folder, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("name", CASES)
def test_canary_runs_when_plain_torch_opens_the_file(victim: tuple[Path, str], name: str) -> None:
    folder, printed = victim
    assert (folder / name).exists(), printed


@pytest.mark.parametrize("name", CASES)
def test_file_is_refused_and_canary_silent_when_vlexport_opens_it(tmp_path: Path, members: Members, name: str) -> None:
    path, canary, case = tmp_path / "model.pt2", tmp_path / "canary", CASES[name]
    path.write_bytes(write_members(case.make(members, canary)))
    with pytest.raises(ModelFileError) as caught:
        read_archive(path).exported_program()
    assert caught.value.code == "VLX0106"
    assert caught.value.where.startswith(case.member)
    assert caught.value.hint
    assert not canary.exists()


def test_clean_archive_loads_when_nothing_was_changed(members: Members) -> None:
    program = check_archive(write_members(members)).exported_program()
    assert len(program.module()(torch.ones(3, 2))) == 2


def test_pickled_module_is_refused_when_vlexport_opens_it(victim: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = victim
    assert (folder / "module").exists(), printed
    path, canary = tmp_path / "model.pt", tmp_path / "canary"
    path.write_bytes(pickled(touch(canary)))
    with pytest.raises(ModelFileError) as caught:
        read_archive(path)
    assert caught.value.code == "VLX0104"
    with pytest.raises(ModelFileError) as caught:
        read_weights(path)
    assert caught.value.code == "VLX0108"
    assert not canary.exists()


def zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def entries_of(members: Members, *more: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    return [(f"model/{name}", content) for name, content in members.items()] + list(more)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "model/../evil",
            "/etc/evil",
            "model//evil",
            "model/./evil",
            "model\\..\\evil",
            "other/extra/evil",
            "C:\\evil",
        ),
        *("model/data/aotinductor/model/evil.so", "model/extra/evil.txt", "model/models/other.json", "model/version"),
        *("model/data/weights/weight_9", "model/data/constants/custom_obj_0", "model/evil\x1b[31m", "model/a\x00b"),
    ],
)
def test_archive_is_refused_when_a_member_has_this_name(members: Members, name: str) -> None:
    data = zipped(entries_of(members, (name, b"evil")))
    with pytest.raises(ModelFileError) as caught:
        check_archive(data)
    assert caught.value.code == "VLX0106"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archive_is_refused_when_a_member_occurs_twice(members: Members) -> None:
    with pytest.raises(ModelFileError) as caught:
        check_archive(zipped(entries_of(members, (f"model/{PROGRAM}", b"{}"))))
    assert (caught.value.code, caught.value.where) == ("VLX0106", PROGRAM)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archive_is_refused_when_members_are_compressed(members: Members, method: int) -> None:
    bomb = ("model/data/weights/weight_9", bytes(50_000_000 if method == zipfile.ZIP_DEFLATED else 1000))
    with pytest.raises(ModelFileError) as caught:
        check_archive(zipped(entries_of(members, bomb), method))
    assert caught.value.code == "VLX0106"


@pytest.mark.parametrize("where", ["front", "end", "middle"])
def test_archive_is_refused_when_bytes_belong_to_no_member(members: Members, where: str) -> None:
    data = write_members(members)
    hidden = b"PK\x03\x04" + bytes(40)
    if where == "middle":
        start = int.from_bytes(data[-6:-2], "little")
        data = data[:start] + hidden + data[start:-6] + (start + len(hidden)).to_bytes(4, "little") + data[-2:]
    with pytest.raises(ModelFileError) as caught:
        check_archive({"front": hidden + data, "end": data + hidden, "middle": data}[where])
    assert caught.value.code in {"VLX0105", "VLX0106"}


def test_archive_is_refused_when_two_members_share_their_bytes(members: Members) -> None:
    data = bytearray(write_members(members))
    central = [i for i in range(len(data) - 4) if data[i : i + 4] == b"PK\x01\x02"]
    data[central[1] + 42 : central[1] + 46] = data[central[0] + 42 : central[0] + 46]
    with pytest.raises(ModelFileError) as caught:
        check_archive(bytes(data))
    assert caught.value.code in {"VLX0105", "VLX0106"}


def edit_graph(key: str, value: Any) -> Callable[[Any], None]:
    return lambda program: program["graph_module"]["graph"].update({key: value})


def edit_node(key: str, value: Any) -> Callable[[Any], None]:
    return lambda program: nodes_of(program)[0].update({key: value})


def edit_metadata(key: str, value: str) -> Callable[[Any], None]:
    return lambda program: nodes_of(program)[0]["metadata"].update({key: value})


def edit_bias(**changes: Any) -> Callable[[Any], None]:
    return lambda config: config["config"]["linear.bias"]["tensor_meta"].update(changes)


CUSTOM = {"name": "o", "class_fqn": "__torch__.torch.classes.x.Y"}
REFUSALS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "target": (PROGRAM, edit_node("target", "torch.hub.load_state_dict_from_url")),
    "unregistered operator of ours": (PROGRAM, edit_node("target", "torch.ops.vlexport.no_such.default")),
    "unknown key": (PROGRAM, lambda program: program.update(new_feature=[])),
    "unknown node key": (PROGRAM, edit_node("body", "")),
    "custom object value": (PROGRAM, edit_graph("custom_obj_values", {"o": CUSTOM})),
    "custom object argument": (
        PROGRAM,
        lambda p: nodes_of(p)[0]["inputs"].append({"name": "o", "arg": {"as_custom_obj": CUSTOM}, "kind": 1}),
    ),
    "operator argument": (
        PROGRAM,
        lambda p: nodes_of(p)[0]["inputs"].append({"name": "o", "arg": {"as_operator": "torch.hub.load"}, "kind": 1}),
    ),
    "source function": (PROGRAM, edit_metadata("source_fn_stack", "f,torch.hub.load")),
    "escape code": (PROGRAM, edit_metadata("nn_module_stack", "\x1b]0;x\x07")),
    "namedtuple": (
        PROGRAM,
        lambda p: p["graph_module"].update(treespec_namedtuple_fields={"os.x": {"field_names": ["a"]}}),
    ),
    "verifier": (PROGRAM, lambda program: program.update(verifiers=["EDGE"])),
    "symbol": (PROGRAM, lambda program: program["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 1})),
    "older schema": (PROGRAM, lambda program: program.update(schema_version={"major": 0, "minor": 0})),
    "device": (WEIGHTS, edit_bias(device={"type": "cuda", "index": 0})),
    "stride": (WEIGHTS, edit_bias(strides=[{"as_int": -1}])),
    "symbolic size": (WEIGHTS, edit_bias(sizes=[{"as_expr": {"expr_str": "Symbol('s0')", "hint": None}}])),
    "payload name": (
        WEIGHTS,
        lambda config: config["config"]["linear.bias"].update(path_name="../constants/opaque_obj_0"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_archive_is_refused_when_its_json_holds(members: Members, name: str) -> None:
    member, edit = REFUSALS[name]
    with pytest.raises(ModelFileError) as caught:
        check_archive(write_members(edited(members, member, edit)))
    assert caught.value.code == "VLX0106"
    assert caught.value.where.startswith(member)


def test_target_inside_sub_graph_is_refused_when_it_is_not_allowed(members: Members) -> None:
    def edit(program: Any) -> None:
        inner = json.loads(json.dumps(program["graph_module"]["graph"]))
        inner["nodes"][0].update(target="torch.hub.load", name="hidden")
        argument = {"as_graph": {"name": "body", "graph": inner}}
        nodes_of(program)[0]["inputs"].append({"name": "", "arg": argument, "kind": 1})

    with pytest.raises(ModelFileError) as caught:
        check_archive(write_members(edited(members, PROGRAM, edit)))
    assert caught.value.code == "VLX0106"
    assert "torch.hub.load" in caught.value.message
    assert "'hidden'" in caught.value.where


@pytest.mark.parametrize("change", [{"sizes": [{"as_int": 2**40}]}, {"storage_offset": {"as_int": 1}}])
def test_archive_is_damaged_when_a_tensor_reaches_beyond_its_member(members: Members, change: Any) -> None:
    with pytest.raises(ModelFileError) as caught:
        check_archive(write_members(edited(members, WEIGHTS, edit_bias(**change))))
    assert caught.value.code == "VLX0105"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1, "schema": 1}', '{"schema": NaN}', "{}", "", "\xff"])
def test_archive_is_damaged_when_metadata_is_no_strict_json(members: Members, text: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        check_archive(write_members({**members, "extra/vlexport.json": text.encode("latin-1")}))
    assert caught.value.code == "VLX0105"


def test_archive_is_of_a_later_version_when_its_schema_is_higher(members: Members) -> None:
    for changed in (
        {**members, "extra/vlexport.json": b'{"schema": 2}'},
        edited(members, PROGRAM, lambda program: program.update(schema_version={"major": 9, "minor": 0})),
    ):
        with pytest.raises(ModelFileError) as caught:
            check_archive(write_members(changed))
        assert caught.value.code == "VLX0111"
        assert "update vlexport" in caught.value.hint


def test_foreign_archive_is_named_as_such_when_it_has_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Tiny().eval(), (torch.ones(3, 2),)), path)
    with pytest.raises(ModelFileError) as caught:
        read_archive(path)
    assert (caught.value.code, caught.value.where) == ("VLX0112", str(path))
    assert "vlexport.save" in caught.value.hint


@pytest.mark.parametrize(("content", "code"), [(b"", "VLX0103"), (b"junk" * 99, "VLX0104"), (b"PK\x03\x04", "VLX0105")])
def test_error_has_its_code_when_file_is_empty_junk_or_cut(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_archive(path)
    assert caught.value.code == code


def test_archive_is_damaged_when_truncated_anywhere(members: Members) -> None:
    data = write_members(members)
    cuts = sorted({*range(1, len(data), 97), *range(len(data) - 60, len(data))})
    for cut in cuts:
        with pytest.raises(ModelFileError) as caught:
            check_archive(data[:cut])
        assert caught.value.code == ("VLX0104" if cut < 4 else "VLX0105"), cut


def test_flipped_bit_loads_equal_or_raises_ours_when_anywhere_in_the_file(members: Members) -> None:
    """Most flips break a checksum; so half of them are made inside a member whose checksum is then made anew."""
    rng = random.Random(0)
    data, names = write_members(members), sorted(members)
    expected = check_archive(data).exported_program().module()(torch.ones(3, 2))
    for trial in range(400):
        flipped = bytearray(data)
        if trial % 2:
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            name = rng.choice([name for name in names if "weight_" not in name])
            content = bytearray(members[name])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            flipped = bytearray(write_members({**members, name: bytes(content)}))
        try:
            program = check_archive(bytes(flipped)).exported_program()
        except VlexportError:
            continue
        if trial % 2:
            assert torch.equal(program.module()(torch.ones(3, 2))[0], expected[0])
