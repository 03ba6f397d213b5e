"""raise-patch-embedding: every spelling of cut-and-project, and patches that something else reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from tests.passes.test_merge_layout import calls
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.merge_layout import MergeLayout
from vlexport.passes.raise_patch_embedding import RaisePatchEmbedding

aten = torch.ops.aten
F = torch.nn.functional
IMAGE = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))


class Embed(nn.Module):
    """``function(x, weight, bias)`` with a weight of [5, columns]."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Any], columns: int) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(5, columns, generator=generator))
        self.bias = nn.Parameter(torch.randn(5, generator=generator))

    def forward(self, x: Tensor) -> Any:
        return self.function(torch.relu(x), self.weight, self.bias)


def embedding(function: Callable[[Tensor, Tensor, Tensor], Any], columns: int = 48, **options: Any) -> Program:
    program = captured(Embed(function, columns), IMAGE, **options)
    Canonicalize().run(program)
    MergeLayout().run(program)
    return program


def cut(x: Tensor, *order: int) -> Tensor:
    """[B, 2, 4, 3, 4] with the axes of image and patch in another order."""
    return x.reshape(-1, 3, 2, 4, 3, 4).permute(0, *order)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.linear(cut(x, 2, 4, 3, 5, 1).reshape(-1, 6, 48), w, b),
        lambda x, w, b: F.linear(cut(x, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), w, b),
        lambda x, w, b: F.linear(x.permute(0, 2, 3, 1).reshape(-1, 2, 4, 3, 4, 3).permute(0, 1, 3, 2, 4, 5)
                                 .reshape(-1, 6, 48), w, b),
        lambda x, w, b: cut(x, 2, 4, 5, 3, 1).reshape(-1, 6, 48) @ w.T.contiguous(),
        lambda x, w, b: F.linear(F.unfold(x, 4, stride=4).transpose(1, 2), w, b),
        lambda x, w, b: F.linear(cut(x, 4, 2, 3, 5, 1).reshape(-1, 6, 48), w),
    ],
)  # fmt: skip
def test_patches_are_embedded_by_a_convolution_when_a_linear_reads_them(function: Callable[..., Tensor]) -> None:
    from vlexport.passes.fold_constants import FoldConstants

    program = embedding(function)
    FoldConstants().run(program)
    checked = check_pass(RaisePatchEmbedding(), program, expect_changes=1)
    assert calls(checked.after)[0] == "conv2d"
    assert set(calls(checked.after)) <= {"conv2d", "reshape", "permute"}
    assert checked.changes[0].saved_macs == 0


def test_one_spelling_is_left_when_patches_lie_in_rows() -> None:
    programs = [
        embedding(lambda x, w, b: F.linear(cut(x, 2, 4, 1, 3, 5).reshape(-1, 6, 48), w, b)),
        embedding(lambda x, w, b: F.linear(F.unfold(x, 4, stride=4).transpose(1, 2), w, b)),
    ]
    assert [calls(check_pass(RaisePatchEmbedding(), p).after) for p in programs] == [
        ["conv2d", "reshape", "permute"]
    ] * 2


@pytest.mark.parametrize(("kernel", "options"), [(3, {"padding": 1, "stride": 2}), (3, {"dilation": 2}), (4, {})])
def test_overlapping_patches_are_a_convolution_when_a_linear_reads_them(kernel: int, options: dict[str, int]) -> None:
    function = lambda x, w, b: F.linear(F.unfold(x, kernel, **options).transpose(1, 2), w, b)  # noqa: E731
    checked = check_pass(RaisePatchEmbedding(), embedding(function, 3 * kernel**2), expect_changes=1)
    assert calls(checked.after) == ["conv2d", "reshape", "permute"]


