"""What every target owes its users, whatever its runtime: derive a class and name the target.

::

    class TestNumpy(TargetConformance):
        target_name = "numpy"

The networks need only: linear, embedding, relu, add, mul, neg, gt and mean. What depends on the session is asked of one
in this process and of one in a child, for both are public.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.core.artifact import Array, Artifact, Session
from vlexport.core.bundle_schema import Golden
from vlexport.core.errors import GateError, VlexportError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.pipeline import pipeline_of
from vlexport.frontends.capture import capture
from vlexport.ir.program import Program
from vlexport.stages.golden import check_golden
from vlexport.targets import open_target
from vlexport.targets.base import Brief, Target

FLOAT_TOLERANCE = 1e-4
"""Bound of max|a−b| / max|b| that a build promises for fp32; these nets are two layers deep and stay far below it."""


def one_input() -> nn.Module:
    """Its input is called ``input``, which graphs of torch spell otherwise: Python has a function of that name."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Several(nn.Module):
    """Floats and integers in; floats, integers, booleans, None and an output named as an input out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, image: Tensor, ids: Tensor) -> dict[str, Any]:
        mixed = image + self.table(ids)
        return {
            "scores": self.head(mixed),
            "nothing": None,
            "count": ids + 1,
            "large": ids > 3,
            "image": -image,
            "nested": {"mean": mixed.mean(-1), "left out": None},
        }


class NoBatch(nn.Module):
    """A fixed shape, and an output without dims."""

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return x.mean(), None, x * 2


@dataclass(frozen=True)
class Case:
    """A lowered network: its program, artifact and folder, and inputs of a batch."""

    program: Program
    folder: Path
    artifact: Artifact

    def inputs(self, batch: int = 2, seed: int = 0) -> dict[str, Array]:
        """Seeded inputs; ids stay in the vocabulary of nine."""
        random = np.random.default_rng(seed)
        found: dict[str, Array] = {}
        for spec in self.artifact.inputs:
            shape = tuple(batch if isinstance(dim, str) else dim for dim in spec.shape)
            whole = spec.dtype.startswith("int")
            drawn = random.integers(0, 9, shape) if whole else random.standard_normal(shape)
            found[spec.name] = drawn.astype(spec.dtype)
        return found

    def expected(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """What the Program computes in PyTorch."""
        values = self.program.run(*(torch.from_numpy(inputs[spec.name].copy()) for spec in self.artifact.inputs))
        return {spec.name: value.numpy() for spec, value in zip(self.artifact.outputs, values, strict=True)}


def require_equal(found: dict[str, Array], wanted: dict[str, Array]) -> None:
    """Names in order, dtypes, shapes, and values: floats within the tolerance, others equal."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        if value.dtype.kind == "f":
            bound = FLOAT_TOLERANCE * float(np.abs(value).max())
            np.testing.assert_allclose(found[name], value, rtol=0, atol=bound, err_msg=name)
        else:
            assert np.array_equal(found[name], value), name


def refused(code: str, call: Any) -> VlexportError:
    """The error that ``call`` must raise."""
    with pytest.raises(VlexportError) as caught:
        call()
    assert caught.value.code == code
    assert len(caught.value.message) > 10
    return caught.value


