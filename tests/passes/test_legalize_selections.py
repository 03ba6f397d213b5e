"""legalize-selections: where each rule applies, where it must not and says why, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from tests.harness import captured, check_pass, near_misses
from vlexport.ir import dialect
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.eliminate_layout import EliminateLayout
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.legalize_selections import LegalizeSelections

aten = torch.ops.aten
TOKENS, WIDTH = 9, 6
HOSTILE = ("sort", "argsort", "scatter", "index", "slice_scatter", "select_scatter")
Function = Callable[[Tensor], Any]


def tokens(batch: int = 2, *shape: int) -> Tensor:
    return torch.randn(batch, *(shape or (TOKENS, WIDTH)), generator=torch.Generator().manual_seed(batch))


class Calling(nn.Module):
    """``function(1.5 x)``, so that what is selected from is not the input itself."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x * 1.5)


def prepared(function: Function, *shape: int) -> Program:
    """Captured and normalized."""
    program = captured(Calling(function), tokens(2, *shape))
    for pass_ in (Canonicalize(), FoldConstants(), EliminateLayout()):
        pass_.run(program)
    return program


def names(program: Program) -> list[str]:
    return [dialect.plain_name(node) for node in program.calls()]


def hostile(program: Program) -> list[str]:
    return [name for name in names(program) if name.startswith(HOSTILE) and name != "index_select"]


def top(x: Tensor, k: int) -> Tensor:
    """The ``k`` places of the largest in each row of the mean over channels."""
    return x.mean(-1).topk(k, 1).indices


def wide(index: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, WIDTH)


def complement(index: Tensor) -> Tensor:
    places = torch.arange(TOKENS).expand(index.shape[0], -1)
    return places.scatter(-1, index, 0).sort(-1).values[:, index.shape[-1] :]


def fused(x: Tensor) -> Tensor:
    weights = x.mean(-1).softmax(1)
    left = complement(weights.topk(4, 1).indices)
    return (x.gather(1, wide(left)) * weights.gather(1, left).unsqueeze(-1)).sum(1, keepdim=True)


def flattened(x: Tensor, *, k: int = 4, distance: int = TOKENS) -> Tensor:
    b, n, c = x.shape
    index = x[:, 1:].mean(-1).argsort(1, descending=True)[:, :k]
    index = torch.cat([torch.zeros_like(index[:, :1]), index + 1], 1)
    offset = torch.arange(b).view(b, 1) * distance
    return x.reshape(b * n, c)[(index + offset).reshape(-1)].reshape(b, k + 1, c)


def by_two(x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0])[:, None], top(x, 3)]


def merged(x: Tensor, how: str, *, keeps: bool = True) -> Tensor:
    return x[:, :5].scatter_reduce(1, wide(top(x[:, :5], 3)), x[:, 5:8], how, include_self=keeps)


def doubly(x: Tensor, how: str, *, keeps: bool = True) -> Tensor:
    """Several values for one place."""
    index = top(x[:, :5], 4) // 2
    return x[:, :5].scatter_reduce(1, wide(index), x[:, 5:9], how, include_self=keeps)


def written(x: Tensor, place: Callable[[Tensor], None]) -> Tensor:
    scores = x + 0
    place(scores)
    return scores.softmax(1)


def same_for_all(scores: Tensor) -> None:
    scores[:, scores.mean((0, 2)).topk(2).indices] = scores[:, :2] * 2


