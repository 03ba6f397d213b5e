"""per_layer_sqnr: the layer that loses is found, alone and in the quantized Program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.quantizing import SCHEMES, Mixed, images, program_of, quantizer, ranges
from vlexport.ir.program import Program
from vlexport.passes.quantization.layer_sqnr import LayerSqnr, per_layer_sqnr, weakest
from vlexport.passes.quantization.weights import rounded_weight
from vlexport.passes.quantize import Quantize, QuantizeOptions
from vlexport.targets.onnxruntime.emit_quant import emit_quant


@pytest.fixture(scope="module")
def mixed() -> Program:
    return program_of(Mixed())


def measured(program: Program, pass_: Quantize, *, arrived: bool = False) -> dict[str, LayerSqnr]:
    samples: list[tuple[Tensor, ...]] = [(images(4, seed),) for seed in (1, 2)]
    quantized = None
    if arrived:
        quantized = program.copy()
        pass_.run(quantized)
    found = per_layer_sqnr(program, pass_.decisions(program), samples, quantized=quantized)
    return {each.module: each for each in found}


def test_every_layer_has_its_own_ratio_and_what_arrived(mixed: Program) -> None:
    found = measured(mixed, quantizer(mixed), arrived=True)
    assert list(found) == ["stem", "left", "right", "up", "down", "head"]
    assert all(25.0 < each.own_db < 60.0 for each in found.values())
    assert all(each.weight_db >= each.own_db for each in found.values())
    assert all(each.arrived_db is not None for each in found.values())
    assert found["stem"].arrived_db == pytest.approx(found["stem"].own_db, abs=1.5)  # nothing is rounded before it
    assert found["left"].arrived_db is not None
    assert found["left"].arrived_db < found["left"].own_db


def test_arrived_is_none_when_no_quantized_program_is_given(mixed: Program) -> None:
    assert {each.arrived_db for each in measured(mixed, quantizer(mixed)).values()} == {None}


def test_bad_layer_is_the_weakest_when_its_range_is_cut(mixed: Program) -> None:
    table = ranges(mixed, SCHEMES["static-u8s8"])
    pass_ = quantizer(mixed, table=table)
    bad = next(each.operands[0] for each in pass_.decisions(mixed).layers if each.module == "down")
    entry = table.by_value()[bad]
    pass_.ranges = {**table.by_value(), bad: entry.model_copy(update={"low": 0.0, "high": entry.high / 20})}
    found = measured(mixed, pass_, arrived=True)
    assert weakest(found.values())[0].module == "down"
    assert found["down"].own_db < 10.0
    assert found["up"].own_db > 30.0


def test_ranges_of_each_run_count_in_what_a_layer_loses(mixed: Program) -> None:
    options = QuantizeOptions(activations="dynamic")
    decisions = Quantize(options, scheme=SCHEMES["dynamic-u8s8"], emit=emit_quant).decisions(mixed)
    for each in per_layer_sqnr(mixed, decisions, [(images(4, 5),)]):
        assert 25.0 < each.own_db < each.weight_db - 0.1


@pytest.mark.parametrize("kind", ["int8", "palette8"])
def test_weight_of_bfloat16_is_rounded_as_that_of_float32_is(kind: str) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(rounded_weight(weight, kind), rounded_weight(weight.float(), kind))


def test_rounded_weight_is_within_half_a_step_of_each_channel() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 10, 0.1, 3, 0])[:, None]
    steps = weight.abs().amax(1) / 127
    assert ((rounded_weight(weight, "int8") - weight).abs() <= steps[:, None] / 2 * 1.0001).all()
