"""quantize: what is decided and why the rest stays in float, that it stays right, and which scales are shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.harness import check_golden, check_pass
from tests.passes.quantizing import SCHEMES, Joined, Mixed, images, program_of, quantizer, ranges
from tests.strategies import programs
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.collect import Want, together
from vlexport.calibration.keys import value_keys
from vlexport.calibration.methods import Method
from vlexport.calibration.table import CalibrationTable
from vlexport.core.errors import DataError, GateError, UsageError
from vlexport.core.numerics import sqnr_db
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import QUANTIZE
from vlexport.passes.base import Match, NearMiss
from vlexport.passes.equalize_ranges import EqualizeRanges, equalized_channels
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass, verify
from vlexport.passes.probes import Probe
from vlexport.passes.quantization.even_channels import EvenChannels
from vlexport.passes.quantize import Quantize
from vlexport.passes.smooth_activations import SmoothActivations, smoothed_channels


@pytest.fixture(scope="module")
def mixed() -> Program:
    return program_of(Mixed())


@pytest.fixture(scope="module")
def table(mixed: Program) -> CalibrationTable:
    return ranges(mixed, SCHEMES["static-u8s8"])


def sqnr(pass_: Quantize, program: Program, image: Tensor) -> float:
    after = program.copy()
    pass_.run(after)
    return sqnr_db(after.run(image)[0].numpy(), program.run(image)[0].numpy())


def test_text_is_golden_when_convolutions_and_linears_are_quantized(mixed: Program, table: CalibrationTable) -> None:
    checked = check_pass(quantizer(mixed, table=table), mixed, golden="quantize", expect_changes=6)
    assert {c.what for c in checked.changes} == {"conv2d in uint8 x int8", "linear in uint8 x int8"}
    assert not checked.near_misses


def test_decisions_are_golden_and_norm_and_sum_stay_in_float(mixed: Program, table: CalibrationTable) -> None:
    decisions = quantizer(mixed, table=table).decisions(mixed)
    check_golden("quantize_decisions", decisions.text())
    ops = {key: dialect.plain_name(node) for node, key in value_keys(mixed).items() if node.op == "call_function"}
    assert {ops[each.call] for each in decisions.layers} == {"conv2d", "linear"}
    rounded = {ops.get(each.value, "input") for each in decisions.values}
    assert rounded == {"input", "relu", "conv2d", "layer_norm", "gelu", "mean"}


@pytest.mark.parametrize(("scheme", "least"), [("static-u8s8", 35.0), ("static-u8s7", 30.0)])
def test_little_is_lost_on_unseen_images(mixed: Program, table: CalibrationTable, scheme: str, least: float) -> None:
    assert sqnr(quantizer(mixed, scheme, table), mixed, images(16, 9)) > least


def test_seven_bits_hold_when_the_scheme_says_so(mixed: Program, table: CalibrationTable) -> None:
    after = mixed.copy()
    quantizer(mixed, "static-u8s7", table).run(after)
    weights = [t for name, t in after.tensors.items() if name.endswith("weight_int")]
    assert len(weights) == 6
    assert {int(w.max()) for w in weights} | {-int(w.min()) for w in weights} <= set(range(64))


def test_one_scale_goes_through_join_and_pool_when_convolutions_stand_around_it() -> None:
    program = program_of(Joined())
    values = quantizer(program).decisions(program).values
    shared = [each for each in values if each.for_all and "max_pool" not in each.place][:3]
    assert len([each for each in values if each.scale == shared[0].scale]) == 4, "both convolutions, join and pool"
    assert shared[0].low == min(each.low for each in values[1:5])


def test_join_has_a_scale_of_its_own_when_one_side_is_float() -> None:
    class Half(Joined):
        def forward(self, image: Tensor) -> Tensor:
            return self.last(torch.cat([self.left(image), torch.sin(image), image[:, :1]], 1))

    program = program_of(Half())
    joined = [each for each in quantizer(program).decisions(program).values if each.place.startswith("cat")]
    assert [each.for_all for each in joined] == [False]


def test_value_is_rounded_once_when_several_calls_read_it() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.a, self.b, self.c = (nn.Linear(16, 4) for _ in range(3))

        def forward(self, image: Tensor) -> Tensor:
            x = torch.sin(image)
            return self.a(x) + self.b(x) * self.c(x)

    program = program_of(Three())
    after = check_pass(quantizer(program), program).after
    assert len([n for n in after.calls() if n.target is QUANTIZE]) == 1


class Odd(nn.Module):
    """Calls that cannot be quantized."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.linear, self.kernel = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

    def forward(self, image: Tensor) -> Tensor:
        computed = nn.functional.linear(image, self.kernel * image.mean(), self.linear.bias)
        shifted = nn.functional.linear(image, self.kernel, image.mean((0, 1, 2)))
        constant = self.linear(torch.zeros_like(image) + 0.5)
        return computed + shifted + constant


