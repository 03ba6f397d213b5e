"""raise-norms on modules as people write them: casts, parameters, open axes, and what is no norm at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses, randomize
from vlexport.ir.program import Program
from vlexport.ir.text import text
from vlexport.passes.base import Match
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.idioms import l2_normalized
from vlexport.passes.raise_norms import RaiseNorms


class Llama(nn.Module):
    """RMS norm with casts to single precision and back."""

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.dtype = nn.Parameter(torch.rand(dim) + 0.5), dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight.to(self.dtype) * h.to(self.dtype)).float()


class T5(Llama):
    """The half value itself is multiplied by the root in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        return (self.weight.to(self.dtype) * x.to(self.dtype)).float()


class ByHand(nn.Module):
    """Layer norm with its parts in the order of a textbook."""

    def __init__(self, *shape: int, dim: int = -1) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dim, keepdim=True)
        variance = centred.pow(2).mean(self.dim, keepdim=True)
        return self.gamma * (centred / torch.sqrt(variance + 1e-6)) + self.beta


class Zoo(nn.Module):
    """One norm of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.first = ByHand(6), ByHand(4, 1, 1, dim=1)
        self.rms, self.scale = Llama(6), nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        groups = x.reshape(x.shape[0], 2, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return {
            "layer_norm": self.layer(x),
            "channels_first": self.first(x),
            "rms_norm": self.rms(x),
            "group_norm": groups.reshape(x.shape) * self.scale,
            "normalize": F.normalize(x, dim=1),
            "divided": x / x.norm(dim=-1, keepdim=True),
            "completed": F.layer_norm(x, (5, 6)) * self.scale.new_ones(5, 6) + 2 * self.scale.new_ones(6),
        }


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2


def prepared(module: nn.Module, *shape: int) -> Program:
    program = captured(module, example(*shape))
    Canonicalize().run(program)
    FoldConstants().run(program)
    return program


def test_each_becomes_what_it_is_when_models_write_it_by_hand() -> None:
    checked = check_pass(RaiseNorms(), prepared(Zoo(), 2, 4, 5, 6), golden="raise_norms")
    assert not checked.near_misses
    assert sum(c.what == "L2 normalization raised" for c in checked.changes) == 2
    names = [str(n.target) for n in checked.after.calls() if "norm" in str(n.target)]
    assert sum("layer_norm" in name for name in names) == 3


@pytest.mark.parametrize("written", [Llama, T5])
def test_norm_is_raised_between_its_casts_when_the_model_is_of_a_half_type(written: type[Llama]) -> None:
    torch.manual_seed(0)
    program = prepared(written(8, torch.bfloat16), 2, 3, 8)
    before = program.run(example(2, 3, 8))[0]
    checked = check_pass(RaiseNorms(), program, expect_changes=1)
    norm = checked.after.calls("aten.rms_norm.default")[0]
    assert norm.meta["val"].dtype is torch.float32
    assert norm.args[2] is None, "the scale is multiplied in bfloat16, behind the cast"
    torch.testing.assert_close(checked.after.run(example(2, 3, 8))[0], before, rtol=2**-8, atol=0)


@pytest.mark.parametrize("written", [Llama, T5])
def test_scale_belongs_to_the_norm_when_casts_do_nothing(written: type[Llama]) -> None:
    torch.manual_seed(0)
    checked = check_pass(RaiseNorms(), prepared(written(8), 2, 3, 8), expect_changes=1)
    assert [str(n.target) for n in checked.after.calls()] == ["aten.rms_norm.default"]
    assert checked.after.tensor_of(checked.after.calls()[0].args[2]) is checked.before.tensors["weight"]


def test_half_precision_stays_when_every_step_rounds() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.half()
            return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-3)).float()

    reason = "by hand it rounds to half precision after every step, the operator only once"
    assert near_misses(RaiseNorms(), prepared(Half(), 2, 3, 8)) == [("mul", reason)]


def test_scale_and_shift_stay_when_they_are_computed() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * (1 + self.scale(x)) + self.scale(x)

    program = prepared(randomize(Modulated()), 2, 3, 6)
    assert list(RaiseNorms().find(program)) == []


def test_only_the_shift_is_taken_when_the_operator_has_a_scale() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.more = nn.LayerNorm(6, bias=False), nn.Parameter(torch.arange(1.0, 7.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) - self.more

    checked = check_pass(RaiseNorms(), prepared(randomize(Shifted()), 2, 3, 6), expect_changes=1)
    (norm,) = checked.after.calls()
    assert checked.after.tensor_of(norm.args[2]) is checked.before.tensors["norm.weight"]
    assert checked.changes[0].what == "layer_norm completed"


def test_axes_stay_dynamic_when_tokens_are() -> None:
    axes: Any = {"x": {1: ("tokens", 2, 64)}}
    program = captured(ByHand(6), example(2, 5, 6), dynamic=axes)
    checked = check_pass(RaiseNorms(), program, expect_changes=1)
    assert [str(n.target) for n in checked.after.calls()] == ["aten.layer_norm.default"]
    program = captured(ByHand(5, 1, dim=1), example(2, 5, 6), dynamic={"x": {2: ("width", 2, 64)}})
    checked = check_pass(RaiseNorms(), program, expect_changes=1)
    assert len(checked.after.calls("aten.permute.default")) == 2
    program = captured(ByHand(1), example(2, 5, 6), dynamic={"x": {2: ("width", 2, 64)}})
    assert near_misses(RaiseNorms(), program) == [("div", "the input decides over how many elements it is taken")]


def test_l2_normalization_is_seen_by_its_shared_pattern_when_it_was_raised() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.normalize(x, dim=1, eps=0.5), x * torch.rsqrt(x.square().sum(-1, keepdim=True))

    program = prepared(Both(), 2, 3, 4)
    RaiseNorms().run(program)
    found = [l2_normalized(program, n) for n in program.calls("aten.div.Tensor")]
    assert [(f.dims, f.eps) for f in found if f is not None] == [((1,), 0.5), ((2,), 0.0)]
    assert all(f is not None and f.x is program.placeholders[0] for f in found)


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True),
        lambda x: x / torch.linalg.norm(x, 2, dim=(-2, -1), keepdim=True),  # the largest singular value
        lambda x: x / torch.sqrt(x.abs().mean(-1, keepdim=True) + 1e-5),
        lambda x: x / torch.sqrt(x.exp().pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x: x / torch.sqrt(x.pow(3).mean(-1, keepdim=True) + 9.0),
        lambda x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x: torch.cosine_similarity(x, x + 1, dim=-1),
        lambda x: x * x / (x.norm(dim=-1, keepdim=True) * (x + 1).norm(dim=-1, keepdim=True)),
    ],
)
def test_nothing_is_seen_when_no_value_is_divided_by_its_own_root_mean_square(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert list(RaiseNorms().find(prepared(Calls(function), 2, 3, 4))) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / torch.linalg.norm(x, dim=-1, keepdim=True),
        lambda x: x / torch.linalg.norm(x, 2, -1, keepdim=True),
        lambda x: x / torch.norm(x, p=2, dim=-1).unsqueeze(-1),
        lambda x: x * (1 / x.norm(dim=2, keepdim=True)),
    ],
)
def test_text_is_the_same_when_l2_normalizations_are_spelled_otherwise(function: Callable[[Tensor], Tensor]) -> None:
    program = prepared(Calls(function), 2, 3, 4)
    RaiseNorms().run(program)
    lines = text(program).splitlines()[1:-1]
    assert lines == [
        "  %0 = linalg_vector_norm(x, dim=[2], keepdim=True) -> f32[batch,3,1]",
        "  %1 = div.Tensor(x, %0) -> f32[batch,3,4]",
    ]


def test_nothing_matches_when_a_norm_divides_its_own_mean() -> None:
    """Global response normalization divides one norm by the mean of it: no value is divided by its own norm."""

    class Response(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            norm = x.norm(p=2, dim=(1, 2), keepdim=True)
            return x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))

    assert not [f for f in RaiseNorms().find(prepared(Response(), 2, 3, 4, 5)) if isinstance(f, Match)]