@pytest.mark.parametrize(
    ("function", "columns", "reason"),
    [
        (lambda x, w, b: F.linear(F.layer_norm(F.unfold(x, 4, stride=4).transpose(1, 2), [48]), w, b), 48,
         "the patches are read by layer_norm, not by a linear"),
        (lambda x, w, b: F.unfold(x, 4, stride=4).transpose(1, 2).reshape(-1, 3, 4, 4), 48,
         "the patches are read by reshape, not by a linear"),
        (lambda x, w, b: (lambda p: (F.linear(p, w, b), p.sum(1)))(F.unfold(x, 4, stride=4).transpose(1, 2)), 48,
         "the patches are used by others as well"),
        (lambda x, w, b: (lambda p: (F.linear(p, w, b), p.sum(1)))(cut(x, 2, 4, 3, 5, 1).reshape(-1, 6, 48)), 48,
         "the patches are used by others as well"),
        (lambda x, w, b: F.linear(x.permute(0, 2, 3, 1).reshape(-1, 96, 3), w, b), 3, None),
        (lambda x, w, b: F.linear(cut(x, 2, 1, 3, 4, 5).reshape(-1, 6, 48), w, b), 48, None),
        (lambda x, w, b: F.linear(cut(x, 3, 5, 2, 4, 1).reshape(-1, 16, 18), w, b), 18, None),
        (lambda x, w, b: F.linear(x.reshape(-1, 2, 144), w, b), 144, None),
        (lambda x, w, b: F.linear(cut(x, 2, 4, 3, 5, 1).reshape(-1, 6, 48), w * x.mean()), 48, None),
        (lambda x, w, b: F.linear(x.permute(0, 2, 1, 3).reshape(-1, 8, 36), w, b), 36, None),  # heads are joined
    ],
)  # fmt: skip
def test_patches_stay_when_no_convolution_computes_the_same(
    function: Callable[..., Any], columns: int, reason: str | None
) -> None:
    found = {reason for _, reason in near_misses(RaisePatchEmbedding(), embedding(function, columns))}
    assert found >= ({reason} if reason else set())
    assert bool(found) == (reason is not None)


def test_text_is_golden_when_patches_are_rearranged_and_projected() -> None:
    function = lambda x, w, b: F.linear(cut(x, 2, 4, 3, 5, 1).reshape(-1, 6, 48), w, b)  # noqa: E731
    check_pass(RaisePatchEmbedding(), embedding(function), golden="raise_patch_embedding")


@functools.cache
def _seed() -> Program:
    return embedding(lambda x, w, b: x)


@settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(st.permutations(range(1, 6)), st.booleans())
def test_only_orders_that_keep_patches_together_are_raised_when_the_order_is_random(
    order: list[int], biased: bool
) -> None:
    """Axes of [B, C, h, u, w, v]: the last three must be channel, row and column of a patch, in any order."""
    program = _seed().copy()
    x, end = program.results[0], program.output
    sizes = [3, 2, 4, 3, 4]
    columns = [sizes[d - 1] for d in order[2:]]
    generator = torch.Generator().manual_seed(2)
    weight = program.add_tensor("w", torch.randn(5, math.prod(columns), generator=generator), before=end)
    bias = program.add_tensor("b", torch.randn(5, generator=generator), before=end) if biased else None
    made: Any = x
    for target, *rest in (
        (aten.reshape.default, [-1, *sizes]), (aten.permute.default, [0, *order]),
        (aten.reshape.default, [-1, sizes[order[0] - 1], sizes[order[1] - 1], math.prod(columns)]),
        (aten.linear.default, weight, bias),
    ):  # fmt: skip
        made = program.add_call(target, (made, *rest), before=end, value_of=x)
    end.args = ((made,),)
    shape = ("batch", sizes[order[0] - 1], sizes[order[1] - 1], 5)
    old = program.signature
    outputs = (old.outputs[0].model_copy(update={"shape": shape}),)
    program.signature = old.model_copy(update={"outputs": outputs})
    checked = check_pass(RaisePatchEmbedding(), program, prefixes=1)
    assert len(checked.changes) == (set(order[2:]) == {1, 3, 5})
