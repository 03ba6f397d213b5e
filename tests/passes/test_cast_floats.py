"""cast-floats: what is typed, what stays and why, that it stays right, and that a careless variant is caught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from pydantic import ValidationError
from torch import Tensor, nn

from tests.harness import captured, check_pass
from tests.passes.broken import Rewriting
from tests.strategies import programs
from vlexport.core.errors import CapabilityError, GateError, UsageError
from vlexport.core.numerics import sqnr_db
from vlexport.ir import dialect, provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.ir.rounded import HALF_DTYPES, rounded_twin
from vlexport.ir.text import fingerprint, text
from vlexport.passes.base import Match, NearMiss
from vlexport.passes.cast_floats import DTYPES, CastFloats, CastFloatsOptions, HalfName
from vlexport.passes.gate import NumericGate
from vlexport.passes.half.choice import candidates
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import make_probes

aten = torch.ops.aten
F = nn.functional
TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """``function(first(x), second, norm)`` around two linears and a norm."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.first(x), self)


def attention(query: Tensor, key: Tensor, value: Tensor, *, manual: bool) -> Tensor:
    if manual:
        return torch.softmax(query @ key.transpose(1, 2) * 0.25, -1) @ value
    return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None]).squeeze(1)


def sharp(scale: float, *, manual: bool) -> Callable[..., Tensor]:
    """An attention whose logits reach ``scale``² and more."""
    return lambda h, m: m.second(attention(h * scale, m.norm(h) * scale, h, manual=manual))


def options(**given: Any) -> CastFloatsOptions:
    return CastFloatsOptions(**given)


def reasons(program: Program, **given: Any) -> dict[str, str]:
    """Operator → why it stays."""
    found = CastFloats(options(**given)).find(program)
    return {dialect.plain_name(each.node): each.reason for each in found if isinstance(each, NearMiss)}


def gated(pass_: CastFloats, program: Program) -> Program:
    gate = NumericGate(program, make_probes(program, calibration=None, seed=0))
    return run_pass(pass_, program, gate=gate)[0]


def half_calls(program: Program) -> list[str]:
    return [
        dialect.plain_name(n)
        for n in program.calls()
        if not dialect.is_cast(n)
        and any(getattr(v, "dtype", None) in HALF_DTYPES for v in torch.utils._pytree.tree_leaves(n.meta["val"]))
    ]


# -- what is typed -----------------------------------------------------------------------------------------------------


def test_text_is_golden_when_norm_and_attention_stand_between_linears() -> None:
    body = lambda h, m: m.second(torch.cat(attention(*[m.norm(F.gelu(h))] * 3, manual=False).chunk(2, -1)[::-1], -1))  # noqa: E731
    check_pass(CastFloats(), Model(body), TOKENS, golden="cast_floats")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_and_activations_are_half_and_the_face_is_not_when_typed(dtype: HalfName) -> None:
    checked = check_pass(CastFloats(options(dtype=dtype)), Model(lambda h, m: m.second(m.norm(F.gelu(h)))), TOKENS)
    half = DTYPES[dtype]
    assert half_calls(checked.after) == ["linear", "gelu", "linear"]
    assert {name: t.dtype for name, t in checked.after.tensors.items()} == {
        f"first.weight_{dtype}": half, f"first.bias_{dtype}": half, "norm.weight": torch.float32,
        "norm.bias": torch.float32, f"second.weight_{dtype}": half, f"second.bias_{dtype}": half,
    }  # fmt: skip
    assert [n.meta["val"].dtype for n in (*checked.after.placeholders, *checked.after.results)] == [torch.float32] * 2
    assert cost(checked.after).size_bytes == cost(checked.before).size_bytes - 2 * 2 * (16 * 16 + 16)
    assert checked.record.effect == "approximate"
    assert (checked.record.gate.statistic, checked.record.gate.bound) == (
        "sqnr_db",
        {"fp16": 40.0, "bf16": 25.0}[dtype],
    )
    assert checked.record.gate.value is not None
    assert checked.record.gate.value > {"fp16": 55, "bf16": 38}[dtype]


