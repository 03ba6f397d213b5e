"""merge-linears: which linears become one, which stay and why, and that values stay."""

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
from vlexport.passes.merge_linears import MergeLinears, MergeLinearsOptions

C = 8
TOKENS = 6
ON = MergeLinearsOptions(on=True)


def tokens() -> Tensor:
    return torch.randn(2, TOKENS, C, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Linears and convolutions of a value; what ``forward`` does with them is the case."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C, bias=False), nn.Linear(C, 4)
        self.wide = nn.Linear(2 * C, C)
        self.conv, self.point = nn.Conv1d(TOKENS, 5, 1), nn.Conv1d(TOKENS, 3, 1, bias=False)
        self.long, self.grouped = nn.Conv1d(TOKENS, 4, 3, padding=1), nn.Conv1d(TOKENS, 4, 1, groups=2)
        self.case = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def net(forward: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(forward))


MERGED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str, int]] = {
    "all have a bias": (lambda n, x: torch.cat([n.q(x), n.v(x)], -1), "linear", 2),
    "one has no bias": (lambda n, x: torch.cat([n.q(x), n.k(x), n.v(x)], -1), "linear", 3),
    "none has a bias": (lambda n, x: n.k(x) * F.linear(x, n.q.weight), "linear", 2),
    "convolutions": (lambda n, x: torch.cat([n.conv(x), n.point(x)], 1), "conv1d", 2),
    "products": (lambda n, x: (x @ n.q.weight) * (x @ n.k.weight), "matmul", 2),
    "addmm": (
        lambda n, x: torch.addmm(n.q.bias, y := x[:, 0], n.q.weight) * torch.addmm(n.q.bias, y, n.k.weight), "addmm", 2,
    ),
    "one is read by two": (lambda n, x: (q := n.q(x)) * n.k(x) + q, "linear", 2),
    "the value is computed": (lambda n, x: n.q(y := x.relu()) * n.k(y) + y, "linear", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_linears_become_one_when(case: str) -> None:
    forward, kind, count = MERGED[case]
    checked = check_pass(MergeLinears(ON), net(forward), tokens(), expect_changes=1)
    assert checked.changes[0].what == f"{count} {kind}s of one value merged"
    assert cost(checked.after).macs == cost(checked.before).macs
    assert len([n for n in checked.after.calls() if f"aten.{kind}." in str(n.target)]) == 1
    assert not checked.near_misses


def test_every_piece_stands_for_its_linear_when_merged() -> None:
    checked = check_pass(MergeLinears(ON), net(MERGED["one has no bias"][0]), tokens())
    pieces = [n for n in checked.after.calls() if "getitem" in str(n.target)]
    assert [provenance.module_path(n) for n in pieces] == ["q", "k", "v"]
    assert checked.changes[0].where == ("q", "k", "v")


def test_nothing_is_merged_when_it_is_not_asked_for() -> None:
    checked = check_pass(MergeLinears(), net(MERGED["all have a bias"][0]), tokens(), expect_changes=0)
    assert not checked.near_misses


def test_two_groups_are_merged_when_their_geometry_differs() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        return torch.cat([n.conv(x), n.point(x), n.long(x), F.conv1d(x, n.long.weight * 1.0, padding=1)], 1)

    from vlexport.passes.fold_constants import FoldConstants
    from vlexport.passes.pipeline import run_pass

    program = run_pass(FoldConstants(), captured(net(forward), tokens()), gate=None)[0]
    check_pass(MergeLinears(ON), program, expect_changes=2)


OTHER = "another one of the same value has another geometry or dtype"
STAYS: dict[str, tuple[Callable[[Net, Tensor], Tensor], list[tuple[str, str]]]] = {
    "there is one": (lambda n, x: n.q(x) + x, []),
    "they read two values": (lambda n, x: n.q(x) * n.k(x.relu()), []),
    "the kernels differ": (
        lambda n, x: torch.cat([n.conv(x), n.long(x)], 1), [("conv1d", OTHER), ("conv1d", OTHER)],
    ),
    "one is a convolution": (
        lambda n, x: torch.cat([n.conv(x), n.q(x)], 1), [("conv1d", OTHER), ("linear", OTHER)],
    ),
    "one has groups": (
        lambda n, x: torch.cat([n.conv(x), n.grouped(x)], 1), [("conv1d", "the conv1d has groups")],
    ),
    "a weight is computed": (
        lambda n, x: n.q(x) * F.linear(x, n.k.weight * x.mean()),
        [("linear", "the linear's weight is computed, not stored")],
    ),
    "a weight is tied": (
        lambda n, x: n.q(x) * n.k(x) + n.k(n.k(x).relu()) ,
        [("linear", "the linear's weight is used by 2 other(s)")] * 2,
    ),
    "the value is both operands": (lambda n, x: x[0, :, :6] @ x[0, :, :6], []),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_linears_stay_and_say_why_when(case: str) -> None:
    forward, reasons = STAYS[case]
    program = captured(net(forward), tokens())
    assert near_misses(MergeLinears(ON), program) == reasons
    check_pass(MergeLinears(ON), program, expect_changes=0)


def test_text_is_golden_when_queries_keys_and_values_are_three_linears() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).reshape(-1, TOKENS, 2, each.out_features // 2).permute(0, 2, 1, 3) for each in (n.q, n.k, n.v)
        )
        return F.scaled_dot_product_attention(q, k, v)

    check_pass(MergeLinears(ON), net(forward), tokens(), golden="merge_linears", expect_changes=1)


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(programs(most=2, including=("linears of one value",)))
def test_values_are_equal_when_the_program_is_random(program: Program) -> None:
    try:
        checked = check_pass(MergeLinears(ON), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        assume(False)
    assert cost(checked.after).macs == cost(checked.before).macs