def picked_to_none(scores: Tensor) -> None:
    scores[torch.arange(scores.shape[0])[:, None], top(scores, 3) // 2] = -2.5


def same_to_none(scores: Tensor) -> None:
    scores[:, scores.mean((0, 2)).topk(2).indices] = -2.5


def one_cell(scores: Tensor) -> None:
    scores[:, top(scores, 2)[0], top(scores, 2)[1] // 2] = 1.0


def first_to_none(scores: Tensor) -> None:
    scores[:, 0] = -1.0


def every_second(scores: Tensor) -> None:
    scores[:, 1::2] = scores[:, :4] * 2


def middle(scores: Tensor) -> None:
    scores[..., 2:4] = scores[..., :2].exp()


POSITIVE: dict[str, tuple[Function, int, list[str]]] = {
    "argsort, first places": (lambda x: x.gather(1, x.argsort(1, descending=True)[:, :3]), 1, ["topk", "gather"]),
    "argsort, smallest first": (lambda x: x.gather(1, x.argsort(1)[:, :3]), 1, ["topk"]),
    "argsort, in full": (lambda x: x.gather(1, x.argsort(1)[:, 4:]), 1, ["topk"]),
    "argsort, negative end": (lambda x: x.gather(1, x.argsort(1)[:, :-2]), 1, ["topk"]),
    "sort, both results": (lambda x: x.sort(1)[0] * x.sort(1)[1], 2, ["topk"]),
    "sort of places": (lambda x: x.gather(1, wide(top(x, 4).sort(1).values)), 1, ["topk"]),
    "sort, values alone": (lambda x: x.sort(-1, descending=True).values[..., :2], 1, ["topk"]),
    "stable sort": (lambda x: x.round().sort(dim=1, stable=True, descending=True), 1, ["topk"]),
    "stable argsort": (lambda x: x.gather(1, x.round().argsort(dim=1, stable=True)[:, :5]), 1, ["topk"]),
    "complement": (lambda x: x.gather(1, wide(complement(top(x, 4)))), 1, ["topk"]),
    "fused complement": (fused, 1, ["matmul"]),
    "fused complement without keepdim": (lambda x: fused_flat(x), 1, ["matmul"]),
    "flattened batch": (flattened, 2, ["gather"]),
    "flattened batch, joined": (lambda x: flattened(x).reshape(-1, WIDTH)[:4], 2, ["gather"]),
    "batch and places": (by_two, 1, ["gather"]),
    "sum": (lambda x: merged(x, "sum"), 1, ["matmul"]),
    "sum, several": (lambda x: doubly(x, "sum"), 1, ["matmul"]),
    "sum without its own": (lambda x: doubly(x, "sum", keeps=False), 1, ["matmul", "where"]),
    "mean": (lambda x: doubly(x, "mean"), 1, ["matmul", "div"]),
    "mean without its own": (lambda x: doubly(x, "mean", keeps=False), 1, ["matmul", "where"]),
    "amax": (lambda x: doubly(x, "amax"), 1, ["amax", "maximum"]),
    "amin without its own": (lambda x: doubly(x, "amin", keeps=False), 1, ["amin", "where"]),
    "sum of single numbers": (lambda x: merged(x.mean(-1, keepdim=True).expand(-1, -1, 6), "sum"), 1, ["matmul"]),
    "sum, last axis": (lambda x: x.scatter_add(2, x.argmax(2, keepdim=True), x[..., :1]), 1, ["matmul"]),
    "sum, last axis, one for all rows": (
        lambda x: x.scatter_add(2, x.mean(1).topk(2, 1).indices[:, None].expand(-1, TOKENS, -1), x[..., :2]), 1,
        ["matmul"],
    ),
    "sum, thin rows": (
        lambda x: x[..., :1].scatter_add(1, top(x, 3).unsqueeze(-1), x[:, :3, :1]), 1, ["matmul", "unsqueeze"],
    ),
    "sum, an axis in front": (
        lambda x: x[..., None].scatter_add(1, top(x, 2)[..., None, None].expand(-1, -1, WIDTH, 1), x[:, :2, :, None]),
        1, ["matmul", "permute"],
    ),
    "amax, last axis": (
        lambda x: x.scatter_reduce(2, x.topk(2, 2).indices // 2, x[..., :2], "amax"), 1, ["amax", "maximum"],
    ),
    "distinct places": (lambda x: x.scatter(1, wide(top(x, 3)), x[:, :3] * 2), 1, ["where", "gather"]),
    "distinct places, last axis": (lambda x: x.scatter(2, x.topk(2, 2).indices, x[..., :2]), 1, ["where", "gather"]),
    "one place": (lambda x: x.scatter(1, wide(x.mean(-1).argmax(1, True)), x[:, :1]), 1, ["where", "gather"]),
    "one value": (lambda x: x.scatter(2, x.topk(2, 2).indices, 3.0), 1, ["where"]),
    "one value, whole numbers": (
        lambda x: torch.ones_like(x, dtype=torch.int64).scatter(1, wide(top(x, 2)), 0), 1, ["where"],
    ),
    "index_add": (lambda x: x.index_add(1, x.mean((0, 2)).topk(3).indices, x[:, :3]), 1, ["matmul"]),
    "index_put": (
        lambda x: x.index_put((torch.arange(x.shape[0])[:, None], top(x, 3)), x[:, :3] * 2), 1, ["where", "gather"],
    ),
    "index_put, same for all": (
        lambda x: written(x, same_for_all), 2, ["where", "gather"],
    ),
    "index_put that adds": (
        lambda x: x.index_put((torch.arange(x.shape[0])[:, None], top(x, 3) // 2), x[:, :3], accumulate=True), 1,
        ["matmul"],
    ),
    "index_put of one value": (lambda x: written(x, picked_to_none), 1, ["where"]),
    "index_put of one value, same for all": (lambda x: written(x, same_to_none), 2, ["where"]),
    "first row": (lambda x: written(x, first_to_none), 2, ["cat"]),
    "every second row": (lambda x: written(x, every_second), 2, ["where"]),
    "columns in the middle": (lambda x: written(x, middle), 1, ["cat"]),
}  # fmt: skip


def fused_flat(x: Tensor) -> Tensor:
    weights = x.mean(-1).softmax(1)
    left = complement(weights.topk(4, 1).indices)
    return (weights.gather(1, left).unsqueeze(-1) * x.gather(1, wide(left))).sum(1)


@pytest.mark.parametrize("case", POSITIVE)
def test_selection_is_static_and_equal_when_rewritten(case: str) -> None:
    function, changes, holds = POSITIVE[case]
    checked = check_pass(LegalizeSelections(), prepared(function), prefixes=3)
    assert len(checked.changes) == changes, [change.what for change in checked.changes]
    assert not hostile(checked.after)
    assert set(holds) <= set(names(checked.after))
    for batch in (1, 2, 8):
        x = tokens(batch)
        found, expected = checked.after.run(x), checked.before.run(x)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_k_is_what_is_read_when_the_first_places_are() -> None:
    program = prepared(lambda x: (x.argsort(1)[:, :2], x.argsort(1)[:, 1:5]))
    LegalizeSelections().run(program)
    assert [node.args[1] for node in program.calls("aten.topk.default")] == [2, 5]


def test_all_places_are_kept_when_a_slice_of_them_begins_at_a_size_of_the_input() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            places = x.mean(-1).argsort(1, descending=True)[:, y.shape[1] : 8]
            return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).sum(1) + y.sum(1)

    inputs = (torch.randn(2, 9, 4), torch.randn(2, 3, 4))
    program = captured(Cut(), inputs, dynamic={"y": {1: ("n", 2, 6)}})
    wanted = program.run(*inputs)[0]
    LegalizeSelections().run(program)
    torch.testing.assert_close(program.run(*inputs)[0], wanted)


def test_order_of_equals_stays_when_a_sort_is_stable() -> None:
    program = prepared(lambda x: x.round().argsort(dim=1, stable=True, descending=True), 40, 2)
    before = program.copy()
    LegalizeSelections().run(program)
    x = tokens(3, 40, 2) / 3
    assert int((x * 1.5).round().unique().numel()) < 8, "there are ties"
    assert torch.equal(program.run(x)[0], before.run(x)[0])


def test_fused_token_is_exact_when_the_chosen_hold_all_the_weight() -> None:
    """The sum of all less the sum of the chosen would be rounding alone."""

    def function(x: Tensor) -> Tensor:
        weights = (x.mean(-1) * 60).softmax(1)
        left = complement(weights.topk(4, 1).indices)
        return (x.gather(1, wide(left)) * weights.gather(1, left).unsqueeze(-1)).sum(1, keepdim=True)

    program = prepared(function)
    before = program.copy()
    LegalizeSelections().run(program)
    x = tokens(8)
    found, expected = program.run(x)[0], before.run(x)[0]
    assert float(expected.abs().max()) < 1e-2, "what is left weighs little"
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


NEAR: dict[str, tuple[Function, tuple[int, ...], tuple[str, str]]] = {
    "true and false": (lambda x: (x > 0).sort(1).values, (), ("sort", "it sorts true and false")),
    "too many places": (
        lambda x: x.argsort(1), (3841, 1),
        ("argsort", "3841 places are read, more than the 3840 that a top-k gives everywhere"),
    ),
    "stable and long": (
        lambda x: x.argsort(dim=1, stable=True), (1025, 1),
        ("argsort", "a stable order of 1025 elements, more than the 1024 that are compared in pairs"),
    ),
    "a product": (lambda x: doubly(x, "prod"), (), ("scatter_reduce", "values are put together by prod")),
    "several to one place": (
        lambda x: x.scatter(1, wide(top(x, 3) // 2), x[:, :3]), (),
        ("scatter", "two values may be written to one place"),
    ),
    "a part": (
        lambda x: x.scatter_add(1, top(x, 3).unsqueeze(-1).expand(-1, -1, 4), x[:, :3, :4]), (),
        ("scatter_add", "its index covers a part of the target"),
    ),
    "a larger source": (
        lambda x: x.scatter_add(1, wide(top(x, 3)), x), (),
        ("scatter_add", "its source is not as large as its index"),
    ),
    "whole numbers": (
        lambda x: torch.ones_like(x, dtype=torch.int64).scatter_add(1, wide(top(x, 2)), wide(top(x, 2))), (),
        ("scatter_add", "it puts whole numbers together"),
    ),
    "a large one-hot matrix": (
        lambda x: x.scatter_add(1, x.mean(-1).topk(3000, 1).indices.unsqueeze(-1).expand(-1, -1, 2), x[:, :3000]),
        (3000, 2), ("scatter_add", "9000000 elements for one sample to compare, more than 4194304"),
    ),
    "multiplied": (
        lambda x: x.index_add(1, x.mean((0, 2)).topk(3).indices, x[:, :3], alpha=2), (),
        ("index_add", "what is added is multiplied by 2"),
    ),
    "a mask": (
        lambda x: x.index_put((x.mean(-1) > 0,), torch.zeros(6)), (),
        ("index_put", "it writes where a mask says, to a number of places that depends on the data"),
    ),
    "places along two axes": (
        lambda x: written(x, one_cell), (),
        ("index_put", "it writes to places along several axes"),
    ),
    "negative places": (
        lambda x: x.index_put((torch.arange(x.shape[0])[:, None], top(x, 3) - 9), x[:, :3]), (),
        ("index_put", "its places may be negative"),
    ),
    "index_put of one row everywhere": (
        lambda x: x.index_put((torch.arange(x.shape[0])[:, None], top(x, 3)), torch.ones(WIDTH)), (),
        ("index_put", "its source is not as large as its index"),
    ),
    "index_put that adds one value": (
        lambda x: x.index_put((torch.arange(x.shape[0])[:, None], top(x, 3)), torch.tensor(2.0), accumulate=True), (),
        ("index_put", "its source is not as large as its index"),
    ),
    "samples at another distance": (
        lambda x: rows_at(x, 3), (), ("index", "samples are 3 rows apart, and have (9,) rows each"),
    ),
    "places outside a sample": (
        lambda x: rows_at(x, TOKENS, shift=-2), (),
        ("index", "its places reach from -2 to 6, outside a sample of 9 rows"),
    ),
    "unknown places": (
        lambda x: unknown_rows(x), (), ("index", "its places are not known to lie inside a sample"),
    ),
}  # fmt: skip


def rows_at(x: Tensor, distance: int, shift: int = 0) -> Tensor:
    b, n, c = x.shape
    offset = torch.arange(b).view(b, 1) * distance
    return x.reshape(b * n, c)[top(x, 2) + shift + offset]


def unknown_rows(x: Tensor) -> Tensor:
    b, n, c = x.shape
    offset = torch.arange(b).view(b, 1) * n
    return x.reshape(b * n, c)[x[:, :2, 0].clamp(0, 3).long() + offset]


@pytest.mark.parametrize("case", NEAR)
def test_selection_stays_and_says_why(case: str) -> None:
    function, shape, wanted = NEAR[case]
    assert near_misses(LegalizeSelections(), prepared(function, *shape)) == [wanted]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: x.argsort(1), ("argsort", "the length of the sorted axis depends on the input")),
        (
            lambda x: x.scatter_add(1, wide(x.mean(-1).argmax(1, True)), x[:, :1]),
            ("scatter_add", "the length of the axis depends on the input"),
        ),
        (
            lambda x: x.select_scatter(x[:, 0] * 2, 1, 1),
            ("select_scatter", "the length of the axis depends on the input"),
        ),
    ],
    ids=["sort", "scatter", "write"],
)
def test_selection_stays_when_the_input_decides_the_number_of_tokens(
    function: Function, wanted: tuple[str, str]
) -> None:
    program = captured(Calling(function), tokens(2), dynamic={"x": {0: "batch", 1: "tokens"}})
    assert near_misses(LegalizeSelections(), program) == [wanted]


COMPLEMENTS: dict[str, tuple[Function, str]] = {
    "a place chosen twice": (lambda x: complement(top(x, 4) // 2), "a place may be chosen twice"),
    "another value": (
        lambda x: torch.arange(9).expand(x.shape[0], -1).scatter(-1, top(x, 4), 1).sort(-1).values[:, 4:],
        "it is not 0 that is written over the places in order",
    ),
    "not all of it": (
        lambda x: torch.arange(9).expand(x.shape[0], -1).scatter(-1, top(x, 4), 0).sort(-1).values[:, 5:],
        "it is not all that is behind the zeros",
    ),
    "other numbers": (
        lambda x: (torch.arange(9) + 1).expand(x.shape[0], -1).scatter(-1, top(x, 4), 0).sort(-1).values[:, 4:],
        "it is not 0 that is written over the places in order",
    ),
}


@pytest.mark.parametrize("case", COMPLEMENTS)
def test_complement_is_written_rule_by_rule_when_it_is_none(case: str) -> None:
    function, reason = COMPLEMENTS[case]
    program = prepared(function)
    found = list(LegalizeSelections().find(program))
    assert [f.reason for f in found if hasattr(f, "reason")] == [reason]
    check_pass(LegalizeSelections(), program, expect_changes=2)


def test_known_places_are_left_alone() -> None:
    index = torch.tensor([[[1], [3]]]).expand(2, 2, WIDTH)
    program = prepared(lambda x: x[:2].scatter(1, index, x[:2, :2]) if x.shape[0] >= 2 else x)
    assert near_misses(LegalizeSelections(), program) == []


def test_text_is_golden_when_tokens_are_fused_merged_and_looked_up() -> None:
    def function(x: Tensor) -> Tensor:
        x = torch.cat([flattened(x, k=5), fused(x)], 1)
        order = x.mean(-1).argsort(-1, descending=True)
        return x.scatter_reduce(1, wide(order[:, 4:]), x[:, :3], "mean")

    check_pass(LegalizeSelections(), prepared(function), golden="legalize_selections", expect_changes=5)


# -- random selections ------------------------------------------------------------------------------------------------

_SEED = prepared(lambda x: x)


def _grown(draw: Callable[[Any], Any]) -> Program:
    """A few selections, each of what the one before gave; batch dynamic, channels stay.

    Rows may be equal behind the first: only a stable sort then has one right order.
    """
    program = _SEED.copy()
    x = program.results[0]

    start = program.calls()[0]

    def call(target: Any, *args: Any, **keywords: Any) -> Node:
        return program.add_call(target, args, keywords, before=program.output, value_of=start)

    for times in range(draw(st.integers(1, 3))):
        size = int(x.meta["val"].shape[1])
        score = call(aten.mean.dim, x, [2])
        k = draw(st.integers(1, size - 1)) if size > 1 else 1
        largest = draw(st.booleans())
        if times:
            order = call(aten.argsort.stable, score, stable=True, dim=1, descending=largest)
        else:
            order = call(aten.argsort.default, score, 1, largest)
        first = call(aten.slice.Tensor, order, 1, 0, k)
        lookup = draw(st.sampled_from(("gather", "sum", "mean", "amax", "scatter", "fill", "write")))
        index = call(aten.expand.default, call(aten.unsqueeze.default, first, -1), [-1, -1, WIDTH])
        head = call(aten.slice.Tensor, x, 1, 0, k)
        if lookup == "gather":
            x = call(aten.gather.default, x, 1, index)
        elif lookup == "scatter":
            x = call(aten.scatter.src, x, 1, index, head)
        elif lookup == "fill":
            x = call(aten.scatter.value, x, 1, index, 0.5)
        elif lookup == "write":
            step = draw(st.integers(1, 3))
            places = range(0, size, step)
            x = call(aten.slice_scatter.default, x, call(aten.slice.Tensor, x, 1, 0, len(places)), 1, 0, size, step)
        else:
            x = call(aten.scatter_reduce.two, x, 1, index, head, lookup, include_self=draw(st.booleans()))
    program.output.args = ((x,),)
    return program


@settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(st.data())
def test_random_selections_are_equal_and_static(data: st.DataObject) -> None:
    program = _grown(data.draw)
    before = program.copy()
    changes, misses = LegalizeSelections().run(program)
    assert changes
    assert not misses
    assert not hostile(program)
    x = tokens(data.draw(st.sampled_from((1, 2, 8)))).double()
    torch.testing.assert_close(program.double().run(x)[0], before.double().run(x)[0], rtol=1e-9, atol=1e-9)
