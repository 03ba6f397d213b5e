"""The onnxruntime target: what it finds here, what it writes, and sessions as recorded."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.core.artifact import Artifact
from vlexport.core.devices import this_machine
from vlexport.core.errors import VlexportError
from vlexport.frontends.capture import capture
from vlexport.targets import CATALOGUE, open_target
from vlexport.targets.base import Brief, Target
from vlexport.targets.onnx.lower import onnx_with_lines
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget
from vlexport.targets.onnxruntime.session import OnnxRuntimeSession

KEPT_METADATA = {"pkg.torch.onnx.name_scopes", "pkg.onnxscript.optimizer.folded_from"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.words = nn.Embedding(9, 4)

    def forward(self, image: Tensor, ids: Tensor) -> dict[str, Tensor]:
        pooled = torch.relu(self.conv(image)).mean(dim=(2, 3))
        return {"both": pooled + self.words(ids), "count": ids + 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, image: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return self.block(image, ids)


INPUTS = (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3]))


@pytest.fixture(scope="module")
def program() -> Any:
    torch.manual_seed(0)
    return capture(Net().eval(), INPUTS).program


@pytest.fixture(scope="module")
def lowered(program: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("artifact")
    options = OnnxRuntimeOptions(opset=19, graph_optimization="basic")
    return folder, OnnxRuntimeTarget().lower(program, folder, Brief(options, threads=3))


def arrays(batch: int = 1) -> dict[str, Any]:
    return {"image": np.ones((batch, 3, 8, 8), np.float32), "ids": np.full(batch, 2)}


def refused(code: str, call: Any) -> VlexportError:
    with pytest.raises(VlexportError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


# The target


def test_probe_tells_version_providers_and_instruction_set_when_installed() -> None:
    found = OnnxRuntimeTarget().probe()
    assert (found.available, found.version, found.reason) == (True, onnxruntime.__version__, "")
    assert "CPUExecutionProvider" in found.providers
    assert found.instruction_set == this_machine().instruction_set


def test_probe_tells_what_to_install_when_the_runtime_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = OnnxRuntimeTarget().probe()
    assert (found.available, found.version) == (False, "")
    error = refused("VLX0501", OnnxRuntimeTarget().require)
    assert error.exit_code == 4
    assert "pip install 'vlexport[onnxruntime]'" in error.hint


def test_catalogue_opens_every_target_and_names_the_nearest_when_one_is_misspelt() -> None:
    for name in CATALOGUE:
        assert open_target(name).id == name
    error = refused("VLX0701", lambda: open_target("onnxruntim"))
    assert (error.exit_code, "did you mean 'onnxruntime'?" in error.message) == (2, True)


@pytest.mark.parametrize("wished", ["fp8", "bf16"])
def test_precision_is_refused_when_the_target_does_not_run_it(wished: str) -> None:
    error = refused("VLX0502", lambda: OnnxRuntimeTarget().choose_precision(wished))
    assert (error.exit_code, "fp32" in error.hint) == (4, True)
    assert OnnxRuntimeTarget().choose_precision("fp32") == ("fp32", "asked for")
    assert OnnxRuntimeTarget().choose_precision(None)[0] == "fp32"


# The artifact


def test_artifact_has_the_opset_and_public_names_when_lowered(lowered: tuple[Path, Artifact]) -> None:
    folder, artifact = lowered
    model = onnx_ir.load(folder / artifact.path)
    assert model.opset_imports == {"": 19}
    assert [v.name for v in model.graph.inputs] == ["image", "ids"] == [s.name for s in artifact.inputs]
    assert [v.name for v in model.graph.outputs] == ["both", "count"] == [s.name for s in artifact.outputs]
    assert [p.name for p in folder.iterdir()] == ["main.onnx"]
    assert len(model.functions) == 0


def test_artifact_names_module_paths_but_no_machine_when_lowered(lowered: tuple[Path, Artifact]) -> None:
    folder, artifact = lowered
    model = onnx_ir.load(folder / artifact.path)
    assert dict(model.metadata_props) == {}
    assert dict(model.graph.metadata_props) == {}
    keys = {key for node in model.graph for key in node.metadata_props}
    assert keys <= KEPT_METADATA
    scopes = {node.op_type: node.metadata_props.get("pkg.torch.onnx.name_scopes", "") for node in model.graph}
    assert "block.conv" in scopes["Conv"]
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    assert all(not v.metadata_props for v in values)
    data = (folder / artifact.path).read_bytes()
    words = (str(Path.cwd()), str(Path.home()) + "/", socket.gethostname(), getpass.getuser() + "@", "site-packages",
             str(Path(vlexport.__file__).parent), ".py", "stack_trace", "fx_node")  # fmt: skip
    assert [word for word in words if word.encode() in data] == []


def test_artifact_has_the_same_bytes_when_lowered_again(program: Any, lowered: Any, tmp_path: Path) -> None:
    options = OnnxRuntimeOptions(opset=19, graph_optimization="basic")
    OnnxRuntimeTarget().lower(program, tmp_path / "again", Brief(options, threads=3))
    assert (tmp_path / "again/main.onnx").read_bytes() == (lowered[0] / "main.onnx").read_bytes()


@pytest.mark.parametrize("opset", [17, 99])
def test_opset_is_refused_when_out_of_range(opset: int) -> None:
    with pytest.raises(ValueError, match="opset"):
        OnnxRuntimeOptions(opset=opset)


def test_weights_lie_beside_the_graph_when_they_are_large(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlexport.targets.onnx.lower.EXTERNAL_ABOVE_BYTES", 100)
    artifact = OnnxRuntimeTarget().lower(program, tmp_path, Brief(OnnxRuntimeOptions(), threads=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["main.onnx", "weights.bin"]
    with OnnxRuntimeTarget().open_here(tmp_path, artifact) as session:
        found = session.run({"image": INPUTS[0].numpy(), "ids": INPUTS[1].numpy()})
    wanted = program.run(*INPUTS)
    # the bound that a build promises for fp32
    np.testing.assert_allclose(found["both"], wanted[0], rtol=0, atol=1e-4 * float(wanted[0].abs().max()))
    monkeypatch.undo()
    (tmp_path / "weights.bin").unlink()
    refused("VLX0505", lambda: OnnxRuntimeTarget().open(tmp_path, artifact))


class Unlowered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.norm(x))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2)


def test_operator_is_named_with_its_module_when_onnx_cannot_express_it(tmp_path: Path) -> None:
    program = capture(Wrapped(Unlowered()).eval(), torch.rand(2, 4)).program
    error = refused(
        "VLX0503", lambda: OnnxRuntimeTarget().lower(program, tmp_path / "a", Brief(OnnxRuntimeOptions(), threads=1))
    )
    assert error.exit_code == 4
    assert "bessel_j0" in error.message + error.where
    assert "inner" in error.where
    assert not (tmp_path / "a").exists()


def test_custom_operator_is_named_when_nothing_lowers_it(tmp_path: Path) -> None:
    with torch.library._scoped_library("vlexport_test", "DEF") as library:
        library.define("strange(Tensor x) -> Tensor")
        library.impl("strange", lambda x: x.sin(), "CompositeExplicitAutograd")
        library.impl("strange", lambda x: torch.empty_like(x), "Meta")

        class Custom(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.vlexport_test.strange(x)

        program = capture(Wrapped(Custom()).eval(), torch.rand(2, 4)).program
        error = refused(
            "VLX0503",
            lambda: OnnxRuntimeTarget().lower(program, tmp_path / "a", Brief(OnnxRuntimeOptions(), threads=1)),
        )
    assert "strange" in error.where
    assert "inner" in error.where


class Selected(nn.Module):
    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, indices = torch.topk(scores * 2, 3)
        return values, indices, torch.topk(scores, 2).indices


def test_output_is_lowered_when_it_is_one_of_several_results_of_an_operator(tmp_path: Path) -> None:
    program = capture(Selected().eval(), torch.rand(2, 8)).program
    artifact = OnnxRuntimeTarget().lower(program, tmp_path, Brief(OnnxRuntimeOptions(), threads=1))
    assert "Identity" not in {node.op_type for node in onnx_ir.load(tmp_path / "main.onnx").graph}
    given = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    with OnnxRuntimeTarget().open_here(tmp_path, artifact) as session:
        found = session.run({"scores": given.numpy()})
    for value, wanted in zip(found.values(), program.run(given), strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_nodes_are_traced_to_source_lines_when_lowered() -> None:
    program = capture(Wrapped(nn.Linear(4, 4)).eval(), torch.rand(2, 4)).program
    model, lines = onnx_with_lines(program, opset=20)
    operators = {str(node.name): node.op_type for node in model.graph}
    assert sorted(operators[name] for name in lines) == ["Gemm", "Mul"]
    assert all(re.fullmatch(rf"{Path(__file__).name}:\d+", line) for line in lines.values())
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


# Sessions


def test_session_has_the_recorded_options_when_opened(lowered: tuple[Path, Artifact]) -> None:
    with OnnxRuntimeTarget().open_here(*lowered) as session:
        assert isinstance(session, OnnxRuntimeSession)
        options = session._session.get_session_options()
        assert options.intra_op_num_threads == 3
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        assert session._session.get_providers() == ["CPUExecutionProvider"]
        assert session.timing == "real"
    with OnnxRuntimeTarget().open_here(*lowered, threads=2) as session:
        assert session._session.get_session_options().intra_op_num_threads == 2  # type: ignore[attr-defined]


def test_defaults_are_those_of_the_runtime_when_nothing_is_recorded(lowered: tuple[Path, Artifact]) -> None:
    folder, artifact = lowered
    theirs = onnxruntime.SessionOptions()
    with OnnxRuntimeTarget().open_here(folder, artifact.model_copy(update={"session_options": {}})) as session:
        ours = session._session.get_session_options()  # type: ignore[attr-defined]
    for name in ("enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level", "execution_mode"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert ours.get_session_config_entry("session.dynamic_block_base") == "0"


def test_every_tunable_reaches_the_session_when_retuned(lowered: tuple[Path, Artifact], program: Any) -> None:
    folder, artifact = lowered
    target = OnnxRuntimeTarget()

    def seen(found: Artifact) -> list[object]:
        with target.open_here(folder, found) as session:
            options = session._session.get_session_options()  # type: ignore[attr-defined]
            entries = ("session.intra_op.allow_spinning", "session.dynamic_block_base")
            return [
                options.graph_optimization_level, options.enable_cpu_mem_arena, options.enable_mem_pattern,
                options.intra_op_num_threads, *map(options.get_session_config_entry, entries),
            ]  # fmt: skip

    before = seen(artifact)
    given = {"opset": "19", "graph_optimization": "basic"}
    for name, values in target.tunables(target.check_options(given)).items():
        for value in values:
            options = target.check_options({**given, name: value})
            found = target.retuned(artifact, options)
            assert (found.path, found.inputs, found.outputs) == (artifact.path, artifact.inputs, artifact.outputs)
            assert sum(a != b for a, b in zip(seen(found), before, strict=True)) == 1, f"{name}={value}"
            assert found.session_options == {**artifact.session_options, name: getattr(options, name)}


def test_value_is_not_tried_again_when_an_option_has_it() -> None:
    target = OnnxRuntimeTarget()
    standing = target.tunables(OnnxRuntimeOptions())
    assert standing["graph_optimization"] == ("extended", "basic", "none")
    assert standing["allow_spinning"] == ("false",)
    other = target.tunables(OnnxRuntimeOptions(graph_optimization="basic", allow_spinning=False))
    assert other["graph_optimization"] == ("all", "extended", "none")
    assert other["allow_spinning"] == ("true",)


def test_target_without_tunables_says_so_when_retuned() -> None:
    target = OnnxRuntimeTarget()
    assert Target.tunables(target, OnnxRuntimeOptions()) == {}
    artifact = Artifact(target="onnxruntime", path="main.onnx", inputs=(), outputs=())
    error = refused("VLX0901", lambda: Target.retuned(target, artifact, OnnxRuntimeOptions()))
    assert "onnxruntime" in error.message


@pytest.mark.parametrize("isolated", [False, True])
def test_session_gives_names_and_dtypes_when_run(isolated: bool, lowered: tuple[Path, Artifact], program: Any) -> None:
    target = OnnxRuntimeTarget()
    with (target.open if isolated else target.open_here)(*lowered) as session:
        for batch in (1, 4):
            given = arrays(batch)
            found = session.run(given)
            wanted = program.run(torch.from_numpy(given["image"]), torch.from_numpy(given["ids"]))
            assert {name: (v.dtype.name, v.shape) for name, v in found.items()} == {
                "both": ("float32", (batch, 4)), "count": ("int64", (batch,)),
            }  # fmt: skip
            # the bound that a build promises for fp32
            np.testing.assert_allclose(found["both"], wanted[0], rtol=0, atol=1e-4 * float(wanted[0].abs().max()))
            assert found["count"].tolist() == wanted[1].tolist()


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": np.ones((1, 3, 8, 9), np.float32)}, "input image: shape is 1×3×8×9"),
        ({"image": np.ones((1, 3, 8, 8), np.float16)}, "input image: dtype is float16, float32 is wanted"),
        ({"ids": np.full(1, 2, np.int32)}, "input ids: dtype is int32, int64 is wanted"),
        ({"ids": None}, "input ids: it is missing"),
        ({"imag": np.ones(1)}, "no input 'imag'; did you mean 'image'?"),
    ],
)
def test_session_refuses_input_when_it_does_not_fit(
    isolated: bool, change: dict[str, Any], said: str, lowered: tuple[Path, Artifact]
) -> None:
    given = {name: value for name, value in {**arrays(), **change}.items() if value is not None}
    target = OnnxRuntimeTarget()
    with (target.open if isolated else target.open_here)(*lowered) as session:
        error = refused("VLX0507", lambda: session.run(given))
        assert session.run(arrays())["count"].tolist() == [3]  # and it still works
    assert (error.exit_code, said in error.message) == (1, True)


def test_output_reads_right_when_it_has_the_name_of_an_input(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def forward(self, output: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"y": output + 1, "output": y * 2, "output.out": y - 1, "same": y}

    program = capture(Echo().eval(), (torch.zeros(1, 2), torch.ones(1, 2))).program
    artifact = OnnxRuntimeTarget().lower(program, tmp_path, Brief(OnnxRuntimeOptions(), threads=1))
    with OnnxRuntimeTarget().open_here(tmp_path, artifact) as session:
        found = session.run({"output": np.full((1, 2), 5, np.float32), "y": np.full((1, 2), 7, np.float32)})
    assert {name: value[0, 0] for name, value in found.items()} == {"y": 6, "output": 14, "output.out": 6, "same": 7}
