"""Models that PyTorch's tools quantized are taken as they are, in our own operators, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vlexport
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CaptureError
from vlexport.frontends.archive_targets import refusal_of
from vlexport.frontends.capture import capture
from vlexport.frontends.compat import declare_decomposed_operators
from vlexport.frontends.decomposed import NOTE
from vlexport.frontends.sources import open_sources
from vlexport.ir import dialect, provenance
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, text

declare_decomposed_operators()
theirs = torch.ops.quantized_decomposed
U8, I8, I32 = (0, 255, torch.uint8), (-128, 127, torch.int8), (-(2**31), 2**31 - 1, torch.int32)


class Inner(nn.Module):
    """A linear as PyTorch's tools leave it: activation and result per tensor, weight per channel, bias in int32.

    The bias has the product of both scales: ONNX Runtime's QGemm takes that for granted, whatever is written.
    """

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("w", torch.randint(-127, 128, (3, 4), dtype=torch.int8, generator=draw))
        self.register_buffer("s", torch.rand(3, generator=draw, dtype=torch.float64) * 0.02 + 0.001)
        self.register_buffer("z", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("b", torch.randint(-500, 500, (3,), dtype=torch.int32, generator=draw))
        self.register_buffer("c", self.s * 0.02)
        self.register_buffer("v", torch.randn(3, generator=draw))
        self.register_buffer("t", torch.tensor([0.05]))
        self.register_buffer("p", torch.tensor([7]))

    def forward(self, x: Tensor) -> Tensor:
        x = theirs.quantize_per_tensor(x, 0.02, 131, *U8)
        x = theirs.dequantize_per_tensor(x, 0.02, 131, *U8)
        weight = theirs.dequantize_per_channel(self.w, self.s, self.z, 0, -127, 127, torch.int8)
        bias = theirs.dequantize_per_channel(self.b, self.c, self.z, 0, *I32)
        x = nn.functional.linear(x, weight, bias)
        x = theirs.quantize_per_tensor.tensor(x, self.t, self.p, *I8)
        x = theirs.dequantize_per_tensor.tensor(x, self.t, self.p, *I8)
        stored = theirs.quantize_per_tensor(self.v, 0.03, 0, -127, 127, torch.int8)
        return x * theirs.dequantize_per_tensor(stored, 0.03, 0, -127, 127, torch.int8)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def example() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program() -> Program:
    found = capture(Outer().eval(), example())
    assert NOTE in found.notes
    return found.program


def test_every_call_becomes_our_own_when_captured(program: Program) -> None:
    names = [dialect.op_name(node) for node in program.calls()]
    assert not [name for name in names if name.startswith("quantized_decomposed")]
    assert (names.count("vlexport.quantize.default"), names.count("vlexport.dequantize.default")) == (2, 5)
    shown = text(program)
    assert "vlexport.quantize(x, @inner_scale: f32[], @inner_zero_point: u8[]) -> u8[batch,4]" in shown
    assert "i8[3,4], @inner_scale_2: f32[3], @inner_zero_point_2: i8[3], 0) -> f32[3,4]" in shown
    assert "@inner.v_quantized: i8[3]" in shown, "what is stored is quantized now"
    ours = [node for node in program.calls() if dialect.op_name(node).startswith("vlexport.")]
    assert {provenance.module_path(node) for node in ours} == {"inner"}
    assert all("test_decomposed.py" in provenance.source_line(node) for node in ours)


def test_values_are_theirs_but_for_a_step_at_a_tie_when_run(program: Program) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
    wanted = Outer()(x)
    found = program.run(x)[0]
    step = 0.05 * Inner().v.abs()  # type: ignore[operator]
    assert ((found - wanted).abs() <= step * 1.05 + 1e-6).all()
    assert (found == wanted).float().mean() > 0.9


def test_model_is_the_same_when_saved_and_opened(program: Program, tmp_path: Path) -> None:
    vlexport.save(Outer().eval(), tmp_path / "model.pt", inputs=example())
    (source,) = open_sources(BuildConfig(model=str(tmp_path / "model.pt"))).components.values()
    assert fingerprint(source.program) == fingerprint(program)


def test_exported_file_is_opened_when_torch_wrote_it(program: Program, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    made = torch.export.export(Outer().eval(), (example(),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(made, tmp_path / "own.pt2")
    (source,) = open_sources(BuildConfig(model=str(tmp_path / "own.pt2"))).components.values()
    x = example()
    assert torch.equal(source.program.run(x)[0], program.run(x)[0])


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def found_at_run_time(x: Tensor) -> Tensor:
    scale = x.abs().amax() / 127.0
    point = torch.zeros((), dtype=torch.int64)
    return theirs.dequantize_per_tensor.tensor(
        theirs.quantize_per_tensor.tensor(x, scale, point, *I8), scale, point, *I8
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: theirs.quantize_per_tensor(x, 0.1, 0, -127, 127, torch.int8).float(), "its limits are -127 and 127"),
        (lambda x: theirs.quantize_per_tensor(x, 0.1, 0, 0, 9, torch.int16).float(), "no target stores torch.int16"),
        (found_at_run_time, "its scale is found at run time"),
        (lambda x: theirs.choose_qparams.tensor(x, -128, 127, 1e-9, torch.int8)[0], "choose_qparams"),
    ],
)
def test_call_is_refused_in_words_when_it_is_not_understood(call: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(CaptureError) as error:
        capture(Calls(call).eval(), example())
    assert error.value.code == "VLX0307"
    assert reason in error.value.message
    assert "test_decomposed.py" in error.value.where or "choose_qparams" in error.value.where


def test_archive_may_call_what_is_understood_and_nothing_else_of_it() -> None:
    assert refusal_of("torch.ops.quantized_decomposed.dequantize_per_channel.default") is None
    assert refusal_of("torch.ops.quantized_decomposed.choose_qparams.tensor") is not None
    assert refusal_of("torch.ops.quantized_decomposed.quantize_per_tensor.tensor3") is not None
