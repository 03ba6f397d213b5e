"""The gate of approximate passes: each is judged by the statistic that it declares, and by nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from tests.passes.broken import Rewriting, net_program
from vlexport.core.bundle_schema import GateRecord, StatisticName
from vlexport.core.errors import GateError, InternalError
from vlexport.ir.program import Program
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass, run_pipeline
from vlexport.passes.probes import make_probes
from vlexport.passes.statistic import Statistic, Tally

aten = torch.ops.aten


class Blur(Rewriting):
    """Scales every relu by ``1 + amount``, and says what that may cost."""

    effect = "approximate"

    def __init__(self, amount: float, statistic: Statistic | None, *, operator: str = "aten.relu.default") -> None:
        def rewrite(ir: Program, node: Any) -> Any:
            same = ir.add_call(node.target, node.args, dict(node.kwargs), before=node, value_of=node)
            return ir.add_call(aten.mul.Tensor, (same, 1 + amount), before=node, value_of=node)

        super().__init__(operator, rewrite, name="blur")
        self.promised = statistic

    @property
    def statistic(self) -> Statistic | None:
        return self.promised


def judged(amount: float, statistic: Statistic | None, program: Program | None = None) -> GateRecord:
    program = program or net_program()
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    return run_pass(Blur(amount, statistic), program, gate=gate)[1].gate


@pytest.mark.parametrize(
    ("name", "amount", "good", "bad"),
    [("sqnr_db", 0.01, 30.0, 80.0), ("cosine", 0.5, 0.5, 0.99999), ("max_relative", 0.01, 0.05, 0.0001)],
)
def test_bound_decides_when_a_pass_is_approximate(name: StatisticName, amount: float, good: float, bad: float) -> None:
    record = judged(amount, Statistic(name, good))
    assert (record.proof, record.statistic, record.bound, record.agreement) == ("statistic", name, good, None)
    assert record.value is not None
    assert record.worst > 1e-4, "more than an exact pass may"
    with pytest.raises(GateError) as caught:
        judged(amount, Statistic(name, bad, hint="do less"))
    assert f"pass blur costs more than it may: {name}" in caught.value.message
    assert (caught.value.code, caught.value.exit_code, caught.value.hint) == ("VLX0401", 3, "do less")
    first = "shift" if name == "cosine" else "act"  # scaling turns nothing until something is subtracted
    assert f"in {first} " in caught.value.where


def test_pass_is_refused_when_it_is_approximate_and_promises_nothing() -> None:
    with pytest.raises(InternalError, match="declares no statistic") as caught:
        judged(0.01, None)
    assert caught.value.code == "VLX0403"


def test_statistic_does_not_help_when_a_pass_is_exact() -> None:
    program = net_program()
    blur = Blur(0.01, Statistic("sqnr_db", 0.0))
    blur.effect = "exact"  # type: ignore[misc]
    with pytest.raises(GateError, match="changed what the model computes"):
        run_pass(blur, program, gate=NumericGate(program, make_probes(program, calibration=None, seed=0)))


def test_an_infinite_output_is_no_promise_kept_when_the_bound_is_low() -> None:
    with pytest.raises(GateError):
        judged(math.inf, Statistic("sqnr_db", -1e9))


def test_later_passes_are_held_to_the_outputs_after_an_approximate_one() -> None:
    program = net_program()
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    blurs = [Blur(amount, Statistic("sqnr_db", 20.0)) for amount in (0.05, -0.05 / 1.05)]
    blurs[1].name = "blur-again"  # type: ignore[misc]
    after, records = run_pipeline(program, blurs, gate=gate)
    assert min(record.gate.worst for record in records) > 1e-3, "each by itself"
    assert torch.allclose(after.run(*program.example)[0], program.run(*program.example)[0]), "the two undo each other"


class Picker(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = torch.relu(x)
        return {"scores": scores, "above": scores > 0.7}


@pytest.mark.parametrize(("amount", "kept"), [(0.001, True), (10.0, False)])
def test_share_of_equal_elements_decides_when_an_output_is_boolean(amount: float, kept: bool) -> None:
    program = captured(Picker(), torch.randn(2, 400, generator=torch.Generator().manual_seed(0)))
    promise = Statistic("sqnr_db", -100.0, agreement=0.95)
    if kept:
        agreement = judged(amount, promise, program).agreement
        assert agreement is not None
        assert 0.95 <= agreement <= 1.0
        return
    with pytest.raises(GateError, match=r"a share of equal elements of 0\.\d+ of output 2, 0.95 is promised"):
        judged(amount, promise, program)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("sqnr_db", 47.9, 47.0), ("sqnr_db", math.inf, math.inf), ("sqnr_db", -math.inf, -math.inf),
        ("cosine", 0.999934, 0.99993), ("cosine", 1.0, 1.0), ("max_relative", 0.00123, 0.002),
        ("max_relative", 0.0, 0.0),
    ],
)  # fmt: skip
def test_record_rounds_towards_the_worse_when_written(name: StatisticName, value: float, shown: float) -> None:
    assert Statistic(name, 0.0).shown(value) == pytest.approx(shown, rel=1e-12)


def test_the_worst_of_all_outputs_and_probes_is_recorded_when_several_are_added() -> None:
    tally = Tally(Statistic("max_relative", 0.5))
    one = np.ones(4, np.float32)
    assert tally.add([one, one], [one * 1.25, one]) == ""
    assert tally.add([one], [one * 1.01], aside=3) == ""
    record = tally.record(2)
    assert (record.value, record.worst, record.set_aside, record.probes) == (0.2, 0.2, 3, 2)
    assert tally.add([one], [one * 4]) == "max_relative 0.75 of output 1, 0.5 is promised"


def test_shape_and_dtype_count_when_integers_are_compared() -> None:
    promise, one = Statistic("cosine", 0.0), np.ones(4, np.int64)
    assert promise.of(one, one) == 1.0
    assert promise.broken(one[:2], one)
    assert promise.broken(one.astype(np.int32), one)
    assert not promise.broken(one[:0], one[:0])


def test_records_of_earlier_versions_are_read_when_they_name_no_statistic() -> None:
    record = GateRecord.model_validate({"worst": 0.0, "proof": "float32", "probes": 3})
    assert (record.statistic, record.value, record.bound, record.agreement) == (None, None, None, None)
