"""reparameterize on random affine graphs: one operator where theory says so, equal values, true reasons elsewhere.

Every value of a sum is affine in the input, and every way to it has one stride in all. Kernels with padding stand where
their operand is the input or unbiased and pointwise, so that the border is exact by construction.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Node

from tests.growing import Grower, finished
from tests.harness import captured, check_pass, worst_error
from tests.strategies import programs
from vlexport.core.errors import CapabilityError
from vlexport.ir.cost import cost
from vlexport.ir.facts import FACTS
from vlexport.ir.program import Program
from vlexport.passes.reparameterize import Reparameterize

aten = torch.ops.aten
SETTINGS = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


class Seed(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.relu()


SEEDS = {size: captured(Seed(), torch.zeros(2, 4, size, size), dynamic=False) for size in (7, 8)}


@dataclass
class Branch:
    """Grows one branch of stride ``stride`` in all, whose results are those of a 3×3 kernel with padding 1."""

    g: Grower
    stride: int

    def conv(self, x: Node, outs: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1,
             bias: bool, groups: int = 1) -> Node:  # fmt: skip
        ins = int(self.g.shape(x)[0])
        weight = self.g.tensor(outs, ins // groups, kernel, kernel)
        geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
        return self.g.call(aten.conv2d.default, x, weight, self.g.tensor(outs) if bias else None, *geometry)

    def norm(self, x: Node) -> Node:
        channels = int(self.g.shape(x)[0])
        stored = [self.g.tensor(channels, positive=True) for _ in range(4)]
        return self.g.call(aten.batch_norm.default, x, *stored, False, 0.1, 1e-5, False)

    def grown(self, x: Node) -> Node:
        """A branch of the kinds that the sum of 3×3 kernels holds at no cost."""
        g = self.g
        kind = g.pick(
            "3×3", "grouped", "1×1", "1×1, then 3×3", "pool", "identity", "cut", "5×5, dilated", "1×1 and 1×1"
        )
        groups = g.pick(1, 2, 4)
        bias = g.pick(True, False)
        if kind in ("3×3", "grouped"):
            made = self.conv(x, 4, 3, stride=self.stride, padding=1, bias=bias, groups=groups)
        elif kind == "1×1":
            made = self.conv(x, 4, 1, stride=self.stride, bias=bias, groups=groups)
        elif kind == "1×1, then 3×3":
            made = self.conv(x, 4, 1, bias=False)
            made = self.conv(made, 4, 3, stride=self.stride, padding=1, bias=bias, groups=groups)
        elif kind == "1×1 and 1×1":
            made = self.conv(x, 6, 1, stride=self.stride, bias=bias)
            made = self.conv(self.norm(made), 4, 1, bias=g.pick(True, False))
        elif kind == "pool":
            made = g.call(aten.avg_pool2d.default, x, [3, 3], [self.stride] * 2, [1, 1])
        elif kind == "5×5, dilated":
            made = self.conv(x, 4, 3, stride=self.stride, padding=2, dilation=2, bias=bias)
        elif kind == "cut":
            parts = g.call(aten.split_with_sizes.default, x, [2, 2], 1)
            halves = [g.call(operator.getitem, parts, i) for i in range(2)]
            made = g.call(aten.cat.default, [
                self.conv(half, 2, 3, stride=self.stride, padding=1, bias=bias) for half in halves
            ], 1)  # fmt: skip
        else:
            made = x if self.stride == 1 else self.conv(x, 4, 1, stride=self.stride, bias=False, groups=4)
        if g.pick(True, False):
            made = self.norm(made)
        if g.pick(True, False, False):
            made = g.call(aten.mul.Tensor, made, g.tensor(4, 1, 1))
        return made


@st.composite
def sums(draw: Any) -> Program:
    """A dense 5×5 convolution plus one to four other branches of the input, perhaps in another order."""
    program = SEEDS[draw(st.sampled_from(sorted(SEEDS)))].copy()
    grower = Grower(program, draw, torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    x = program.calls()[0]
    branch = Branch(grower, grower.pick(1, 2))
    made = [branch.conv(x, 4, 5, stride=branch.stride, padding=2, bias=grower.pick(True, False))]
    made += [branch.grown(x) for _ in range(draw(st.integers(1, 4)))]
    order = draw(st.permutations(made))
    total = order[0]
    for each in order[1:]:
        total = grower.call(grower.pick(aten.add.Tensor, aten.add.Tensor, aten.sub.Tensor), total, each)
    if grower.pick(True, False):
        total = branch.norm(total)
    return finished(program, [total], set())


@SETTINGS
@given(sums())
def test_one_convolution_is_left_when_branches_fit_in_one_of_them(program: Program) -> None:
    twin = program.double()
    after = twin.copy()
    changes, _ = Reparameterize().run(after)
    assert [str(n.target) for n in after.calls()] == ["aten.relu.default", "aten.conv2d.default"]
    x = twin.example[0]
    assert worst_error(after.run(x), twin.run(x)) <= 1e-9
    was, now = cost(twin), cost(after)
    assert now.macs <= was.macs
    assert now.parameters <= was.parameters or now.macs < was.macs
    assert sum(change.saved_macs for change in changes) == was.macs - now.macs


AFFINE = (
    "conv2d", "conv2d, batch_norm", "linear, batch_norm", "conv2d read twice, batch_norm", "tied linears",
    "batch_norm", "conv_transpose2d", "conv_transpose2d, batch_norm", "linear", "mul", "add", "sub", "residual", "cat",
    "split", "pool", "permute", "flatten", "split axis", "layout chain", "slice",
)  # fmt: skip


@SETTINGS
@given(programs(most=6, including=AFFINE))
def test_values_and_promises_hold_when_anything_may_stand_anywhere(program: Program) -> None:
    before = cost(program)
    try:
        checked = check_pass(Reparameterize(), program, prefixes=1)
    except CapabilityError:  # the draw made a program whose outputs do not depend on its input
        return
    after = cost(checked.after)
    assert after.macs <= before.macs
    assert FACTS["no-foldable-batch-norm"](checked.after)


def reluing(draw: Any, branch: Branch, x: Node, made: Node) -> tuple[Node, str]:
    return branch.g.call(aten.relu.default, made), "a relu stands between"


def padded_behind_a_bias(draw: Any, branch: Branch, x: Node, made: Node) -> tuple[Node, str]:
    inner = branch.conv(x, 4, 1, bias=True)
    return branch.conv(inner, 4, 3, stride=branch.stride, padding=1, bias=False), "a bias stands before zero padding"


def padded_twice(draw: Any, branch: Branch, x: Node, made: Node) -> tuple[Node, str]:
    inner = branch.conv(x, 4, 3, padding=1, bias=False)
    outer = branch.conv(inner, 4, 3, stride=branch.stride, padding=1, bias=False)
    return outer, "zero padding stands between the two kernels"


@st.composite
def spoiled(draw: Any) -> tuple[Program, str]:
    """Two branches of which one is spoiled, and the reason that must be given."""
    program = SEEDS[draw(st.sampled_from(sorted(SEEDS)))].copy()
    grower = Grower(program, draw, torch.Generator().manual_seed(draw(st.integers(0, 2**16))))
    x = program.calls()[0]
    branch = Branch(grower, grower.pick(1, 2))
    made = [branch.conv(x, 4, 5, stride=branch.stride, padding=2, bias=grower.pick(True, False)) for _ in range(2)]
    spoil = draw(st.sampled_from((reluing, padded_behind_a_bias, padded_twice)))
    other, reason = spoil(draw, branch, x, made[1])
    total = grower.call(aten.add.Tensor, *draw(st.permutations([made[0], other])))
    return finished(program, [branch.norm(total) if grower.pick(True, False) else total], set()), reason


@SETTINGS
@given(spoiled())
def test_a_spoiled_branch_stays_and_says_why_when_anything_else_would_merge(drawn: tuple[Program, str]) -> None:
    program, reason = drawn
    after = program.copy()
    _, misses = Reparameterize().run(after)
    assert sum(str(node.target) == "aten.conv2d.default" for node in after.calls()) > 1
    assert any(miss.reason.startswith(reason) for miss in misses), [miss.reason for miss in misses]
    assert worst_error(after.run(*program.example), program.run(*program.example)) <= 1e-4  # in float32
