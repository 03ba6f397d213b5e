"""fold-constants: what it computes, what it leaves alone and why, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from tests.strategies import programs
from vlexport.core.artifact import DimRange
from vlexport.core.errors import CapabilityError
from vlexport.ir import dialect
from vlexport.ir.exported import exported_from_program
from vlexport.ir.narrow import narrowed
from vlexport.ir.program import Program
from vlexport.passes import fold_constants
from vlexport.passes.eliminate_dead import EliminateDead
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import make_probes

aten = torch.ops.aten
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """``function(x, table, ids)``: a stored float table of 4 × 4, and stored integers."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], size: int = 4) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(size, 4, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("ids", torch.tensor([2, 0, 1, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.table, self.ids)


def calls(program: Program) -> list[str]:
    return [dialect.plain_name(n) for n in program.calls()]


@pytest.mark.parametrize(
    ("function", "changes", "left"),
    [
        (lambda x, t, i: x + t.exp()[0], 2, ["add"]),
        (lambda x, t, i: x @ (t @ t).tanh(), 2, ["matmul"]),
        (lambda x, t, i: x + t[i].sum(0), 2, ["add"]),
        (lambda x, t, i: x + torch.arange(4), 1, ["add"]),
        (lambda x, t, i: x * torch.full((4,), 0.5), 1, ["mul"]),
        (lambda x, t, i: torch.where(i > 1, x, -x), 1, ["neg", "where"]),
        (lambda x, t, i: x.half().float() + t[0].half().float(), 3, ["to", "to", "add"]),
        (lambda x, t, i: x + torch.stack([t[0], t[1]]).mean(0), 4, ["add"]),
        (lambda x, t, i: nn.functional.linear(x, t.t(), t[0] * 2), 3, ["linear"]),
    ],
)
def test_constants_are_computed_when_an_operator_reads_nothing_else(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], changes: int, left: list[str]
) -> None:
    checked = check_pass(FoldConstants(), Model(function), ROWS, expect_changes=changes)
    assert calls(checked.after) == left
    assert checked.near_misses == ()


def test_multiplications_are_saved_when_a_product_of_constants_is_computed() -> None:
    checked = check_pass(FoldConstants(), Model(lambda x, t, i: x + (t @ t)[0]), ROWS)
    assert [c.saved_macs for c in checked.changes] == [64, 0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t, i: x + x.exp(),
        lambda x, t, i: x + torch.zeros_like(x).exp(),
        lambda x, t, i: x + torch.ones(x.shape[0], 4),
    ],
)
def test_operator_stays_when_it_reads_an_input_or_its_sizes(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    check_pass(FoldConstants(), Model(function), ROWS, expect_changes=0)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.scaled_dot_product_attention.default, ("table", "table", "table", None, 0.5)),
        (aten.bernoulli.p, ("table", 0.5)),
        (aten.rand_like.default, ("table",)),
        (aten.rand.default, ([4],)),
        (aten.new_empty.default, ("table", [4])),
        (aten.empty_like.default, ("table",)),
    ],
)
def test_operator_stays_when_its_value_is_not_always_the_same(target: Any, arguments: tuple[Any, ...]) -> None:
    """Half of these are opaque; that a known one is random must be seen too."""
    program = captured(Model(lambda x, t, i: x + t), torch.randn(4, 4), dynamic=False)
    add = program.results[0]
    add.args = (add.args[0], program.add_call(
        target, tuple(add.args[1] if a == "table" else a for a in arguments), before=add, value_of=add
    ))  # fmt: skip
    assert FoldConstants().run(program.copy()) == ([], [])


def test_attention_is_folded_when_its_drop_rate_is_zero() -> None:
    function = lambda x, t, i: x + nn.functional.scaled_dot_product_attention(t[None], t[None], t[None])[0, 0]  # noqa: E731
    checked = check_pass(FoldConstants(), Model(function), ROWS)
    assert calls(checked.after) == ["add"]


def test_opaque_operator_on_constants_stays_when_nothing_is_known_of_it() -> None:
    program = captured(Model(lambda x, t, i: x + torch.cdist(t[None], t[None] * 2)[0, 0]), ROWS)
    opaque = [n for n in program.calls() if dialect.is_opaque(n)]
    assert opaque
    checked = check_pass(FoldConstants(), program)
    assert [n for n in checked.after.calls() if dialect.is_opaque(n)]


