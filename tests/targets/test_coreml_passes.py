"""Legalization for Core ML: every rewrite is exact, and what remains is taken by coremltools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from vlexport.ir import dialect
from vlexport.targets.base import Brief
from vlexport.targets.coreml import CoreMLOptions, CoreMLTarget
from vlexport.targets.coreml.legalize_resize import LegalizeResize
from vlexport.targets.coreml.legalize_spelling import LegalizeSpelling
from vlexport.targets.coreml.mil import read_package

ROWS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
PICTURES = torch.rand(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def several(x: Tensor) -> tuple[Tensor, ...]:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    population, _ = torch.var_mean(x, (1, 2), correction=0)
    return variance, mean, population, torch.var_mean(x, -1)[1], *torch.std_mean(x, 1), *torch.std_mean(x)


def attentions(x: Tensor) -> tuple[Tensor, ...]:
    seen = (x[:, 0] > -9)[:, :6].unsqueeze(1)  # (2, 1, 6): every row sees something
    return (
        F.scaled_dot_product_attention(x, x + 1, x - 1, scale=8**-0.5),
        F.scaled_dot_product_attention(x, x + 1, x - 1, scale=0.7),
        F.scaled_dot_product_attention(x, x + 1, x - 1, attn_mask=seen & (x[:, :, :6] < 1).logical_or(x[:, :, :1] > 0)),
        F.scaled_dot_product_attention(x, x[:, :4], x[:, 1:5], is_causal=True, scale=2.0),
    )


RULES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "cast": (lambda x: (x * 3).to(torch.int32), ROWS),
    "where": (lambda x: torch.where(x > 0.5, x, 0.25), ROWS),
    "where_self": (lambda x: torch.where(x > 0.5, -1.0, x), ROWS),
    "where_numbers": (lambda x: torch.where(x > 0.5, 1.0, -1.0), ROWS),
    "and_or_xor": (lambda x: ((x > 0) & (x < 1)) | ((x > 0.5) ^ (x > 0.7)), ROWS),
    "chunk": (lambda x: [part * i for i, part in enumerate(x.chunk(4, 1))], ROWS),
    "max_pool1d": (lambda x: F.max_pool1d(x, 3, 2, padding=1, ceil_mode=True), ROWS),
    "rms_norm": (lambda x: F.rms_norm(x, (8,)) + F.rms_norm(x, (6, 8), torch.full((6, 8), 0.5), eps=1e-3), ROWS),
    "var_mean": (several, ROWS),
    "addcmul": (lambda x: torch.addcmul(x, x, x - 1, value=0.5) + torch.addcmul(x, x, x), ROWS),
    "lerp": (lambda x: torch.lerp(x, x.exp(), 0.3), ROWS),
    "logit": (lambda x: torch.logit(x.sigmoid(), eps=1e-6) + torch.logit(x.sigmoid()), ROWS),
    "trunc_fmod": (lambda x: torch.trunc(x * 9) + torch.fmod(x, 0.3), ROWS),
    "isinf": (lambda x: torch.isinf(1 / F.relu(x)), ROWS),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), PICTURES),
    "attention": (attentions, ROWS),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ROWS),
    "reciprocal": (lambda x: torch.reciprocal(x.abs() * 1e-2), ROWS),
    "alpha": (
        lambda x: (
            torch.add(x, x.exp(), alpha=3)
            + torch.sub(x, x.exp(), alpha=0.5)
            + torch.rsub(x, x * x, alpha=2)
            + torch.rsub(x, 2, alpha=3)
        ),
        ROWS,
    ),
    "addmm": (
        lambda x: (
            torch.addmm(x[0], x[0], x[1].permute(1, 0) @ x[1], beta=2, alpha=3)
            + torch.baddbmm(x, x @ x.permute(0, 2, 1), x, beta=0.5)
            + torch.baddbmm(x, x @ x.permute(0, 2, 1), x, beta=0, alpha=2)
        ),
        ROWS,
    ),
    "softplus": (lambda x: F.softplus(x, 2, 0.5), ROWS),
    "take_along_dim": (lambda x: torch.take_along_dim(x, x.argsort(1), 1), ROWS),
}
PLAIN = (
    "attention",
    "cast",
    "where",
    "and_or_xor",
    "chunk",
    "max_pool1d",
    "rms_norm",
    "var_mean",
    "isinf",
    "channel_shuffle",
    "alpha",
    "addmm",
)
"""Converted too; what the others are written with stands in these, or is plain arithmetic."""


@pytest.mark.parametrize("rule", RULES)
def test_result_is_exact_and_rewritten_when_coremltools_lacks_the_operator(rule: str) -> None:
    function, example = RULES[rule]
    checked = check_pass(LegalizeSpelling(), Calls(function), example)
    assert checked.changes
    assert near_misses(LegalizeSpelling(), checked.after) == []


def test_what_is_left_converts_when_all_rules_are_used(tmp_path: Path) -> None:
    class All(nn.Module):
        def forward(self, rows: Tensor, pictures: Tensor) -> dict[str, Any]:
            return {name: RULES[name][0](pictures if RULES[name][1] is PICTURES else rows) for name in PLAIN}

    program = captured(All(), (ROWS, PICTURES), dynamic=False)
    program = check_pass(LegalizeSpelling(), program, prefixes=1).after
    artifact = CoreMLTarget().lower(program, tmp_path, Brief(CoreMLOptions(), precision="fp32"))
    assert len(read_package(tmp_path / artifact.path).outputs) == len(program.results)


def test_attention_in_half_converts_when_it_has_a_scale_or_a_mask(tmp_path: Path) -> None:
    def half(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.float() for each in attentions(x.half()))

    program = captured(Calls(half), ROWS, dynamic=False)
    LegalizeSpelling().run(program)
    artifact = CoreMLTarget().lower(program, tmp_path, Brief(CoreMLOptions(deployment_target="iOS18")))
    found = read_package(tmp_path / artifact.path).histogram()
    assert found["scaled_dot_product_attention"] == 4, "each is whole where the system has it"


def test_attention_is_left_alone_when_it_has_no_scale_and_a_float_mask() -> None:
    plain = captured(Calls(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :, :6])), ROWS)
    check_pass(LegalizeSpelling(), plain, expect_changes=0)
    axes: Any = {"x": {1: ("tokens", 4, 64)}}
    causal = captured(Calls(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), ROWS, dynamic=axes)
    assert near_misses(LegalizeSpelling(), causal) == [
        ("scaled_dot_product_attention", "the size of its causal mask depends on the input")
    ]


def test_nothing_is_rewritten_when_the_operator_works_on_bits_or_sizes_are_open() -> None:
    bits = captured(Calls(lambda x: (x & 3) ^ 1), torch.tensor([[1, 2, 3]]))
    masks = captured(Calls(lambda x: x & x.flip(-1)), torch.tensor([[1, 2, 3]]))
    for program in (bits, masks):
        check_pass(LegalizeSpelling(), program, expect_changes=0)
    assert [reason for _, reason in near_misses(LegalizeSpelling(), masks)] == ["it works on the bits of integers"]
    axes: Any = {"x": {2: ("height", 4, 64)}}
    shuffled = captured(Calls(lambda x: torch.channel_shuffle(x, 2)), PICTURES, dynamic=axes)
    assert near_misses(LegalizeSpelling(), shuffled) == [
        ("channel_shuffle", "a size beside the batch depends on the input")
    ]
    broad = captured(Calls(lambda x: torch.take_along_dim(x, x.argsort(1)[:, :, :1], 1)), ROWS)
    assert [reason for _, reason in near_misses(LegalizeSpelling(), broad)] == ["values and indices have other sizes"]
    taken = captured(Calls(lambda x: F.softplus(F.gelu(x) + 2 * x - torch.sub(x, 1))), ROWS)
    check_pass(LegalizeSpelling(), taken, expect_changes=0)
    single = captured(Calls(lambda x: F.max_pool1d(x, 2)), ROWS[0], dynamic=False)
    assert [reason for _, reason in near_misses(LegalizeSpelling(), single)] == ["its input has no batch dim"]


# -- resizing ----------------------------------------------------------------------------------------------------------


def resizing(**options: Any) -> Calls:
    return Calls(lambda x: F.interpolate(x, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"size": (13, 4), "mode": "bicubic"},
        {"scale_factor": 1.7, "mode": "bicubic"},
        {"scale_factor": (1.5, 2.0), "mode": "bicubic", "recompute_scale_factor": False},
        {"size": (5, 11), "mode": "bicubic", "align_corners": True},
        {"size": (3, 4), "mode": "bicubic", "antialias": True},
        {"size": (3, 9), "mode": "bilinear", "antialias": True},
        {"scale_factor": 1.3, "mode": "nearest"},
        {"size": (16, 12), "mode": "nearest-exact"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_resizing_is_two_products_when_core_ml_has_none(options: dict[str, Any]) -> None:
    checked = check_pass(LegalizeResize(), resizing(**options), PICTURES, expect_changes=1)
    assert [dialect.plain_name(n) for n in checked.after.calls()] == ["matmul", "matmul"]


def test_resizing_stays_when_core_ml_has_it_or_sizes_are_open() -> None:
    check_pass(LegalizeResize(), resizing(size=(3, 4), mode="bilinear"), PICTURES, expect_changes=0)
    check_pass(LegalizeResize(), resizing(size=(16, 18), mode="nearest"), PICTURES, expect_changes=0)
    axes: Any = {"x": {2: ("height", 4, 64)}}
    open_height = captured(resizing(scale_factor=2, mode="bicubic"), PICTURES, dynamic=axes)
    assert near_misses(LegalizeResize(), open_height) == [
        ("upsample_bicubic2d", "height or width depends on the input")
    ]


def test_passes_are_those_of_the_target_when_it_is_asked() -> None:
    found = CoreMLTarget().program_passes(Brief(CoreMLOptions()))
    assert [each.name for each in found] == ["legalize-spelling", "legalize-resize"]
    assert {each.stage for each in found} == {"legalize"}


def test_variance_is_unbiased_when_no_correction_is_given() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            variance, mean = torch.ops.aten.var_mean.correction(x, [-1])
            return variance + mean

    check_pass(LegalizeSpelling(), Both(), torch.randn(2, 6, 8))