def test_a_value_is_cast_once_when_several_calls_read_it() -> None:
    body = lambda h, m: m.second(h) + F.softmax(h, -1) + m.first(h) + m.norm(h)  # noqa: E731
    after = check_pass(CastFloats(), Model(body), TOKENS).after
    casts = Counter((n.args[0], n.meta["val"].dtype) for n in after.calls() if dialect.is_cast(n))
    assert set(casts.values()) == {1}
    assert len(casts) == 5, "the input, h for softmax and norm, their two results, and the output"


def test_a_shared_weight_is_stored_once_when_two_calls_read_it() -> None:
    checked = check_pass(CastFloats(), Model(lambda h, m: m.first(h)), TOKENS)
    assert sorted(checked.after.tensors) == ["first.bias_fp16", "first.weight_fp16"]


def test_provenance_is_that_of_the_call_when_it_is_typed() -> None:
    checked = check_pass(CastFloats(), Model(lambda h, m: m.second(h)), TOKENS)
    (first, second) = checked.after.calls("aten.linear.default")
    assert [provenance.module_path(n) for n in (first, second)] == ["first", "second"]
    assert [provenance.origins(n) for n in checked.before.calls()] == [
        provenance.origins(first),
        provenance.origins(second),
    ]
    assert [change.where for change in checked.changes] == [("first",), ("second",)]


def test_nothing_is_typed_when_no_call_multiplies() -> None:
    """A cast to and fro around moves and elementwise calls would gain nothing."""
    program = captured(nn.Sequential(nn.ReLU(), nn.Flatten()), TOKENS)
    check_pass(CastFloats(), program, expect_changes=0)
    assert set(reasons(program).values()) == {"only calls in float32 stand around it"}


def test_artifact_is_half_when_lowered_to_onnx() -> None:
    """Initializers and the inputs of products, counted."""
    from vlexport.targets.onnx.lower import onnx_from_program

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 16, 2), Model(lambda h, m: m.second(attention(h, h, h, manual=True)))

        def forward(self, x: Tensor) -> Tensor:
            features: Tensor = self.stem(x).flatten(2).transpose(1, 2)
            return self.body(features)

    after = gated(CastFloats(), captured(Net(), torch.randn(2, 3, 4, 4)))
    model = onnx_from_program(after, opset=20)
    half, weights = onnx_ir.DataType.FLOAT16, [v.dtype for v in model.graph.initializers.values() if v.shape.rank() > 1]
    assert weights == [half] * 3
    products = [n for n in model.graph if n.op_type in ("MatMul", "Conv")]
    assert Counter(n.op_type for n in products) == {"MatMul": 4, "Conv": 1}
    assert {v.dtype for n in products for v in n.inputs} == {half}
    assert [v.dtype for n in model.graph if n.op_type == "Softmax" for v in n.inputs] == [onnx_ir.DataType.FLOAT]
    assert {v.dtype for v in (*model.graph.inputs, *model.graph.outputs)} == {onnx_ir.DataType.FLOAT}


