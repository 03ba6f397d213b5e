"""legalize-repeats: by a number, by stored counts, and where neither is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses
from tests.passes.test_merge_layout import IMAGE, calls
from vlexport.passes.legalize_repeats import LegalizeRepeats


class Counted(nn.Module):
    """``function(x, counts)`` with counts for four channels."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], *counts: int) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("counts", torch.tensor(counts or (2, 0, 1, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.function(torch.relu(x), self.counts)


BY_NUMBER = ["unsqueeze", "expand", "reshape"]


@pytest.mark.parametrize(
    ("function", "counts", "left"),
    [
        (lambda x, c: x.repeat_interleave(3, 1), (), BY_NUMBER),
        (lambda x, c: x.repeat_interleave(2, 0), (), BY_NUMBER),
        (lambda x, c: x.repeat_interleave(2, -1), (), BY_NUMBER),
        (lambda x, c: x.repeat_interleave(2), (), ["reshape", *BY_NUMBER]),
        (lambda x, c: x.sum((1, 2, 3)).repeat_interleave(2), (), ["sum", *BY_NUMBER]),
        (lambda x, c: x.repeat_interleave(c, 1, output_size=6), (), ["index_select"]),
        (lambda x, c: x.repeat_interleave(c, -3, output_size=8), (2, 2, 2, 2), ["index_select"]),
        (lambda x, c: x.repeat_interleave(c, 1, output_size=12), (3,), BY_NUMBER),
    ],
)
def test_repeats_are_written_with_plain_operators_when_known(
    function: Callable[[Tensor, Tensor], Tensor], counts: tuple[int, ...], left: list[str]
) -> None:
    checked = check_pass(LegalizeRepeats(), captured(Counted(function, *counts), IMAGE), expect_changes=1)
    assert calls(checked.after) == left


def test_repeats_stay_when_two_sizes_depend_on_the_input() -> None:
    program = captured(Counted(lambda x, c: x.repeat_interleave(2, 1)), IMAGE, dynamic={"x": {0: "batch", 2: "height"}})
    reason = "two sizes of its result depend on the input"
    assert near_misses(LegalizeRepeats(), program) == [("repeat_interleave", reason)]


def test_repeats_stay_when_their_counts_depend_on_the_input() -> None:
    function = lambda x, c: x.repeat_interleave(c + x.amin().gt(1).long() * 0, 1, output_size=6)  # noqa: E731
    program = captured(Counted(function), IMAGE)
    reason = "the number of repeats depends on the input"
    assert [r for _, r in near_misses(LegalizeRepeats(), program)] == [reason]


def test_text_is_golden_when_keys_are_shared_by_groups_of_heads() -> None:
    class Grouped(nn.Module):
        """Grouped-query attention's keys: each of 4 heads stands for 3."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).repeat_interleave(3, 1).permute(0, 2, 1, 3)

    check_pass(LegalizeRepeats(), Grouped(), IMAGE, golden="legalize_repeats", expect_changes=1)


@settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
def test_places_are_those_of_torch_when_counts_are_random(counts: list[int]) -> None:
    program = _SEED.copy()
    stored = program.add_tensor("counts", torch.tensor(counts), before=program.output, kind="buffer")
    x = program.results[0]
    call = torch.ops.aten.repeat_interleave.self_Tensor
    made = program.add_call(call, (x, stored, 1), {"output_size": sum(counts)}, before=program.output, value_of=x)
    program.output.args = ((made,),)
    want = program.run(IMAGE)[0]
    changes, _ = LegalizeRepeats().run(program)
    assert len(changes) == 1
    assert torch.equal(program.run(IMAGE)[0], want)


_SEED = captured(Counted(lambda x, c: x), IMAGE)
