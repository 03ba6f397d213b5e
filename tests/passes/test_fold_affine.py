"""fold-affine: where a scale and a shift go into a linear, where they stay and why, and that values stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses, randomize
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir import provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.fold_affine import FoldAffine, FoldAffineOptions
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.pipeline import run_pipeline

C = 8
TOKENS = 6


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape or (2, TOKENS, C), generator=torch.Generator().manual_seed(1))


def ready(module: nn.Module, *shape: int) -> Program:
    """Captured with the scales and shifts of a trained model, in canonical form, constants folded."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in randomize(module).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    program = captured(module, tokens(*shape))
    return run_pipeline(program, [Canonicalize(), FoldConstants()], gate=None)[0]


class Net(nn.Module):
    """A norm, two linears, a scale; what ``forward`` does with them is the case."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], *, bias: bool = True, rms: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.RMSNorm(C) if rms else nn.LayerNorm(C)
        self.a, self.b = nn.Linear(C, C, bias=bias), nn.Linear(C, 4, bias=bias)
        self.conv = nn.Conv1d(TOKENS, 5, 1)
        self.point = nn.Conv1d(C, 4, 1, bias=bias)
        self.long, self.grouped = nn.Conv1d(C, 4, 3, padding=1), nn.Conv1d(C, 4, 2, groups=2)
        self.qkv = nn.Linear(C, 3 * C)
        self.gamma = nn.Parameter(torch.randn(C))
        self.temperature = nn.Parameter(torch.randn(2, 1, 1))
        self.case = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def heads(net: Net, x: Tensor) -> Tensor:
    return net.qkv(x).reshape(-1, TOKENS, 3, 2, C // 2).permute(2, 0, 3, 1, 4)


def window(x: Tensor) -> Tensor:
    return torch.roll(x, 1, 1).reshape(-1, 2, TOKENS // 2, C).permute(0, 2, 1, 3).reshape(-1, TOKENS // 2, C)


def first(x: Tensor) -> Tensor:
    """Channels first, as convolutions have them."""
    return x.permute(0, 2, 1)


def attend(net: Net, x: Tensor, scale: float | None) -> Tensor:
    q, k, v = heads(net, x).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


NORMS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, bool]]] = {
    "one linear": (lambda n, x: n.a(n.norm(x)), {}),
    "every one of two linears": (lambda n, x: n.a(n.norm(x))[..., :4] * n.b(n.norm(x)), {}),
    "two linears of one norm": (lambda n, x: torch.cat([n.a(y := n.norm(x)), n.b(y)], -1), {}),
    "an rms norm and linears without bias": (lambda n, x: n.a(n.norm(x)), {"rms": True, "bias": False}),
    "a matmul": (lambda n, x: n.norm(x) @ n.a.weight, {"rms": True}),
    "an addmm": (lambda n, x: torch.addmm(n.a.bias, n.norm(x.reshape(-1, C)), n.a.weight), {}),
    "the class token": (lambda n, x: n.b(n.norm(x)[:, 0]), {}),
    "the mean over tokens": (lambda n, x: n.b(n.norm(x).mean(1)), {}),
    "shifted windows": (lambda n, x: n.a(window(n.norm(x))), {}),
    "a convolution": (lambda n, x: n.point(first(n.norm(x))), {}),
    "a convolution without bias": (lambda n, x: n.point(first(n.norm(x))), {"bias": False}),
    "a convolution that pads, without a shift": (lambda n, x: n.long(first(n.norm(x))), {"rms": True}),
    "a grouped convolution": (lambda n, x: n.grouped(first(n.norm(x))), {}),
    "a convolution and a linear": (lambda n, x: first(n.point(first(y := n.norm(x)))) * n.b(y), {}),
    "several views": (lambda n, x: torch.cat([n.a(y := n.norm(x))[:, 0], n.b(y[:, 1:]).mean(1)], -1), {}),
}


@pytest.mark.parametrize("case", NORMS)
def test_norm_loses_scale_and_shift_when_it_is_read_by(case: str) -> None:
    forward, options = NORMS[case]
    checked = check_pass(FoldAffine(), ready(Net(forward, **options)))
    assert checked.changes
    assert not checked.near_misses
    for norm in checked.after.calls("aten.layer_norm.default", "aten.rms_norm.default"):
        assert not [operand for operand in norm.all_input_nodes if checked.after.tensor_of(operand) is not None]
    assert cost(checked.after).parameters < cost(checked.before).parameters


SCALES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a layer-scale before a residual": lambda n, x: x + n.a(x) * n.gamma,
    "a factor on the left": lambda n, x: n.gamma * n.a(x),
    "a number": lambda n, x: n.a(x) * 0.3,
    "a divisor": lambda n, x: n.a(x) / n.gamma,
    "a layer-scale behind a permute": lambda n, x: n.a(x).permute(0, 2, 1) * n.gamma.reshape(C, 1),
    "a matmul": lambda n, x: (x @ n.a.weight) * n.gamma,
    "a convolution": lambda n, x: n.conv(x) * n.gamma[:5].reshape(5, 1),
    "a temperature on the queries": lambda n, x: heads(n, x)[0] * n.temperature,
    "one part of three": lambda n, x: torch.cat([(p := n.qkv(x).chunk(3, -1))[0] * 0.5, p[1], p[2]], 1),
    "two parts of three": lambda n, x: torch.cat(
        [(p := heads(n, x).unbind(0))[0] * n.temperature, p[1] * 0.5, p[2]], 1
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_factor_goes_into_the_projection_when_it_is(case: str) -> None:
    checked = check_pass(FoldAffine(), ready(Net(SCALES[case])))
    assert checked.changes
    assert not checked.after.calls("aten.mul.Tensor", "aten.div.Tensor")
    assert all(change.what == f"scale folded into {change.what.rpartition(' ')[2]}" for change in checked.changes)


def test_scale_of_attention_goes_into_the_queries_when_it_is_not_the_usual_one() -> None:
    checked = check_pass(FoldAffine(), ready(Net(lambda n, x: attend(n, x, 0.7))), expect_changes=1)
    (attention,) = checked.after.calls("aten.scaled_dot_product_attention.default")
    assert "scale" not in attention.kwargs
    assert checked.changes[0].what == "scale of attention folded into linear"
    before, after = (p.tensors[n] for p, n in ((checked.before, "qkv.weight"), (checked.after, "qkv_folded.weight")))
    assert torch.equal(before[C:], after[C:]), "keys and values stay"


@pytest.mark.parametrize("scale", [None, 1.0, (C // 2) ** -0.5])
def test_scale_of_attention_stays_when_no_target_pays_for_it(scale: float | None) -> None:
    check_pass(FoldAffine(), ready(Net(lambda n, x: attend(n, x, scale))), expect_changes=0)


COMPUTED = "the linear's weight is computed, not stored"
STAYS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, bool], list[tuple[str, str]]]] = {
    "something else reads the norm": (
        lambda n, x: n.a(y := n.norm(x)) + y, {}, [("add", "the layer_norm's output is read by add")],
    ),
    "the norm is an output": (lambda n, x: n.norm(x), {}, [("layer_norm", "the layer_norm's value is an output")]),
    "a view of the norm is an output": (
        lambda n, x: n.norm(x)[:, 0], {}, [("select", "the select's value is an output")],
    ),
    "a ReLU lies between": (
        lambda n, x: n.a(n.norm(x).relu()), {}, [("relu", "the layer_norm's output is read by relu")],
    ),
    "the channels are mixed by a view": (
        lambda n, x: n.norm(x).reshape(-1, TOKENS, 2, C // 2) @ n.a.weight[:4, :4].clone(), {},
        [("reshape", "the layer_norm's output is read by reshape")],
    ),
    "the mean is over channels": (
        lambda n, x: n.norm(x).mean(-1), {}, [("mean", "the layer_norm's output is read by mean")],
    ),
    "a linear has no bias": (
        lambda n, x: n.a(n.norm(x)), {"bias": False}, [("linear", "the linear has no bias to take the norm's shift")],
    ),
    "a weight is computed": (
        lambda n, x: F.linear(n.norm(x), n.a.weight * x.mean(), n.a.bias), {}, [("linear", COMPUTED)],
    ),
    "a bias is computed": (
        lambda n, x: F.linear(n.norm(x), n.a.weight, n.a.bias * x.mean()), {},
        [("linear", "the linear's bias is computed, not stored")],
    ),
    "a weight is tied": (
        lambda n, x: n.a(n.a(n.norm(x)).relu()), {}, [("linear", "the linear's weight is used by 1 other(s)")],
    ),
    "the scale is computed": (
        lambda n, x: n.a(F.layer_norm(x, (C,), n.gamma * x.mean())), {},
        [("layer_norm", "the norm's scale or shift is computed, not stored")],
    ),
    "the norm is the other operand": (
        lambda n, x: F.linear(n.gamma, n.norm(x[0])), {},
        [("linear", COMPUTED)],
    ),
    "a convolution reads the norm": (
        lambda n, x: n.conv(n.norm(x)), {},
        [("conv1d", "the conv1d's channels lie on another axis than the norm's")],
    ),
    "a convolution that pads reads the norm": (
        lambda n, x: n.long(first(n.norm(x))), {},
        [("conv1d", "the convolution pads with zeros, where the norm's shift is not zero")],
    ),
    "a linear reads the norm across its channels": (
        lambda n, x: first(n.norm(x)) @ n.a.weight[:TOKENS], {},
        [("matmul", "the matmul's channels lie on another axis than the norm's")],
    ),
    "the unscaled value is used": (
        lambda n, x: n.a(x) * n.gamma + n.a(x).relu(), {}, [("mul", "the linear's weight is used by 1 other(s)")],
    ),
    "the queries are the keys": (
        lambda n, x: (lambda q: F.scaled_dot_product_attention(q, q, x, scale=0.7))(n.a(x)), {},
        [("scaled_dot_product_attention", "the scaled_dot_product_attention reads the linear's output twice")],
    ),
    "the unscaled channels are read": (
        lambda n, x: (y := n.a(x)) * n.gamma + y.relu(), {}, [("mul", "the linear's output is used by 1 other(s)")],
    ),
    "a part of the tokens is scaled": (
        lambda n, x: torch.cat([(y := n.a(x))[:, :1] * n.gamma, y[:, 1:]], 1), {},
        [("mul", "the linear's output is used by 1 other(s)")],
    ),
    "tokens are scaled": (
        lambda n, x: n.a(x) * n.conv.weight.reshape(5, TOKENS, 1)[0].detach().clone(), {},
        [("mul", "the factor is not one number for each output channel")],
    ),
    "the scaled weight is computed": (
        lambda n, x: F.linear(x, n.a.weight * x.mean(), n.a.bias) * n.gamma, {}, [("mul", COMPUTED)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_scale_stays_and_says_why_when(case: str) -> None:
    forward, options, reasons = STAYS[case]
    program = ready(Net(forward, **options))
    assert near_misses(FoldAffine(), program) == reasons
    checked = check_pass(FoldAffine(), program, expect_changes=0)
    assert [r.reason for r in checked.record.near_misses] == [reason for _, reason in reasons]


def test_scale_stays_when_the_weight_would_leave_half_precision() -> None:
    net = Net(lambda n, x: n.a(n.norm(x)))
    with torch.no_grad():
        net.norm.weight[3] = 1e6
    found = near_misses(FoldAffine(), captured(net, tokens()))
    assert found == [("linear", "the folded weight would leave the range of half precision")]


def test_scale_stays_when_the_weight_is_half() -> None:
    program = ready(Net(lambda n, x: n.a(x) * 0.3))
    program.tensors = {name: tensor.bfloat16() for name, tensor in program.tensors.items()}
    reason = "the linear's weight is stored in half precision: it would be rounded once more"
    assert near_misses(FoldAffine(), program) == [("mul", reason)]


def test_only_what_is_asked_for_is_folded_when_options_say_so() -> None:
    program = ready(Net(lambda n, x: n.a(n.norm(x)) * n.gamma))
    for options, left in (({"norms": False}, "layer_norm"), ({"scales": False}, "mul")):
        checked = check_pass(FoldAffine(FoldAffineOptions(**options)), program, expect_changes=1)
        assert left == ("mul" if checked.after.calls("aten.mul.Tensor") else "layer_norm")


def test_parameters_go_when_a_norm_scales_by_one_and_shifts_by_zero() -> None:
    checked = check_pass(FoldAffine(), captured(nn.LayerNorm(C), tokens()), expect_changes=1)
    assert checked.changes[0].saved_parameters == 2 * C


def test_weights_are_the_nearest_float32_when_folded() -> None:
    net = Net(lambda n, x: n.a(n.norm(x)) * n.gamma)
    program = ready(net)
    after = check_pass(FoldAffine(), program, expect_changes=2).after
    (linear,) = after.calls("aten.linear.default")
    weight = after.tensor_of(linear.args[1])
    assert weight is not None
    once = (net.a.weight.double() * net.norm.weight.double()).float().double()
    assert torch.equal(weight, (once * net.gamma.double()[:, None]).float())


def test_text_is_golden_when_a_block_is_folded() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.gamma1, self.gamma2 = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))
            self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = heads(self, self.norm1(x)).unbind(0)  # type: ignore[arg-type]
            y = F.scaled_dot_product_attention(q, k, v, scale=0.7).permute(0, 2, 1, 3).reshape(-1, TOKENS, C)
            x = x + self.gamma1 * self.proj(y)
            return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))

    checked = check_pass(FoldAffine(), ready(Block()), golden="fold_affine", expect_changes=5)
    assert len(checked.before.calls()) - len(checked.after.calls()) == 2
    for node in checked.after.calls("aten.linear.default"):
        assert provenance.module_path(node) in ("qkv", "proj", "fc1", "fc2")


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(
    programs(
        most=2,
        including=("layer_norm, linears", "linear, scale", "linear", "mul", "permute", "split"),
    )
)  # fmt: skip
def test_values_are_equal_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(FoldAffine(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert cost(checked.after).parameters <= cost(checked.before).parameters
    assert cost(checked.after).macs == cost(checked.before).macs


def test_scale_stays_when_it_makes_the_value_double() -> None:
    class Promoted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * torch.linspace(1.0, 2.0, 4, dtype=torch.float64)

    program = captured(Promoted(), torch.randn(2, 8))
    FoldConstants().run(program)
    checked = check_pass(FoldAffine(), program, expect_changes=0)
    assert checked.after.run(torch.randn(2, 8))[0].dtype is torch.float64
