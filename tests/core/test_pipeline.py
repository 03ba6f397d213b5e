"""Sessions of several components as one, and the artifact that travels to the child process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from vlexport.core.artifact import Array, Artifact, DimRange, Session, TensorSpec, Timing
from vlexport.core.errors import CapabilityError, InputError
from vlexport.core.pipeline import Pipeline, artifact_from, open_artifact, pipeline_of

OPENED: list[Adder] = []


class Adder(Session):
    """Adds as much as the artifact's path says."""

    def __init__(self, folder: Path, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        if artifact.path == "refused":
            raise CapabilityError("VLX0505", "refused")
        self.folder, self.threads, self.closed = folder, threads, False
        self.timing: Timing = "emulated" if artifact.path == "0" else "real"
        self.amount = float(artifact.path)
        OPENED.append(self)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = self.checked(inputs)
        return {self.outputs[0].name: sum(arrays.values()) + np.float32(self.amount)}

    def operator_times(self, inputs: Mapping[str, Array], *, runs: int) -> dict[str, tuple[int, float]]:
        return {"Add": (runs, float(self.run(inputs)[self.outputs[0].name][0])), f"Of{self.amount:g}": (1, self.amount)}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _fresh() -> None:
    OPENED.clear()


def adder(amount: str, *inputs: str, output: str = "sum") -> Artifact:
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=("n",)) for name in inputs)
    return Artifact(
        target="t", path=amount, inputs=specs, outputs=(TensorSpec(name=output, dtype="float32", shape=("n",)),)
    )


def made(parts: dict[str, Artifact], *edges: tuple[str, str]) -> Artifact:
    return pipeline_of(parts, {name: {"n": DimRange()} for name in parts}, edges)


def opened(artifact: Artifact, threads: int = 0) -> Session:
    return open_artifact(Adder, Path("place"), artifact, threads)


CHAIN = {"b": adder("10", "x", "y"), "a": adder("1", "x")}


def ones(*names: str, size: int = 2) -> dict[str, Array]:
    return {name: np.ones(size, np.float32) for name in names}


def test_components_run_in_order_when_chained() -> None:
    with opened(made(CHAIN, ("a.sum", "b.y")), threads=3) as session:
        assert [spec.name for spec in session.inputs] == ["a.x", "b.x"]
        assert session.run(ones("a.x", "b.x"))["sum"].tolist() == [13, 13]
        assert {str(each.folder): each.threads for each in OPENED} == {"place/a": 3, "place/b": 3}
    assert all(each.closed for each in OPENED)


def test_operators_are_those_of_all_components_each_on_what_it_is_given() -> None:
    with opened(made(CHAIN, ("a.sum", "b.y"))) as session:
        found = session.operator_times(ones("a.x", "b.x"), runs=3)
    assert list(found.items()) == [("Add", (6, 15.0)), ("Of10", (1, 10.0)), ("Of1", (1, 1.0))]


def test_artifact_is_itself_when_it_is_the_only_one() -> None:
    artifact = made({"a": adder("1", "x")})
    assert type(artifact) is Artifact
    assert artifact.needed_with("x") == ("x",)
    with opened(artifact):
        assert OPENED[0].folder == Path("place")


def test_pipeline_is_the_same_when_it_went_through_json() -> None:
    pipeline = made(CHAIN, ("a.sum", "b.y"))
    assert isinstance(pipeline, Pipeline)
    assert artifact_from(pipeline.model_dump(mode="json")) == pipeline
    single = adder("1", "x")
    assert artifact_from(single.model_dump(mode="json")) == single


def test_timing_is_the_weakest_when_components_differ() -> None:
    with opened(made({"a": adder("1", "x"), "b": adder("0", "x")})) as session:
        assert session.timing == "emulated"


def test_first_session_is_closed_when_the_second_is_refused() -> None:
    with pytest.raises(CapabilityError):
        opened(made({"a": adder("1", "x"), "b": adder("refused", "x")}))
    assert [each.closed for each in OPENED] == [True]


def test_part_is_run_when_an_independent_component_is_left_out() -> None:
    pipeline = made({"image": adder("1", "x"), "text": adder("2", "ids", output="found")})
    assert pipeline.needed_with("ids") == ("ids",)
    with opened(pipeline) as session:
        assert {k: v.tolist() for k, v in session.run(ones("ids")).items()} == {"found": [3, 3]}
        sizes = {**ones("x", size=1), **ones("ids", size=3)}  # one image against three texts
        assert {k: len(v) for k, v in session.run(sizes).items()} == {"sum": 1, "found": 3}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "input a.x: it is missing"),
        (ones("a.x"), "input b.x: it is missing"),
        ({**ones("a.x", "b.x"), "b.y": np.ones(2, np.float32)}, "no input 'b.y'"),
        ({"a.x": np.ones(2, np.float32), "b.x": np.ones(3, np.float32)}, "n is 3 in input b.x, but 2 in a.x"),
        (ones("ax"), "did you mean 'a.x'"),
    ],
)
def test_input_is_refused_by_public_name_when_it_does_not_fit(inputs: dict[str, Array], said: str) -> None:
    with opened(made(CHAIN, ("a.sum", "b.y"))) as session, pytest.raises(InputError, match="VLX0507") as caught:
        session.run(inputs)
    assert said in caught.value.message
