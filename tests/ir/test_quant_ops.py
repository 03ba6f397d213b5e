"""Our quantization operators: what they compute, and that it stays so through saving, passes and copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vlexport
from tests.harness import captured
from vlexport.core.config import BuildConfig
from vlexport.core.grids import INT4, INT8, INT32, UINT8, Grid, dequantize, quantize
from vlexport.core.palettes import looked_up, palettize
from vlexport.frontends.archive_targets import refusal_of
from vlexport.frontends.sources import open_sources
from vlexport.ir import dialect
from vlexport.ir.exported import exported_from_program, program_from_exported
from vlexport.ir.program import Program
from vlexport.ir.quant_ops import CHOOSE_QPARAMS, DEQUANTIZE, LOOK_UP, OPERATORS, QUANTIZE
from vlexport.ir.text import fingerprint, text
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.eliminate_dead import EliminateDead
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.merge_duplicates import MergeDuplicates
from vlexport.passes.pipeline import run_pass, verify

quick = settings(max_examples=200, derandomize=True, deadline=None, database=None)


def tensors(*arrays: object) -> list[Tensor]:
    return [torch.from_numpy(np.array(each)) for each in arrays]


@pytest.mark.parametrize("grid", [INT8, UINT8, INT32])
@quick
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    scale=st.floats(2.0**-12, 64.0, width=32),
    point=st.integers(0, 127),
)
def test_integers_are_those_of_the_grid_when_quantized(
    grid: Grid, values: list[float], scale: float, point: int
) -> None:
    x, s, z = np.array(values, np.float32), np.array(scale, np.float32), np.array(point, grid.dtype)
    wanted = quantize(x, s, z, grid)
    found = QUANTIZE(*tensors(x, s, z))
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert found.numpy().dtype == wanted.dtype
    back = DEQUANTIZE(found, *tensors(s, z))
    np.testing.assert_array_equal(back.numpy(), dequantize(wanted, s, z))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("grid", [INT8, UINT8])
def test_channels_have_their_own_scale_when_there_is_an_axis(grid: Grid, axis: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 6)).astype(np.float32)
    size = x.shape[axis]
    s = rng.uniform(0.005, 0.05, size).astype(np.float32)
    z = rng.integers(0, 100, size).astype(grid.dtype)
    wanted = quantize(x, s, z, grid, axis=axis)
    found = QUANTIZE(*tensors(x, s, z), axis)
    np.testing.assert_array_equal(found.numpy(), wanted)
    back = DEQUANTIZE(found, *tensors(s, z), axis).numpy()
    np.testing.assert_array_equal(back, dequantize(wanted, s, z, axis=axis))


def test_blocks_have_their_own_scale_when_stored_as_int4() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 8)).astype(np.float32)
    s = np.abs(x).reshape(3, 2, 4).max(-1) / 7.0
    z = np.zeros((3, 2), np.int8)
    stored = quantize(x, s, z, INT4, axis=1, block=4)
    assert (stored.min(), stored.max()) >= (-8, -8)
    assert stored.max() <= 7
    back = DEQUANTIZE(*tensors(stored, s, z), 1, 4, 4).numpy()
    np.testing.assert_array_equal(back, dequantize(stored, s, z, axis=1, block=4))
    assert np.abs(back - x).max() <= s.max() * 0.501


def test_float8_saturates_and_rounds_to_even_when_quantized() -> None:
    x = torch.tensor([0.0, 1.0, 1.0625, 1.1875, 448.0, 460.0, 1e9, -1e9, 2.0**-10])
    zero = torch.zeros((), dtype=torch.float8_e4m3fn)
    found = DEQUANTIZE(QUANTIZE(x, torch.tensor(1.0), zero), torch.tensor(1.0), zero)
    assert found.tolist() == [0.0, 1.0, 1.0, 1.25, 448.0, 448.0, 448.0, -448.0, 0.0]
    half = DEQUANTIZE(QUANTIZE(x, torch.tensor(0.5), zero), torch.tensor(0.5), zero)
    assert half[4:7].tolist() == [224.0, 224.0, 224.0]


@quick
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=10))
def test_scale_and_zero_point_span_the_values_when_chosen_at_run_time(values: list[float]) -> None:
    x = torch.tensor(values)
    scale, point = CHOOSE_QPARAMS(x)
    assert (scale.dtype, point.dtype, scale.shape) == (torch.float32, torch.uint8, ())
    back = DEQUANTIZE(QUANTIZE(x, scale, point), scale, point)
    assert (back - x).abs().max() <= 1.001 * scale + 1e-6 * x.abs().max()


class Quantized(nn.Module):
    """A linear in integers, a float8 and an int4 one, and one whose input is quantized at run time."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(2)
        for name, value in {
            "w": rng.integers(-127, 128, (8, 4)).astype(np.int8), "ws": rng.uniform(0.001, 0.01, 8).astype(np.float32),
            "wz": np.zeros(8, np.int8), "b": rng.integers(-9999, 9999, 8).astype(np.int32), "bz": np.zeros(8, np.int32),
            "xs": np.float32(0.02), "xz": np.uint8(128), "ys": np.float32(0.01), "yz": np.uint8(100),
            "w4": rng.integers(-8, 8, (6, 8)).astype(np.int8), "s4": rng.uniform(0.01, 0.1, (6, 2)).astype(np.float32),
            "z4": np.zeros((6, 2), np.int8),
            "p": rng.integers(0, 16, (4, 3)).astype(np.uint8), "t": np.sort(rng.normal(size=(2, 16)).astype(np.float32)),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.from_numpy(np.array(value)))
        self.register_buffer("bs", self.ws * self.xs)
        self.register_buffer(
            "w8", torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
        )
        self.register_buffer("s8", torch.rand(3, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("z8", torch.zeros(3).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        x = DEQUANTIZE(QUANTIZE(x, self.xs, self.xz), self.xs, self.xz)
        weight, bias = DEQUANTIZE(self.w, self.ws, self.wz, 0), DEQUANTIZE(self.b, self.bs, self.bz, 0)
        x = nn.functional.linear(x, weight, bias)
        x = DEQUANTIZE(QUANTIZE(x, self.ys, self.yz), self.ys, self.yz)
        x = nn.functional.linear(x, DEQUANTIZE(self.w4, self.s4, self.z4, 1, 4, 4))
        scale, point = CHOOSE_QPARAMS(x)
        x = DEQUANTIZE(QUANTIZE(x, scale, point), scale, point)
        x = nn.functional.linear(x, DEQUANTIZE(self.w8, self.s8, self.z8, 0))
        return nn.functional.linear(x, LOOK_UP(self.p, self.t))


@pytest.fixture(scope="module")
def example() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def program(example: Tensor) -> Program:
    return captured(Quantized(), example)


def calls(of: Program) -> list[str]:
    return [dialect.plain_name(n) for n in of.calls() if dialect.op_name(n).startswith("vlexport.")]


def test_values_are_those_of_the_table_of_their_group_when_looked_up() -> None:
    places, tables = palettize(np.random.default_rng(4).standard_normal((6, 5)).astype(np.float32), "palette4", group=2)
    found = LOOK_UP(torch.from_numpy(places), torch.from_numpy(tables))
    assert np.array_equal(found.numpy(), looked_up(places, tables))
    beyond = LOOK_UP(torch.full((6, 1), 200, dtype=torch.uint8), torch.from_numpy(tables))
    assert np.array_equal(beyond.numpy()[::2, 0], tables[:, -1]), "a place beyond the table is its last"


def test_program_holds_the_operators_and_their_dtypes_when_captured(program: Program, example: Tensor) -> None:
    assert calls(program).count("dequantize") == 7
    assert [n for n in program.calls() if dialect.is_opaque(n)] == []
    shown = text(program)
    assert "vlexport.quantize(x, @xs: f32[], @xz: u8[]) -> u8[batch,4]" in shown
    assert "vlexport.dequantize(@w4: i8[6,8], @s4: f32[6,2], @z4: i8[6,2], 1, 4, 4) -> f32[6,8]" in shown
    assert "@w8: f8e4m3[3,6]" in shown
    assert "vlexport.look_up(@p: u8[4,3], @t: f32[2,16]) -> f32[4,3]" in shown
    assert torch.equal(program.run(example)[0], Quantized()(example))


def test_program_is_the_same_when_lifted_and_unlifted(program: Program) -> None:
    again = program_from_exported(exported_from_program(program), program.signature)
    assert fingerprint(again) == fingerprint(program)


def test_program_is_the_same_when_saved_and_opened(program: Program, example: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    vlexport.save(Quantized().eval(), file, inputs=example)
    (source,) = open_sources(BuildConfig(model=str(file))).components.values()
    assert fingerprint(source.program) == fingerprint(program)


def test_integers_stay_when_copied_to_float64(program: Program, example: Tensor) -> None:
    twin = program.double()
    verify(twin, made_by="double")
    assert {str(t.dtype) for t in twin.tensors.values()} == {str(torch.float64), *(
        str(d) for d in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
    )}  # fmt: skip
    found, wanted = twin.run(example.double())[0], program.run(example)[0]
    assert found.dtype is torch.float64
    assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max(), "a step of an integer that lay at a tie"


@pytest.mark.parametrize("kind", [FoldConstants, MergeDuplicates, EliminateDead, Canonicalize])
def test_quantization_stays_when_a_pass_runs(program: Program, kind: type) -> None:
    after, _ = run_pass(kind(), program, gate=None)
    assert sorted(calls(after)) == sorted(calls(program))


def test_archive_may_call_our_operators_and_no_others_when_opened() -> None:
    assert all(refusal_of(f"torch.ops.vlexport.{name}.default") is None for name in OPERATORS)
    assert refusal_of("torch.ops.vlexport.dequantize.out") == "no such operator is registered"
    assert refusal_of("torch.ops.vlexport.run.default") == "no such operator is registered"
    assert refusal_of("torch.ops.vlexporter.quantize.default") is not None
