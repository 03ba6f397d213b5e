"""The golden check: firm rows at the bound, rows whose choices the last digits tip over at one of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.core.artifact import Array, Artifact, Session, TensorSpec
from vlexport.core.bundle_schema import Component, CostRecord, Golden
from vlexport.core.errors import GateError
from vlexport.passes.selection import tipped_choices
from vlexport.stages.golden import check_golden, tipping_note
from vlexport.stages.write_bundle import write_golden

INPUTS = {"x": np.zeros((3, 2), np.float32)}
OUTPUTS = {"y": np.array([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0]], np.float32), "mean": np.float32([2.0])}
PLAIN = Golden(inputs="", outputs="", tolerance=0.1)
TIPPING = Golden(inputs="", outputs="", tolerance=0.1, tipping=(1,), tipping_tolerance=0.3)


class Made(Session):
    """Computes what it was told to."""

    timing = "none"

    def __init__(self, outputs: Mapping[str, Array]) -> None:
        shapes = [TensorSpec(name=name, shape=value.shape, dtype="float32") for name, value in outputs.items()]
        super().__init__((TensorSpec(name="x", shape=(3, 2), dtype="float32"),), tuple(shapes))
        self._outputs = dict(outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(self._outputs)

    def close(self) -> None:
        """Nothing is open."""


def off(row: int, by: float, *, mean: float = 0.0) -> Made:
    """Off in one row by a share of the largest value, and in the output without rows."""
    y = OUTPUTS["y"].copy()
    y[row, 0] += 2.0 * by
    return Made({"y": y, "mean": OUTPUTS["mean"] + np.float32(2.0 * mean)})


def checked(session: Session, golden: Golden) -> float:
    return check_golden(session, INPUTS, OUTPUTS, golden=golden, code="VLX0504")


@pytest.mark.parametrize(("row", "golden"), [(0, PLAIN), (1, PLAIN), (0, TIPPING), (2, TIPPING)])
def test_row_is_refused_at_the_bound_when_its_choices_are_firm(row: int, golden: Golden) -> None:
    assert checked(off(row, 0.05), golden) == pytest.approx(0.05)
    with pytest.raises(GateError, match=r"VLX0504.*2.0e-01 \(bound 1e-01\)"):
        checked(off(row, 0.2), golden)


def test_row_has_its_own_bound_when_its_choices_tip_over() -> None:
    assert checked(off(1, 0.2), TIPPING) == pytest.approx(0.2)
    with pytest.raises(GateError, match=r"VLX0504.*4.0e-01 \(bound 3e-01\)"):
        checked(off(1, 0.4), TIPPING)


def test_output_without_rows_has_the_bound_of_the_loosest_row() -> None:
    assert checked(off(1, 0.0, mean=0.2), TIPPING) == pytest.approx(0.2)
    for golden in (PLAIN, TIPPING):
        with pytest.raises(GateError, match="mean of the artifact"):
            checked(off(1, 0.0, mean=0.4), golden)


@pytest.mark.parametrize(
    ("moved", "bound"), [(0.001, 0.1), (0.0552, 0.12), (0.15, 0.3), (0.2, 0.4), (0.9, 0.5), (float("inf"), 0.5)]
)
def test_bound_is_twice_what_moved_and_never_blind(moved: float, bound: float, tmp_path: Path) -> None:
    found = write_golden(tmp_path, "main", INPUTS, OUTPUTS, tolerance=0.1, tipping=(1,), moved=moved)
    assert found.tipping_tolerance == bound
    assert Golden.model_validate(found.model_dump(mode="json")) == found


def test_nothing_is_written_of_choices_when_none_tips(tmp_path: Path) -> None:
    found = write_golden(tmp_path, "main", INPUTS, OUTPUTS, tolerance=0.1)
    assert set(found.model_dump(mode="json")) == {"inputs", "outputs", "tolerance"}


def test_user_is_told_of_rows_with_a_looser_bound() -> None:
    def component(golden: Golden, smallest: Golden | None) -> Component:
        return Component(
            artifact=Artifact(target="t", path="p", inputs=(), outputs=()), dims={}, preprocess={}, labels=(),
            golden=golden, golden_smallest=smallest, passes=(), cost=CostRecord(macs=0, parameters=0, size_bytes=0),
        )  # fmt: skip

    (note,) = tipping_note({"main": component(TIPPING, TIPPING)})
    assert note.startswith(
        "2 golden samples hang on choices or integers that the last digits tip over: the artifact is held to 3.0e-01"
    )
    assert tipping_note({"main": component(PLAIN, None)}) == ()
    as_before = TIPPING.model_copy(update={"tipping_tolerance": 0.1})
    assert tipping_note({"main": component(PLAIN, as_before)}) == ()


class Best(nn.Module):
    """A linear over the better half of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        best = x[:, :, 0].topk(4).indices
        return self.linear(x.gather(1, best[:, :, None].expand(-1, -1, 6)).mean(1))


def test_other_choice_at_a_tie_passes_and_a_wrong_weight_does_not(tmp_path: Path) -> None:
    """Tokens 3 and 4 tie in row 1: an artifact that takes the other one is right; one with wrong weights never is."""
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 1.0 + torch.arange(8)
    x[1, 3] = x[1, 4]
    x[1, 3, 1:] += 0.3
    net = Best()
    program = captured(net, x)
    hangs = tipped_choices(program, [x])
    assert hangs.rows == (1,)
    inputs, outputs = {"x": x.numpy()}, {"y": program.run(x)[0].numpy()}
    golden = write_golden(
        tmp_path, "main", inputs, outputs, tolerance=1e-4, tipping=hangs.rows, moved=hangs.moved
    )  # fmt: skip
    assert golden.tipping_tolerance < 0.5

    def held(made: Tensor) -> float:
        return check_golden(Made({"y": made.numpy()}), inputs, outputs, golden=golden, code="VLX0504")

    other = x.clone()
    other[1, [3, 4]] = x[1, [4, 3]]
    (takes_the_other,) = program.run(torch.where(torch.arange(8)[:, None] == 3, other - 1e-3, other))
    assert held(takes_the_other) > 1e-2
    for wrong in range(5):
        with torch.no_grad():
            broken = Best()
            broken.linear.weight[wrong] *= -1.0
            with pytest.raises(GateError, match="VLX0504"):
                held(broken(x))