def test_reason_is_told_when_a_call_stays_in_float() -> None:
    program = program_of(Odd())
    found = list(quantizer(program).find(program))
    assert [each for each in found if isinstance(each, Match)] == []
    reasons = [each.reason for each in found if isinstance(each, NearMiss)]
    assert [reason.split(" on ")[0] for reason in reasons] == [
        "its weight is computed, not stored", "its bias is computed, not stored", "add is 0.5",
    ]  # fmt: skip


def test_module_stays_in_float_when_it_is_kept(mixed: Program, table: CalibrationTable) -> None:
    pass_ = quantizer(mixed, table=table, keep="left,down")
    assert [each.module for each in pass_.decisions(mixed).layers] == ["stem", "right", "up", "head"]
    assert [m.reason for m in pass_.run(mixed.copy())[1]] == ["it is kept in float"] * 2
    with pytest.raises(UsageError, match=r"no module is called 'lef'.*'left'"):
        quantizer(mixed, table=table, keep="lef").run(mixed.copy())


def test_gate_names_the_pass_when_too_much_is_lost(mixed: Program, table: CalibrationTable) -> None:
    """Ranges that cut nearly everything off: plain rounding is not what goes wrong."""
    cut = {k: e.model_copy(update={"low": e.low / 50, "high": e.high / 50}) for k, e in table.by_value().items()}
    pass_ = quantizer(mixed, table=table)
    pass_.ranges = cut
    gate = NumericGate(mixed, [Probe("images", (images(4, 2),))], sighted=True)
    with pytest.raises(GateError) as error:
        run_pass(pass_, mixed, gate=gate)
    assert (error.value.code, "pass quantize costs more" in error.value.message) == ("VLX0401", True)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(most=5, including=("linear",)))
def test_program_is_valid_and_decided_once_when_graphs_are_random(program: Program) -> None:
    """Behind smoothing and equalization, which compute the same."""
    example = program.example[0]
    try:
        rewritten = evened(program, example)
        found = quantizer(rewritten, table=ranges(rewritten, SCHEMES["static-u8s8"], example))
    except DataError:
        assume(False)  # NaN or infinite
    for ours, reference in zip(rewritten.run(example), program.run(example), strict=True):
        assert sqnr_db(ours.numpy(), reference.numpy()) > 60.0
    after = rewritten.copy()
    changes, _ = found.run(after)
    verify(after, made_by="quantize")
    assert len(changes) == len(found.decisions(rewritten).layers)
    assert not found.run(after)[0]
    assert [v.shape for v in after.run(example)] == [v.shape for v in program.run(example)]


def evened(program: Program, example: Tensor) -> Program:
    """The program behind the two passes that make channels alike."""
    for kind, wanted in ((SmoothActivations, smoothed_channels), (EqualizeRanges, equalized_channels)):
        channels = wanted(program)
        if any(channels(node) for node in program.calls()):
            seen = together(channels, lambda _: Want(histogram=False))
            table = calibrate(program, dataset(example.numpy(), program), seen, Method())
            pass_ = kind(scheme=SCHEMES["static-u8s8"], ranges=table.by_value(), samples=[(example,)])
            before, program = program, program.copy()
            pass_.run(program)
            carried_over(pass_, program, example)
            verify(program, made_by=f"{pass_.name} of {len(before.calls())} calls")
            assert not pass_.run(program)[0], "it does not do the same twice"
    return program


def carried_over(pass_: EvenChannels, program: Program, example: Tensor) -> None:
    """What the pass says of the ranges of its result is what a run of it shows."""
    measured = calibrate(program, dataset(example.numpy(), program), lambda _: Want(histogram=False), Method())
    assert pass_.behind
    for entry in measured.values:
        said = pass_.behind.get(entry.value, entry)
        assert (said.op, said.place) == (entry.op, entry.place)
        near = 1e-4 * max(-entry.low, entry.high)
        assert (said.low, said.high) == pytest.approx((entry.low, entry.high), rel=0, abs=near)


def test_nothing_is_found_when_nothing_was_calibrated(mixed: Program) -> None:
    assert list(Quantize().find(mixed)) == []