class LoweringConformance:
    """Cases that only lower: all that can be asked of a target whose artifacts do not run here.

    Class attributes:
        target_name: Its id.
        reproducible: Whether lowering twice gives the same bytes.
        options: Of the target; its defaults where left out.
    """

    target_name: ClassVar[str]
    reproducible: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]] = {}

    # -- what the cases run on -----------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls) -> Target:
        return open_target(cls.target_name)

    @classmethod
    def lowered(cls, target: Target, module: nn.Module, inputs: Any, folder: Path, *, threads: int = 1) -> Case:
        program = capture(module.eval(), inputs).program
        return Case(program, folder, target.lower(program, folder, cls.brief(target, threads=threads)))

    @classmethod
    def brief(cls, target: Target, *, threads: int = 1) -> Brief:
        return Brief(target.check_options(cls.options), threads=threads)

    @pytest.fixture(scope="class")
    @classmethod
    def one(cls, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Case:
        torch.manual_seed(0)
        return cls.lowered(target, one_input(), torch.rand(2, 4), tmp_path_factory.mktemp("one"))

    @pytest.fixture(scope="class")
    @classmethod
    def several(cls, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Case:
        torch.manual_seed(0)
        example = (torch.rand(2, 4), torch.tensor([1, 8]))
        return cls.lowered(target, Several(), example, tmp_path_factory.mktemp("several"))

    # -- names, dtypes, shapes -----------------------------------------------------------------------------------

    def test_specs_are_those_of_the_program_when_lowered(self, several: Case) -> None:
        artifact = several.artifact
        assert [(s.name, s.dtype) for s in artifact.inputs] == [("image", "float32"), ("ids", "int64")]
        assert [(s.name, s.dtype) for s in artifact.outputs] == [
            ("scores", "float32"), ("count", "int64"), ("large", "bool"), ("image", "float32"),
            ("nested.mean", "float32"),
        ]  # fmt: skip

    # -- the artifact --------------------------------------------------------------------------------------------

    def test_artifact_names_no_machine_when_written(self, several: Case) -> None:
        places = {str(Path.cwd()), str(several.folder), str(Path.home()) + "/", socket.gethostname(),
                  getpass.getuser() + "@", "site-packages", str(Path(vlexport.__file__).parent)}  # fmt: skip
        files = [file for file in several.folder.rglob("*") if file.is_file()]
        assert files
        for file in files:
            content = file.read_bytes()
            assert [place for place in places if place.encode() in content] == [], file.name

    def test_artifact_is_the_same_when_lowered_again(self, target: Target, one: Case, tmp_path: Path) -> None:
        again = target.lower(one.program, tmp_path, self.brief(target))
        assert again == one.artifact

        def contents(folder: Path) -> dict[str, bytes]:
            return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

        assert contents(tmp_path).keys() == contents(one.folder).keys()
        assert not self.reproducible or contents(tmp_path) == contents(one.folder)

    def test_lowering_leaves_the_program_as_it_was_when_done(self, target: Target, one: Case, tmp_path: Path) -> None:
        from vlexport.ir.text import fingerprint

        before = fingerprint(one.program)
        target.lower(one.program, tmp_path / "a", self.brief(target))
        target.lower_naive(one.program, tmp_path / "b")
        assert fingerprint(one.program) == before

    def test_operator_is_named_when_it_cannot_be_expressed(self, target: Target, tmp_path: Path) -> None:
        class Strange(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.special.bessel_j0(x) * 2

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Strange()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x + 1)

        program = capture(Outer().eval(), torch.rand(2, 4)).program
        error = refused("VLX0503", lambda: target.lower(program, tmp_path / "out", self.brief(target)))
        assert "bessel_j0" in error.message + error.where
        assert "inner" in error.where
        assert not (tmp_path / "out").exists(), "nothing is written before it is known that everything can be"

    # -- facts in the manifest -----------------------------------------------------------------------------------

    def test_artifact_record_survives_json_when_written(self, target: Target, one: Case) -> None:
        artifact = one.artifact
        assert artifact.target == target.id == self.target_name
        assert (one.folder / artifact.path).exists()
        assert not Path(artifact.path).is_absolute()
        assert ".." not in Path(artifact.path).parts
        assert Artifact.model_validate_json(artifact.model_dump_json()) == artifact

    def test_facts_are_plain_text_when_recorded(self, target: Target) -> None:
        facts = target.compatibility(self.brief(target))
        tools = target.tools()
        assert facts, "a device needs something to be checked against"
        assert all(re.fullmatch(r"\d[\w.]*", version) for version in tools.values()), tools
        for text in (json.dumps(facts), json.dumps(tools)):
            assert str(Path.home()) not in text
        assert all(isinstance(value, str) and value for value in facts.values())

    def test_precisions_are_honest_when_asked(self, target: Target) -> None:
        assert target.choose_precision(None) == (target.precisions[0], target.precision_reason)
        assert target.precision_reason
        for wished in {"fp32", "fp16", "bf16", "int8", "fp8"} - set(target.precisions):
            assert target.precisions[0] in refused("VLX0502", lambda w=wished: target.choose_precision(w)).hint


class TargetConformance(LoweringConformance):
    """Cases for one target whose artifacts run here."""

    def threads_of(self, session: Session) -> int | None:
        """Threads that a session in this process uses; None where the runtime has no such number."""
        return None

    @pytest.fixture(scope="class", params=["here", "child"])
    @classmethod
    def opened(cls, request: pytest.FixtureRequest, target: Target, several: Case) -> Iterator[Session]:
        """One session of each kind for all cases that leave it usable."""
        opener = target.open_here if request.param == "here" else target.open
        with opener(several.folder, several.artifact, threads=1) as session:
            yield session

    # -- names, dtypes, shapes -----------------------------------------------------------------------------------

    def test_session_has_the_specs_of_the_artifact_when_opened(self, several: Case, opened: Session) -> None:
        artifact = several.artifact
        assert (opened.inputs, opened.outputs) == (artifact.inputs, artifact.outputs)

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_outputs_are_those_of_the_program_when_the_batch_varies(
        self, batch: int, several: Case, opened: Session
    ) -> None:
        inputs = several.inputs(batch, seed=batch)
        require_equal(opened.run(inputs), several.expected(inputs))

    def test_output_without_dims_keeps_its_shape_when_run(self, target: Target, tmp_path: Path) -> None:
        program = capture(NoBatch().eval(), torch.rand(3, 2), dynamic=False).program
        artifact = target.lower(program, tmp_path, self.brief(target))
        case = Case(program, tmp_path, artifact)
        assert [spec.shape for spec in artifact.outputs] == [(), (3, 2)]
        with target.open_here(tmp_path, artifact, threads=1) as session:
            require_equal(session.run(case.inputs()), case.expected(case.inputs()))

    def test_values_stay_when_the_session_runs_again(self, several: Case, opened: Session) -> None:
        inputs, others = several.inputs(2, seed=1), several.inputs(2, seed=2)
        before = {name: value.copy() for name, value in inputs.items()}
        first = opened.run(inputs)
        kept = {name: value.copy() for name, value in first.items()}
        opened.run(others)
        for name, value in first.items():
            assert np.array_equal(value, kept[name]), f"a later run wrote over output {name}"
        for name, value in inputs.items():
            assert np.array_equal(value, before[name]), f"the run wrote to input {name}"
        first["scores"][:] = 0  # the caller's own
        again = opened.run(inputs)
        assert all(np.array_equal(again[name], kept[name]) for name in kept)

    def test_inputs_are_read_right_when_their_memory_is_odd(self, several: Case, opened: Session) -> None:
        inputs = several.inputs(3)
        wide = np.zeros((6, 8), np.float32)
        wide[::2, ::2] = inputs["image"]
        fixed = inputs["ids"].copy()
        fixed.flags.writeable = False
        found = opened.run({"ids": fixed, "image": wide[::2, ::2]})  # in another order, too
        require_equal(found, several.expected(inputs))

    # -- refusals ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"image": np.ones((0, 4), np.float32), "ids": np.ones(0, np.int64)}, "0×4"),
            ({"image": np.ones((2, 5), np.float32)}, "2×5"),
            ({"image": np.ones(4, np.float32)}, "shape is 4"),
            ({"image": np.float32(1)}, "scalar"),
            ({"image": np.ones((2, 4))}, "float64"),
            ({"image": np.ones((2, 4), ">f4")}, ">f4"),
            ({"image": np.ones((2, 4), object)}, "image"),
            ({"image": np.full((2, 4), "x")}, "image"),
            ({"ids": np.ones(2, np.int32)}, "int32"),
            ({"ids": np.ones(2, np.float32)}, "float32"),
            ({"ids": None}, "missing"),
            ({"imag": np.ones((2, 4), np.float32)}, "did you mean 'image'"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_input_is_refused_by_name_when_it_does_not_fit(
        self, change: dict[str, Any], said: str, several: Case, opened: Session
    ) -> None:
        inputs = {name: value for name, value in {**several.inputs(2), **change}.items() if value is not None}
        error = refused("VLX0507", lambda: opened.run(inputs))
        assert error.exit_code == 1
        assert said in error.message
        assert error.where in {*several.inputs(), *change}
        good = several.inputs(1)
        require_equal(opened.run(good), several.expected(good))  # and the session still works

    def test_artifact_is_refused_when_it_is_damaged(self, target: Target, one: Case, tmp_path: Path) -> None:
        folder = shutil.copytree(one.folder, tmp_path / "damaged")
        (folder / one.artifact.path).write_bytes(np.random.default_rng(0).bytes(500))
        for opener in (target.open_here, target.open):
            error = refused("VLX0505", lambda opener=opener: opener(folder, one.artifact))
            assert error.exit_code == 4
            assert str(tmp_path) not in error.message

    def test_artifact_is_refused_when_its_file_is_gone(self, target: Target, one: Case, tmp_path: Path) -> None:
        for opener in (target.open_here, target.open):
            error = refused("VLX0505", lambda opener=opener: opener(tmp_path, one.artifact))
            assert str(tmp_path) not in error.message

    # -- life of a session ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("isolated", [False, True])
    def test_session_is_closed_when_closed_twice(self, isolated: bool, target: Target, one: Case) -> None:
        session = (target.open if isolated else target.open_here)(one.folder, one.artifact, threads=1)
        session.close()
        session.close()
        assert "closed" in refused("VLX0506", lambda: session.run(one.inputs())).message

    def test_crash_is_reported_when_the_child_dies(self, target: Target, one: Case) -> None:
        with target.open(one.folder, one.artifact, threads=1) as session:
            assert session._child is not None
            os.kill(session._child.pid, signal.SIGKILL)
            error = refused("VLX0506", lambda: session.run(one.inputs()))
            assert (error.exit_code, "signal 9" in error.message) == (4, True)

    def test_sessions_do_not_mix_when_two_are_open(self, target: Target, one: Case, several: Case) -> None:
        with target.open_here(one.folder, one.artifact) as a, target.open_here(several.folder, several.artifact) as b:
            for _ in range(2):
                require_equal(a.run(one.inputs()), one.expected(one.inputs()))
                require_equal(b.run(several.inputs()), several.expected(several.inputs()))

    def test_components_run_as_one_when_each_lies_in_its_folder(
        self, target: Target, one: Case, several: Case, tmp_path: Path
    ) -> None:
        cases = {"one": one, "several": several}
        for name, case in cases.items():
            shutil.copytree(case.folder, tmp_path / name)
        pipeline = pipeline_of(
            {name: case.artifact for name, case in cases.items()},
            {name: case.program.signature.dims for name, case in cases.items()}, (),
        )  # fmt: skip
        inputs = {**one.inputs(3), **several.inputs(2)}
        expected = {**one.expected(one.inputs(3)), **several.expected(several.inputs(2))}
        for opener in (target.open_here, target.open):
            with opener(tmp_path, pipeline, threads=1) as session:
                require_equal(session.run(inputs), expected)

    def test_threads_are_honoured_when_asked_for(self, target: Target, one: Case, tmp_path: Path) -> None:
        case = self.lowered(target, one_input(), torch.rand(2, 4), tmp_path / "three", threads=3)
        for recorded, asked, wanted in ((case, 0, 3), (case, 2, 2), (one, 0, 1)):
            with target.open_here(recorded.folder, recorded.artifact, threads=asked) as session:
                assert self.threads_of(session) in (None, wanted)
                require_equal(session.run(recorded.inputs()), recorded.expected(recorded.inputs()))

    def test_timing_is_declared_and_held_to_when_measured(self, target: Target, one: Case) -> None:
        with target.open_here(one.folder, one.artifact) as here, target.open(one.folder, one.artifact) as child:
            assert here.timing == child.timing
            assert isinstance(child, IsolatedSession)
            if child.timing == "real":
                times = child.time_ms(one.inputs(), warmup=1, runs=3)
                assert len(times) == 3
                assert min(times) > 0
            else:
                error = refused("VLX0803", lambda: child.time_ms(one.inputs(), warmup=1, runs=3))
                assert child.timing in error.message

    # -- the artifact --------------------------------------------------------------------------------------------

    def test_golden_check_decides_when_vectors_are_right_and_wrong(self, several: Case, opened: Session) -> None:
        inputs = several.inputs(2)
        wanted = several.expected(inputs)
        golden = Golden(inputs="", outputs="", tolerance=FLOAT_TOLERANCE)
        check_golden(opened, inputs, wanted, golden=golden, code="VLX0504")
        for name, value in wanted.items():
            wrong = {**wanted, name: ~value if value.dtype == bool else value + 1}
            with pytest.raises(GateError) as caught:
                check_golden(opened, inputs, wrong, golden=golden, code="VLX0504")
            assert (caught.value.code, caught.value.where) == ("VLX0504", name)

    def test_artifact_works_elsewhere_when_moved(self, target: Target, one: Case, tmp_path: Path) -> None:
        torch.manual_seed(0)
        case = self.lowered(target, one_input(), torch.rand(2, 4), tmp_path / "made")
        (tmp_path / "made").rename(tmp_path / "moved")
        with target.open(tmp_path / "moved", case.artifact, threads=1) as session:
            require_equal(session.run(case.inputs()), case.expected(case.inputs()))

    def test_naive_artifact_agrees_when_opened(self, target: Target, one: Case, tmp_path: Path) -> None:
        artifact = target.lower_naive(one.program, tmp_path)
        with target.open_here(tmp_path, artifact, threads=1) as session:
            require_equal(session.run(one.inputs(3)), one.expected(one.inputs(3)))

    def test_probe_is_honest_when_the_runtime_is_here(self, target: Target) -> None:
        probe = target.probe()
        assert probe.available, "these tests run where the runtime is"
        assert probe.version
        assert target.require() == probe
