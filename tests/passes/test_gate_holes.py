"""Ways past the gate that were once open, and sound passes that were once accused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, randomize
from tests.passes.broken import Rewriting, Whole, with_tensor
from vlexport.core.bundle_schema import Change
from vlexport.core.errors import CapabilityError, GateError
from vlexport.ir.program import Program
from vlexport.passes.base import Match, NearMiss, Pass
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import make_probes
from vlexport.passes.reparameterize import Reparameterize
from vlexport.passes.selection import undecided_rows

aten = torch.ops.aten


def gate_of(program: Program, calibration: list[Tensor] | None = None) -> NumericGate:
    return NumericGate(program, make_probes(program, calibration=calibration, seed=0))


class TwoScales(nn.Module):
    """Boxes of hundreds beside scores of thousandths, as detectors return them."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.boxes(x) * 3000, self.scores(x) * 1e-3], dim=-1)


def vanish(ir: Program, node: Node) -> Node:
    wanted = "scores.weight" in str(node.args[1].target)  # type: ignore[union-attr]
    return with_tensor(ir, node, 1, lambda t: t * 0.5 if wanted else t.clone())


def test_small_part_is_seen_when_it_vanishes_beside_large_values() -> None:
    torch.manual_seed(0)
    program = captured(TwoScales(), torch.randn(1, 4))
    with pytest.raises(GateError) as caught:
        run_pass(Rewriting("aten.linear.default", vanish), program, gate=gate_of(program))
    assert caught.value.code == "VLX0401"
    assert "scores" in caught.value.where


def test_pass_is_caught_when_a_weight_left_the_range_of_float32() -> None:
    """In float64 both programs are finite and equal, and yet the artifact would compute NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e20)  # type: ignore[operator]
        model[1].weight.mul_(1e20)  # type: ignore[operator]
    program = captured(model, torch.randn(1, 2, 4, 4) * 1e-30)
    with pytest.raises(GateError) as caught:
        run_pass(Reparameterize(), program, gate=gate_of(program))
    assert caught.value.code == "VLX0401"


class OnceWrong(Pass[Program]):
    """Wrong in its first run only: a proof by running it again would prove something else."""

    name = "once-wrong"
    stage = "normalize"

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        return iter(())

    def apply(self, ir: Program, match: Match) -> Change:
        raise AssertionError("never called")

    def run(self, ir: Program, *, limit: int | None = None) -> tuple[list[Change], list[NearMiss]]:
        self.runs += 1
        node = ir.calls("aten.linear.default")[0]
        factor = 1.5 if self.runs == 1 else 1.0 + 1e-13
        ir.replace(node, with_tensor(ir, node, 1, lambda t: t * factor + 0))
        return [Change(what="broken")], []


def test_pass_is_caught_when_it_is_wrong_in_its_first_run_only() -> None:
    torch.manual_seed(0)
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(1, 4))
    with pytest.raises(GateError) as caught:
        run_pass(OnceWrong(), program, gate=gate_of(program))
    assert "applied again" in caught.value.message


def widen(ir: Program) -> None:
    last = ir.results[0]
    ir.output.replace_input_with(
        last, ir.add_call(aten.to.dtype, (last, torch.float64), before=ir.output, value_of=last)
    )


def test_pass_is_caught_when_it_changes_an_output_dtype() -> None:
    torch.manual_seed(0)
    program = captured(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(GateError):
        run_pass(Whole(widen), program, gate=gate_of(program))


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(~mask, -5.0)


def unmask(ir: Program, node: Node) -> Node:
    return ir.add_call(aten.mul.Scalar, (node.args[0], 1.0), before=node, value_of=node)


def test_pass_is_caught_when_it_drops_a_mask() -> None:
    torch.manual_seed(0)
    program = captured(Masked(), (torch.randn(2, 8), torch.ones(2, 8, dtype=torch.bool)))
    with pytest.raises(GateError):
        run_pass(Rewriting("aten.masked_fill.Scalar", unmask), program, gate=gate_of(program))


class Ranked(nn.Module):
    """The indices of the five best places of a folded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.norm(self.conv(image)).mean(1).flatten(1)
        values, places = scores.topk(5)
        return values, places


def test_fold_is_not_accused_when_a_flat_photo_leaves_a_selection_open() -> None:
    flat = torch.full((1, 3, 12, 12), 0.37)
    accepted = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = Ranked()
        randomize(model, seed)
        program = captured(model, torch.randn(1, 3, 12, 12))
        probes = make_probes(program, calibration=[flat], seed=0)
        assert [p.undecided for p in probes if p.name == "calibration sample"] == [(0,)]
        _, record = run_pass(Reparameterize(), program, gate=NumericGate(program, probes))
        accepted += record.gate.set_aside
    assert accepted  # on some seed the flat photo did disagree, and was counted


def test_rows_are_undecided_when_scores_that_decide_are_equal() -> None:
    class Best(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.argmax(1), x.topk(2, dim=1, largest=False).indices

    program = captured(Best(), torch.randn(2, 4))
    rows = torch.tensor([[4.0, 3, 2, 1], [4, 4, 2, 1], [4, 3, 1, 1], [4, 3, 3, 1]])
    assert undecided_rows(program, [rows]) == (1, 2, 3)
    assert undecided_rows(captured(nn.Linear(4, 4), torch.randn(2, 4)), [rows]) == ()


class Windowed(nn.Module):
    """Holds an operator that makes float32 whatever it is fed, so it has no float64 twin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.norm(self.conv(x)), torch.hann_window(16).unsqueeze(-1))


def test_fold_is_recorded_unproved_when_the_program_has_no_float64_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Windowed()
    randomize(model)
    program = captured(model, torch.randn(1, 1, 16))
    monkeypatch.setattr("vlexport.passes.gate.FLOAT32_BOUND", 0.0)  # asks for the proof whatever the rounding
    _, record = run_pass(Reparameterize(), program, gate=gate_of(program))
    assert record.gate.proof == "unproved"


class HalfBlind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.arange(6.0).reshape(1, 6))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"scores": x * 2, "anchors": self.anchors + 0}


def test_blind_outputs_are_named_when_others_are_seen() -> None:
    gate = gate_of(captured(HalfBlind(), torch.randn(1, 6)))
    assert gate.blind == (1,)


def test_gate_is_refused_when_no_output_is_seen() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    with pytest.raises(CapabilityError) as caught:
        gate_of(captured(Blind(), torch.randn(1, 6)))
    assert caught.value.code == "VLX0402"