# -- what stays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "operator", "reason"),
    [
        (lambda h, m: m.norm(h), "layer_norm", "a norm sums squares"),
        (lambda h, m: h.softmax(-1), "softmax", "it sums exponentials"),
        (lambda h, m: h.flatten(1).mean(1), "mean", "it sums 96 terms"),
        (lambda h, m: h.cumsum(1), "cumsum", "it adds up, or multiplies, without bound"),
        (lambda h, m: h.topk(2).values, "topk", "rounding makes scores equal"),
        (lambda h, m: h.max(-1).values, "max", "rounding makes scores equal"),
        (lambda h, m: h.floor(), "floor", "it counts or addresses"),
        (lambda h, m: h.softmax(-1, dtype=torch.float32), "softmax", "its type is written in the model"),
        (lambda h, m: h * 4e4, "mul", "its result reaches"),
        (lambda h, m: h + 1e5, "add", "its result reaches"),
        (lambda h, m: h * 1e-7, "mul", "its result keeps"),
        (lambda h, m: h.square().clamp_min(1e-12), "clamp_min", "the number 1e-12 becomes 0"),
        (lambda h, m: h.masked_fill(h > 0, -1e9), "masked_fill", "its result reaches 1e+09"),
        (lambda h, m: (h + 300.0) - (h.detach() * 0.99 + 300.0), "sub", "its result keeps"),
        (sharp(300.0, manual=False), "scaled_dot_product_attention", "q·k may reach"),
        (sharp(300.0, manual=True), "matmul", "its result reaches"),
        (sharp(40.0, manual=False), "scaled_dot_product_attention", "its logits may reach"),
    ],
)  # fmt: skip
def test_a_call_stays_with_its_reason_when_half_cannot_hold_it(
    body: Callable[..., Tensor], operator: str, reason: str
) -> None:
    program = captured(Model(body), TOKENS)
    assert reasons(program)[operator].startswith(reason)
    assert operator not in half_calls(ungated(program)) or operator == "matmul"


def ungated(program: Program) -> Program:
    after = program.copy()
    CastFloats().run(after)
    return after


@pytest.mark.parametrize(
    "body",
    [
        lambda h, m: h.mean(-1),
        lambda h, m: h * 1e-2,
        lambda h, m: h + 1e3,
        lambda h, m: h.clamp_min(1e-3),
        lambda h, m: F.gelu(h),
        lambda h, m: h.sigmoid(),
        lambda h, m: h.exp(),
        lambda h, m: h.amax(-1),
        lambda h, m: h - h.mean(-1, keepdim=True),
        lambda h, m: h.masked_fill(h > 0, -1e4),
        lambda h, m: attention(h, h, h, manual=False),
        lambda h, m: torch.stack(h.chunk(2, -1)),
        lambda h, m: torch.einsum("bnc,bmc->bnm", h, h),
    ],
)
def test_everything_is_typed_when_half_can_hold_it(body: Callable[..., Tensor]) -> None:
    checked = check_pass(CastFloats(), Model(body), TOKENS)
    assert checked.near_misses == ()


@pytest.mark.parametrize(("note", "typed"), [("smoothed", 3), ("frozen", 3), ("fp32: it sums squares", 0)])
def test_call_is_decided_about_once_whatever_other_passes_noted_on_it(note: str, typed: int) -> None:
    program = captured(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval(), torch.randn(2, 8))
    for node in program.calls():
        provenance.remember(node, note)
    assert len(CastFloats().run(program)[0]) == typed


def test_a_weight_is_named_when_half_cannot_hold_it() -> None:
    model = Model(lambda h, m: m.second(h))
    with torch.no_grad():
        model.first.weight[0, 0], model.second.weight.data = 1e5, model.second.weight * 1e-8
    found = CastFloats().find(captured(model, TOKENS * 0.1))
    said = {provenance.module_path(each.node): each.reason for each in found if isinstance(each, NearMiss)}
    assert said["first"].startswith("first.weight reaches 1e+05")
    assert said["second"].startswith("second.weight keeps")


def test_a_tiny_bias_is_typed_when_what_it_is_added_to_is_not() -> None:
    model = Model(lambda h, m: h)
    with torch.no_grad():
        model.first.bias.mul_(1e-8)
    assert reasons(captured(model, TOKENS)) == {}


def test_whole_numbers_stay_when_half_skips_some() -> None:
    class Grid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ torch.ones(16, 1)).round() * 2 + torch.arange(5000, 5006).reshape(6, 1).float()

    said = reasons(captured(Grid(), TOKENS))
    assert said["add"].startswith("its result holds whole numbers up to") or said["add"].startswith("a value holds")


def test_the_sum_in_front_of_a_norm_stays_when_the_norm_hangs_on_its_digits() -> None:
    program = captured(Model(lambda h, m: m.second(m.norm(h + 2e4))), TOKENS)
    assert reasons(program)["add"].endswith("hangs on its last digits")
    gated(CastFloats(), program)