def test_quantization_stays_when_it_reads_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folded dequantize would put the float weight back."""
    monkeypatch.setitem(dialect.OPS, "aten.exp.default", dialect.OpInfo("quant"))
    check_pass(FoldConstants(), Model(lambda x, t, i: x + t[0].exp()), ROWS, expect_changes=1)


def test_unread_call_stays_for_eliminate_dead_when_it_reads_constants() -> None:
    program = captured(Model(lambda x, t, i: x + t[0]), ROWS)
    table = next(n for n in program.graph.nodes if n.op == "get_attr")
    program.add_call(aten.exp.default, (table,), before=program.results[0], value_of=program.results[0])
    checked = check_pass(FoldConstants(), program, expect_changes=1)
    assert calls(checked.after) == ["exp", "add"]
    assert calls(check_pass(EliminateDead(), checked.after, expect_changes=1).after) == ["add"]


def test_pieces_of_a_constant_stay_when_the_call_returns_several() -> None:
    checked = check_pass(FoldConstants(), Model(lambda x, t, i: x + t.unbind(0)[1]), ROWS, expect_changes=0)
    assert calls(checked.after) == ["unbind", "getitem", "add"]


WIDE = 1 << 16
"""Rows of 4 that make a table as large as the growth limit."""


def test_expanded_constant_stays_and_says_why_when_the_model_would_grow() -> None:
    function = lambda x, t, i: (x[:, :1, None] + t[:1].expand(WIDE + 2, 4)).mean(1)  # noqa: E731
    program = captured(Model(lambda x, t, i: function(x, t.exp(), i)), ROWS)
    FoldConstants().run(program)
    assert near_misses(FoldConstants(), program) == [("expand", "the model would grow by 0.3 million elements")]


def test_constant_is_folded_when_the_model_grows_within_the_limit() -> None:
    program = captured(Model(lambda x, t, i: (x[:, :1, None] + t[:1].expand(WIDE - 1, 4)).mean(1)), ROWS)
    FoldConstants().run(program)
    assert not program.calls("aten.expand.default")


def test_transpose_of_a_large_weight_is_folded_only_when_nothing_else_reads_the_weight() -> None:
    both = captured(Model(lambda x, t, i: (x @ t.t()) @ t, size=WIDE + 1), ROWS)
    assert near_misses(FoldConstants(), both) == [("t", "the model would grow by 0.3 million elements")]
    alone = captured(Model(lambda x, t, i: x @ t.t(), size=WIDE + 1), ROWS)
    FoldConstants().run(alone)
    assert calls(alone) == ["matmul"]
    assert list(alone.used_tensors()) == ["table_folded"]


def test_float64_copy_is_folded_in_the_same_places_when_sizes_are_near_the_limit() -> None:
    """The gate applies a pass again in float64, where every element takes twice the bytes."""
    program = captured(Model(lambda x, t, i: (x[:, :1, None] + t[:1].expand(WIDE - 1, 4)).mean(1)), ROWS)
    twin = program.double()
    assert len(FoldConstants().run(program)[0]) == len(FoldConstants().run(twin)[0]) == 2


def test_folded_tensor_shares_no_memory_when_the_operator_is_a_view() -> None:
    program = captured(Model(lambda x, t, i: x + t[0] + t.sum(0)), ROWS)
    table = program.tensors["table"]
    after = check_pass(FoldConstants(), program).after
    for name, tensor in after.tensors.items():
        assert tensor.untyped_storage().data_ptr() != table.untyped_storage().data_ptr(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), "no more is kept alive"
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def test_folded_tensor_is_an_ordinary_one_when_the_stored_one_is_an_inference_tensor() -> None:
    program = captured(Model(lambda x, t, i: x + t[0]), ROWS)
    with torch.inference_mode():
        program.tensors["table"] = program.tensors["table"].clone()
        after, _ = run_pass(FoldConstants(), program, gate=None)
    assert not after.tensors["table_folded"].is_inference()


def test_result_exports_as_a_module_when_the_folded_tensor_stands_beside_its_source() -> None:
    """Modules are nested by the dots in names: nothing may lie below a tensor."""
    program = captured(Model(lambda x, t, i: x @ t + t.exp().exp()[0]), ROWS)
    after = check_pass(FoldConstants(), program).after
    assert sorted(after.used_tensors()) == ["table", "table_folded"]
    assert torch.equal(exported_from_program(after).module()(ROWS)[0], after.run(ROWS)[0])


def test_output_is_a_stored_tensor_when_it_does_not_depend_on_the_input() -> None:
    class Two(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x * 2, self.table.exp()

    checked = check_pass(FoldConstants(), Two(lambda x, t, i: x), ROWS, expect_changes=1)
    assert checked.after.results[1].op == "get_attr"


def test_gate_proves_the_fold_in_float64_when_the_bound_is_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is applied again to a float64 copy; the folded value must not come from float32."""
    monkeypatch.setattr("vlexport.passes.gate.FLOAT32_BOUND", -1.0)
    program = captured(Model(lambda x, t, i: (x @ (t @ t).t().softmax(-1)) / 3.0), ROWS)
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    kept, real = gate.kept, fold_constants._value
    gate.kept = [tuple(v + 1e-7 for v in values) for values in kept]
    _, record = run_pass(FoldConstants(), program, gate=gate)
    assert record.gate.proof == "float64"
    assert fold_constants._value is real


