"""The rounded twin: the same program in float32, rounded where half values are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.ir.rounded import holds_half, nearest_half, rounded_twin
from vlexport.passes.cast_floats import CastFloats, CastFloatsOptions, HalfName

F = nn.functional
ROWS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def typed(function: Callable[[Tensor, Tensor], Any], dtype: HalfName = "fp16", *, strict: bool = False) -> Program:
    program = captured(Model(function), ROWS)
    changes, _ = CastFloats(CastFloatsOptions(dtype=dtype, strict=strict)).run(program)
    assert changes
    return program


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_twin_equals_native_half_arithmetic_when_each_call_rounds_once(dtype: HalfName) -> None:
    """Products of one term, moves, numbers that are exact: there native kernels have no order of their own."""
    program = typed(lambda x, w: ((x[..., :1] @ w[:1]) * 0.25 + 0.125).chunk(2, -1)[1].relu(), dtype)
    assert torch.equal(rounded_twin(program).run(ROWS)[0], program.run(ROWS)[0])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_twin_is_near_native_half_arithmetic_when_sums_have_an_order(dtype: HalfName) -> None:
    attend = lambda x, w: F.scaled_dot_product_attention(x @ w, x, x).softmax(-1) @ w  # noqa: E731
    program = typed(attend, dtype)
    ours, native = rounded_twin(program).run(ROWS)[0], program.run(ROWS)[0]
    # a few units in the last place, 2⁻¹⁰ and 2⁻⁷, of values around 1
    assert 0.0 < (ours - captured(Model(attend), ROWS).run(ROWS)[0]).abs().max() < 10 * torch.finfo(torch.bfloat16).eps
    assert (ours - native).abs().max() <= 8 * torch.finfo(program.tensors[f"weight_{dtype}"].dtype).eps


def test_twin_holds_no_half_value_but_what_it_rounds_when_made() -> None:
    program = typed(lambda x, w: F.gelu(x @ w))
    twin = rounded_twin(program)
    assert (holds_half(program), holds_half(twin)) == (True, False)
    halves = [n for n in twin.calls() if n.meta["val"].dtype is torch.float16]
    assert halves
    assert all(dialect.is_cast(n) for n in halves)
    assert {t.dtype for t in twin.tensors.values()} == {torch.float32}
    assert program.tensors["weight_fp16"].dtype is torch.float16, "the program keeps its own"


def test_overflow_shows_as_no_number_when_a_half_value_is_too_large() -> None:
    product = lambda x, w: x @ w  # noqa: E731
    assert not torch.isfinite(rounded_twin(typed(product)).run(ROWS * 1e7)[0]).any()
    assert torch.isfinite(captured(Model(product), ROWS).run(ROWS * 1e7)[0]).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.layer_norm(x @ w, [8]),
        lambda x, w: F.rms_norm(x @ w, [8]),
        lambda x, w: F.group_norm((x @ w).transpose(1, 2), 2),
        lambda x, w: F.scaled_dot_product_attention(x @ w, x @ w, x),
    ],
)
def test_overflow_inside_shows_as_nan_when_operands_and_result_fit(function: Callable[[Tensor, Tensor], Any]) -> None:
    program = typed(function, strict=True)
    assert torch.isfinite(rounded_twin(program).run(ROWS)[0]).all()
    assert torch.isnan(rounded_twin(program).run(ROWS * 1000)[0]).any()


def test_scalars_are_rounded_when_they_meet_half_values() -> None:
    program = typed(lambda x, w: (x @ w) * 0.1)
    (product,) = rounded_twin(program).calls("aten.mul.Tensor")
    assert product.args[1] == nearest_half(0.1, torch.float16) != 0.1


def test_public_dtypes_stay_when_inputs_and_outputs_are_half() -> None:
    program = captured(Model(lambda x, w: x @ w), ROWS).copy()
    for node in program.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = node.meta["val"].half()
    program.tensors = {name: tensor.half() for name, tensor in program.tensors.items()}
    found = rounded_twin(program).run(ROWS.half())[0]
    assert found.dtype is torch.float16
    # float32 sums of 8 terms, rounded once; a native kernel may be a unit in the last place off
    assert torch.allclose(found.float(), program.run(ROWS.half())[0].float(), atol=4e-3, rtol=2e-3)