@pytest.mark.parametrize("keep", [("second",), ("sec*",), ("second", "norm")])
def test_a_module_stays_when_the_user_keeps_it(keep: tuple[str, ...]) -> None:
    program = captured(Model(lambda h, m: m.second(m.norm(h))), TOKENS)
    after = check_pass(CastFloats(options(keep=keep)), program).after
    assert half_calls(after) == ["linear"]
    assert [n.meta["val"].dtype for n in after.calls("aten.linear.default")] == [torch.float16, torch.float32]


def test_keep_is_refused_with_the_nearest_module_when_it_names_none() -> None:
    with pytest.raises(UsageError, match="did you mean 'second'") as caught:
        gated(CastFloats(options(keep="first, secnd")), captured(Model(lambda h, m: m.second(h)), TOKENS))
    assert caught.value.code == "VLX0703"


def test_margin_decides_when_a_value_is_near_the_limit() -> None:
    program = captured(Model(lambda h, m: m.second(h * 20000.0)), TOKENS)
    largest = float((captured(Model(lambda h, m: h * 20000.0), TOKENS).run(TOKENS)[0]).abs().max())
    assert 65504 / 3 < largest < 65504 / 1.2
    assert "mul" not in reasons(program, margin=1.2)
    assert "mul" in reasons(program, margin=3.0)


def test_ranges_come_from_the_samples_when_they_are_given() -> None:
    program = captured(Model(lambda h, m: m.second(h)), TOKENS)
    samples = [(TOKENS,), (TOKENS * 1e5,)]
    found = [each for each in CastFloats(samples=samples).find(program) if isinstance(each, NearMiss)]
    assert {dialect.plain_name(each.node) for each in found} == {"linear"}


@pytest.mark.parametrize(
    "given", [{"dtype": "fp8"}, {"margin": 0.5}, {"strict": True, "keep": "a"}, {"min_sqnr_db": -1}, {"kep": "a"}]
)
def test_options_are_refused_when_they_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        options(**given)


def test_bfloat16_types_large_values_when_float16_does_not() -> None:
    program = captured(Model(lambda h, m: m.second(h * 1e6)), TOKENS)
    assert "mul" in reasons(program)
    assert reasons(program, dtype="bf16") == {}


# -- that it stays right -----------------------------------------------------------------------------------------------

LARGE = {
    "activations of 1e4 before a norm": lambda h, m: m.second(m.norm(h * 1e4)),
    "the same upon an offset": lambda h, m: m.second(m.norm(h + 1e4)),
    "logits of 1e5, spelled out": sharp(300.0, manual=True),
    "logits of 1e5, in one call": sharp(300.0, manual=False),
}


@pytest.mark.parametrize("name", LARGE)
def test_outputs_stay_right_when_values_are_large(name: str) -> None:
    program = captured(Model(LARGE[name]), TOKENS)
    after = gated(CastFloats(), program)
    assert "linear" in half_calls(after)
    found, wanted = (each.run(TOKENS)[0].numpy() for each in (rounded_twin(after), program))
    assert sqnr_db(found, wanted) > 40.0


class Forgetful(CastFloats):
    """The pass without its keep list."""

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in candidates(ir):
            yield Match(node, (node,))


@pytest.mark.parametrize(
    ("name", "culprit"), list(zip(LARGE, ("layer_norm", "layer_norm", "matmul", "scaled_dot_product"), strict=True))
)
def test_gate_names_the_place_when_the_keep_list_is_forgotten(name: str, culprit: str) -> None:
    with pytest.raises(GateError, match="cast-floats costs more than it may: sqnr_db") as caught:
        gated(Forgetful(), captured(Model(LARGE[name]), TOKENS))
    assert caught.value.code == "VLX0401"
    assert culprit in caught.value.where
    assert "keep" in caught.value.hint