class Positions(nn.Module):
    """Position embeddings of a 4 × 4 grid, resized to the grid of the image, as DINOv2, DeiT and ViT do it."""

    def __init__(self, mode: str, antialias: bool, by_factor: bool) -> None:
        super().__init__()
        self.options = {"mode": mode, "antialias": antialias}
        self.by_factor = by_factor
        self.table = nn.Parameter(torch.randn(1, 1 + 16, 6, generator=torch.Generator().manual_seed(4)))
        self.proj = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        rows, columns = x.shape[2] // 4, x.shape[3] // 4
        grid = self.table[:, 1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
        if self.by_factor:
            grid = nn.functional.interpolate(grid, scale_factor=(rows / 4, columns / 4), **self.options)
        else:
            grid = nn.functional.interpolate(grid, size=(rows, columns), **self.options)
        patches = grid.permute(0, 2, 3, 1).reshape(1, -1, 6)
        return torch.cat([self.table[:, :1].expand(x.shape[0], -1, -1), tokens + patches], 1)


@pytest.mark.parametrize(
    ("mode", "antialias", "by_factor"),
    [
        ("bicubic", False, False),
        ("bicubic", True, False),
        ("bilinear", True, False),
        ("bilinear", False, True),
        ("nearest", False, False),
        ("nearest-exact", False, False),
    ],
)
def test_resized_position_embedding_is_one_tensor_when_the_image_has_a_fixed_size(
    mode: str, antialias: bool, by_factor: bool
) -> None:
    torch.manual_seed(0)
    program = captured(Positions(mode, antialias, by_factor), torch.randn(2, 3, 24, 20))
    checked = check_pass(FoldConstants(), program)
    assert [c for c in calls(checked.after) if "upsample" in c] == []
    (add,) = checked.after.calls("aten.add.Tensor")
    stored = checked.after.tensor_of(add.args[1])
    assert stored is not None
    assert tuple(stored.shape) == (1, 30, 6)


def test_resized_position_embedding_is_one_tensor_only_once_the_sizes_are_narrowed() -> None:
    """The grid is arithmetic on sizes of the input until these are numbers."""
    torch.manual_seed(0)
    dims = {"x": {0: "batch", 2: ("height", 16, 64), 3: ("width", 16, 64)}}
    model = Positions("bicubic", False, False)
    model.proj = nn.Conv2d(3, 6, 4, stride=4)
    program = captured(model, torch.randn(2, 3, 24, 20), dynamic=dims)
    FoldConstants().run(program)
    assert "upsample_bicubic2d" in calls(program), "its size depends on the input"
    fixed = narrowed(program, {"height": DimRange(min=24, max=24, opt=24), "width": DimRange(min=20, max=20, opt=20)})
    checked = check_pass(FoldConstants(), fixed)
    assert "upsample_bicubic2d" not in calls(checked.after)


def test_text_is_golden_when_a_relative_position_bias_is_folded() -> None:
    class Bias(nn.Module):
        """Swin's bias: a table, gathered by stored indices, brought into shape."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 2, generator=torch.Generator().manual_seed(2)))
            rows = torch.arange(4) // 2
            columns = torch.arange(4) % 2
            index = (rows[:, None] - rows[None] + 1) * 3 + columns[:, None] - columns[None] + 1
            self.register_buffer("index", index)

        def forward(self, scores: Tensor) -> Tensor:
            bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
            return (scores + bias.unsqueeze(0)).softmax(-1)

    check_pass(FoldConstants(), Bias(), torch.randn(1, 2, 4, 4), golden="fold_constants")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=4, including=("constant",)))
def test_values_are_equal_and_no_constant_call_is_left_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(FoldConstants(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    read = [n for n in checked.after.calls() if n.users]
    assert all(any(operand.op != "get_attr" for operand in n.all_input_nodes) for n in read)
