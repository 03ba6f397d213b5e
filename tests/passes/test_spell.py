"""Stored weights in 8 or 4 bits: how far they lie from the floats, and that what is shared is stored once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.calibration.planted import dataset
from tests.harness import captured
from tests.passes.quantizing import images
from tests.targets.quantized_nets import program_of, scheme_of
from vlexport.calibration.calibrate import calibrate
from vlexport.calibration.methods import Method
from vlexport.calibration.scales import float8, half_scale
from vlexport.core.scheme import QuantScheme
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import DEQUANTIZE, E4M3
from vlexport.passes.base import NearMiss
from vlexport.passes.quantization.decide import wanted_values
from vlexport.passes.quantization.weights import as_steps
from vlexport.passes.quantize import Quantize
from vlexport.targets import open_target

FLOOR = 2.0**-14


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["int8", "int4", "e4m3"]), st.floats(-12.0, 4.0))
def test_weight_is_off_by_half_a_step_at_most_whatever_its_size(seed: int, kind: str, size: float) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    block = 32 if kind == "int4" else 0
    steps, scale, point = as_steps(weight, kind, block=block, scales="float16")
    assert torch.equal(scale.half().float(), scale), "scales are numbers of float16"
    assert not point.float().any()
    assert float(scale.min()) >= FLOOR
    how = (1, block, 4) if block else (0,)
    back = DEQUANTIZE(steps, scale, point, *how)
    wide = scale.repeat_interleave(block, 1) if block else scale[:, None]
    if kind == "e4m3":  # 4 significant bits, and steps of 2⁻⁹ below the smallest normal number
        room = torch.maximum(weight.abs() * 2.0**-4, wide * 2.0**-10)
    else:
        room = wide * 0.5
        assert int(steps.abs().max()) <= (7 if kind == "int4" else 127)
    assert bool(((back - weight).abs() <= room * 1.0001).all())


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-30, 6e4))
def test_half_scale_is_the_next_number_that_is_no_smaller(scale: float) -> None:
    found = float(half_scale(np.float32(scale)))
    below = float(np.nextafter(np.float16(found), np.float16(0.0)))
    assert found >= np.float32(scale)
    assert found == FLOOR or below < np.float32(scale)


def test_scale_is_the_largest_of_half_when_none_spans_the_range() -> None:
    assert half_scale(np.array([1.0, 7e4], np.float32)).tolist() == [1.0, 65504.0]


def test_value_stays_in_float_when_no_scale_of_half_spans_it() -> None:
    program, scheme = program_of("cnn"), scheme_of("tensorrt", "static-s8")
    table = calibrate(
        program, dataset(images(4, 1).numpy(), program), wanted_values(program, scheme), Method(name="min-max")
    )
    ranges = table.by_value()
    first = next(iter(ranges))
    far = {**ranges, first: ranges[first].model_copy(update={"high": 1e8})}
    _, misses = Quantize(scheme=scheme, ranges=far, emit=open_target("tensorrt").emit_quant).run(program.copy())
    assert [miss.reason for miss in misses] == ["input image reaches 1e+08: no scale of float16 spans that"]


def test_float8_reaches_as_far_as_the_range() -> None:
    assert float(float8(-896.0, 5.0)) == 2.0
    assert torch.tensor(448.0).to(E4M3).float() == 448.0


class Tied(nn.Module):
    """A table of words that the head reads again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.narrow = nn.Embedding(300, 64), nn.Linear(48, 64)

    def forward(self, ids: Tensor, more: Tensor) -> Tensor:
        return nn.functional.linear(self.words(ids) + self.narrow(more), self.words.weight)


@pytest.fixture(scope="module")
def tied() -> Program:
    return captured(Tied(), (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 48)))


def run(program: Program, target: str, scheme: QuantScheme) -> tuple[Program, list[NearMiss]]:
    after = program.copy()
    _, misses = Quantize(scheme=scheme, emit=open_target(target).emit_quant).run(after)
    return after, misses


@pytest.mark.parametrize("target", ["coreml", "onnxruntime"])
def test_table_is_stored_once_when_the_head_shares_it(tied: Program, target: str) -> None:
    after, _ = run(tied, target, scheme_of(target, "weights-s8"))
    kept = [tensor for tensor in after.used_tensors().values() if tensor.dtype is torch.int8 and tensor.ndim == 2]
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(64, 48), (300, 64)]
    ids, more = torch.arange(10).reshape(2, 5), torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
    (found,), (wanted,) = after.run(ids, more), tied.run(ids, more)
    assert float((found - wanted).pow(2).sum() / wanted.pow(2).sum()) < 10.0**-3.5


def test_linear_stays_in_float_when_blocks_do_not_divide_it(tied: Program) -> None:
    after, misses = run(tied, "coreml", scheme_of("coreml", "weights-s4"))
    assert [miss.reason for miss in misses] == ["its 48 input features are no multiple of blocks of 32"]
    assert len([t for t in after.used_tensors().values() if t.dtype is torch.int8 and t.shape == (300, 64)]) == 1