@pytest.mark.parametrize(
    ("body", "tensor"),
    [
        (lambda h, m: m.second(h * 1e5), "its result reaches"),
        (lambda h, m: F.linear(h, m.second.weight * 0 + 1e5), "reaches 1e+05"),
        (sharp(300.0, manual=False), "q·k may reach"),
    ],
)
def test_strict_fails_naming_the_tensor_when_something_cannot_be_half(body: Callable[..., Tensor], tensor: str) -> None:
    with pytest.raises(GateError) as caught:
        gated(CastFloats(options(strict=True)), captured(Model(body), TOKENS))
    assert (caught.value.code, caught.value.exit_code) == ("VLX0409", 3)
    assert tensor in caught.value.message
    assert caught.value.where


def test_strict_leaves_no_float32_call_when_everything_fits() -> None:
    body = lambda h, m: torch.where(h > 0, m.second(m.norm(h)), h.softmax(-1))  # noqa: E731
    after = check_pass(CastFloats(options(strict=True)), Model(body), TOKENS).after
    singles = [n for n in after.calls() if n.meta["val"].dtype is torch.float32]
    assert [n for n in singles if n not in after.results] == []
    assert len(after.calls("aten._to_copy.default")) == 2


def test_bound_is_the_users_when_it_is_given() -> None:
    with pytest.raises(GateError, match="100 is promised"):
        gated(CastFloats(options(min_sqnr_db=100)), captured(Model(lambda h, m: m.second(h)), TOKENS))


def regrouped(ir: Program, node: Any) -> Any:
    """``(a + b) − c`` as ``a + (b − c)``: equal in exact arithmetic, not after rounding."""
    (a, b), c = node.args[0].args, node.args[1]
    inner = ir.add_call(aten.sub.Tensor, (b, c), before=node, value_of=node.args[0])
    return ir.add_call(aten.add.Tensor, (a, inner), before=node, value_of=node)


def scaled(ir: Program, node: Any) -> Any:
    return ir.add_call(aten.mul.Tensor, (node.args[0], node.args[1] * 1.01), before=node, value_of=node)


def test_an_exact_pass_is_proven_or_caught_when_it_runs_on_half_values() -> None:
    body = lambda h, m: m.second(h + m.first(h) - F.gelu(h)) * 3.0  # noqa: E731
    after = gated(CastFloats(), captured(Model(body), TOKENS))
    gate = NumericGate(after, make_probes(after, calibration=None, seed=0))
    regroup = Rewriting("aten.sub.Tensor", regrouped, name="regroup")
    assert run_pass(regroup, after, gate=gate)[1].gate.proof == "float64"
    with pytest.raises(GateError, match="changed what the model computes") as caught:
        run_pass(Rewriting("aten.mul.Tensor", scaled, name="scale"), after, gate=gate)
    assert caught.value.where.startswith("aten.mul")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=4, including=("linear", "layer_norm", "matmul")))
def test_program_stays_right_and_casts_are_few_when_it_is_random(program: Program) -> None:
    """The bound is low: the sums of so small nets have few terms, which may cancel."""
    probes = make_probes(program, calibration=None, seed=0)
    typing = CastFloats(options(min_sqnr_db=25), samples=[probe.values for probe in probes])
    try:
        after, _ = run_pass(typing, program, gate=NumericGate(program, probes))
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    casts = [n for n in after.calls() if dialect.is_cast(n) and n.meta["val"].dtype is not n.args[0].meta["val"].dtype]
    assert not [n for n in casts if dialect.is_cast(n.args[0]) and n.args[0] in casts], text(after)
    assert len({(n.args[0], n.meta["val"].dtype) for n in casts}) == len(casts), text(after)
    again = after.copy()
    assert typing.run(again)[0] == []
    assert fingerprint(again) == fingerprint(after)


def test_cast_of_the_model_is_not_read_by_a_call_before_it() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + x.to(torch.float16).to(torch.float32)

    check_pass(CastFloats(), Cast(), torch.randn(2, 16))
