"""narrow-to-demand: what it saves to the MAC, where it must not apply and says why, and that values stay."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from tests.growing import Grower, finished, seed_program
from tests.harness import Checked, captured, check_pass, near_misses, randomize
from vlexport.core.errors import GateError
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.demand import rules as demand_rules
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.narrow_to_demand import NarrowToDemand

aten = torch.ops.aten
TOKENS, WIDTH, HEADS = 7, 8, 2
ATTENTION = "aten.scaled_dot_product_attention.default"
Head = Callable[[Grower, Node], object]


def example(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A block of a ViT, with its attention as one operator or written out, and a norm."""

    def __init__(self, *, fused: bool = True, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.fused, self.causal = fused, causal
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, width // HEADS)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal)
        else:
            mixed = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return self.norm(x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def canonical(program: Program) -> Program:
    for each in (Canonicalize(), FoldConstants()):
        each.run(program)
    return program


@functools.cache
def block(kind: str = "fused") -> Program:
    """A block of which all tokens are returned; captured once."""
    model = randomize(Block(fused=kind != "written out", causal=kind == "causal"))
    return canonical(captured(model, example(1, TOKENS, WIDTH)))


def with_head(program: Program, head: Head) -> Program:
    """``head`` is put behind the first output; it returns one node or a list of them."""
    grown = program.copy()
    made = head(Grower(grown, lambda _: None, torch.Generator().manual_seed(2)), grown.results[0])
    return finished(grown, made if isinstance(made, list) else [made], set())  # type: ignore[list-item]


def block_macs(queries: int) -> int:
    """Of a block that computes some queries of all tokens: projections, scores and sums, MLP."""
    return queries * WIDTH * WIDTH * 10 + 2 * TOKENS * WIDTH * WIDTH + 2 * queries * TOKENS * WIDTH


def linear(g: Grower, x: Node) -> Node:
    return g.call(aten.linear.default, x, g.tensor(3, g.shape(x)[-1]), g.tensor(3))


def select(g: Grower, x: Node, row: int, axis: int = 1) -> Node:
    return g.call(aten.select.int, x, axis, row)


def rows(g: Grower, x: Node, *numbers: int) -> Node:
    index = g.program.add_tensor("rows", torch.tensor(numbers), before=g.program.output, kind="constant")
    return g.call(aten.index_select.default, x, 1, index)


def cut(g: Grower, x: Node, start: int, end: int, step: int = 1) -> Node:
    return g.call(aten.slice.Tensor, x, 1, start, end, step)


def two_halves(g: Grower, x: Node) -> Node:
    return g.call(aten.add.Tensor, linear(g, select(g, x, 0)), linear(g, select(g, x, 1)))


def in_two_rows(g: Grower, x: Node) -> Node:
    split = g.call(aten.reshape.default, cut(g, x, 0, 6), [-1, 2, 3, WIDTH])
    return linear(g, select(g, select(g, split, 1), 1))


def of_a_stack(g: Grower, x: Node) -> Node:
    return linear(g, select(g, select(g, g.call(aten.stack.default, [x, g.call(aten.relu.default, x)], 0), 1, 0), 0))


def of_a_cat(g: Grower, x: Node) -> Node:
    joined = g.call(aten.cat.default, [cut(g, x, 2, 4), g.call(aten.relu.default, x)], 1)
    return linear(g, select(g, joined, 1))


READS: dict[str, tuple[Head, int]] = {
    "the class token": (lambda g, x: linear(g, select(g, x, 0)), 1),
    "the class token, kept as an axis": (lambda g, x: linear(g, cut(g, x, 0, 1)), 1),
    "the last token": (lambda g, x: linear(g, select(g, x, -1)), 1),
    "class and distillation token": (two_halves, 2),
    "two heads": (lambda g, x: [linear(g, select(g, x, 0)), linear(g, select(g, x, 4))], 2),
    "no registers": (lambda g, x: linear(g, g.call(aten.mean.dim, cut(g, x, 3, TOKENS), [1])), 4),
    "every other token": (lambda g, x: linear(g, cut(g, x, 0, 2**63 - 1, 2)), 4),
    "a list with a token twice": (lambda g, x: linear(g, rows(g, x, 5, 0, 5)), 2),
    "a part of a split": (
        lambda g, x: linear(g, g.call(operator.getitem, g.call(aten.split.Tensor, x, 5, 1), 1)), 2
    ),
    "a token out of unbind": (
        lambda g, x: linear(g, g.call(operator.getitem, g.call(aten.unbind.int, x, 1), 3)), 1
    ),
    "a token behind a reshape that splits": (in_two_rows, 1),
    "a token behind a permute": (lambda g, x: select(g, g.call(aten.permute.default, x, [1, 0, 2]), 2, 0), 1),
    "a token of one of a stack": (of_a_stack, 1),
    "a token of one piece of a cat": (of_a_cat, 1),
}  # fmt: skip


def check_saved(program: Program, queries: int, *, golden: str | None = None) -> Checked:
    checked = check_pass(NarrowToDemand(), program, expect_changes=1, golden=golden, prefixes=1)
    assert checked.changes[0].saved_macs == block_macs(TOKENS) - block_macs(queries)
    return checked


@pytest.mark.parametrize("case", READS)
def test_block_is_computed_for_the_tokens_that_are_read_when(case: str) -> None:
    head, queries = READS[case]
    check_saved(with_head(block(), head), queries)


@pytest.mark.parametrize("case", ["the class token", "two heads", "a list with a token twice"])
def test_block_is_computed_for_the_tokens_that_are_read_when_attention_is_written_out(case: str) -> None:
    head, queries = READS[case]
    checked = check_saved(with_head(block("written out"), head), queries)
    assert checked.changes[0].what == "only the part that is read computed of linear, matmul"


def test_text_is_golden_when_the_class_token_is_read() -> None:
    checked = check_saved(with_head(block(), READS["the class token"][0]), 1, golden="narrow_to_demand")
    assert checked.changes[0].where == ("qkv", "", "proj", "fc1", "fc2")
    assert checked.changes[0].saved_parameters == 0, "the two halves of the weight are as large as the whole was"
    narrowed = checked.after.calls("aten.linear.default")[0]
    assert provenance.module_path(narrowed) == "qkv"


def test_causal_mask_goes_when_the_last_token_is_read() -> None:
    checked = check_saved(with_head(block("causal"), READS["the last token"][0]), 1)
    (attention,) = checked.after.calls(ATTENTION)
    assert len(attention.args) == 3
    assert not attention.kwargs


def test_causal_attention_gets_its_rows_of_the_mask_when_earlier_tokens_are_read() -> None:
    checked = check_saved(with_head(block("causal"), lambda g, x: linear(g, cut(g, x, 2, 4))), 2)
    (attention,) = checked.after.calls(ATTENTION)
    mask = checked.after.tensor_of(attention.args[3])
    assert mask is not None
    assert mask.tolist() == torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[2:4].tolist()


def test_class_token_is_computed_alone_when_the_number_of_tokens_is_dynamic() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

    model = randomize(Model())
    dims = {"x": {0: "batch", 1: ("tokens", 2, 64)}}
    program = canonical(captured(model, {"x": example(2, TOKENS, WIDTH)}, dynamic=dims))
    checked = check_pass(NarrowToDemand(), program, expect_changes=1)
    sizes = [checked.after.sizes(n.meta["val"].shape, {})[2] for n in checked.after.calls(ATTENTION)]
    assert sizes == [1]


class TextTower(nn.Module):
    """Embedded words, a block with a mask that grows with the batch, and the row of the largest word of each sample."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.block = nn.Embedding(20, WIDTH), Block(causal=causal)

    def forward(self, ids: Tensor) -> Tensor:
        rows = torch.arange(ids.shape[0])
        return self.block(self.words(ids))[rows, ids.argmax(-1)]


def words() -> Tensor:
    return torch.randint(0, 20, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def test_block_is_computed_for_one_token_a_sample_when_the_input_decides_which() -> None:
    program = canonical(captured(randomize(TextTower()), {"ids": words()}))
    checked = check_pass(NarrowToDemand(), program, expect_changes=1)
    assert checked.changes[0].saved_macs == block_macs(TOKENS) - block_macs(1)
    for place in (0, 3, TOKENS - 1):
        ids = torch.zeros(3, TOKENS, dtype=torch.int64)
        ids[:, place] = 19
        ours, theirs = checked.after.run(ids)[0], program.run(ids)[0]
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5), "float32, values of size about 1"


def test_one_token_a_sample_is_computed_when_the_batch_is_fixed() -> None:
    program = canonical(captured(randomize(TextTower()), {"ids": words()}, dynamic=False))
    checked = check_pass(NarrowToDemand(), program, expect_changes=1)
    assert checked.changes[0].saved_macs == 2 * (block_macs(TOKENS) - block_macs(1))


@pytest.mark.parametrize("masks", [1, 2])
def test_one_token_a_sample_gets_its_rows_of_a_stored_mask(masks: int) -> None:
    model = randomize(TextTower())
    model.block.mask = torch.ones(masks, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    program = canonical(captured(model, {"ids": words()}, dynamic=False))
    after = program.copy()
    (change,), _ = NarrowToDemand().run(after)
    whole = masks == 1  # which row of one mask is read differs from sample to sample: queries stay whole
    assert change.saved_macs == 2 * ((TOKENS - 1) * WIDTH * WIDTH * 9 if whole else block_macs(TOKENS) - block_macs(1))
    for place in (0, 3, TOKENS - 1):
        ids = words()
        ids[0, place], ids[1, TOKENS - 1 - place] = 19, 19
        ours, theirs = after.run(ids)[0], program.run(ids)[0]
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5), "float32, values of size about 1"


def test_one_token_is_computed_when_there_is_one_sample() -> None:
    program = canonical(captured(randomize(TextTower()), {"ids": words()[:1]}, dynamic=False))
    after = program.copy()
    (change,), _ = NarrowToDemand().run(after)
    assert change.saved_macs == block_macs(TOKENS) - block_macs(1)
    for place in (0, 3, TOKENS - 1):
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        ids[:, place] = 19
        ours, theirs = after.run(ids)[0], program.run(ids)[0]
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5), "float32, values of size about 1"


def test_tokens_of_other_samples_are_no_row_a_sample() -> None:
    class Turned(TextTower):
        def forward(self, ids: Tensor) -> Tensor:
            return self.block(self.words(ids))[torch.tensor([1, 0]), ids.argmax(-1)]

    program = canonical(captured(randomize(Turned()), {"ids": words()}, dynamic=False))
    checked = check_pass(NarrowToDemand(), program, expect_changes=0)
    assert "which part is read is decided by the input" in {miss.reason for miss in checked.near_misses}


def test_causal_attention_is_computed_whole_when_the_input_decides_which_token_is_read() -> None:
    program = canonical(captured(randomize(TextTower(causal=True)), {"ids": words()}))
    checked = check_pass(NarrowToDemand(), program, expect_changes=1)
    mlp_and_projection = (TOKENS - 1) * WIDTH * WIDTH * 9
    assert checked.changes[0].saved_macs == mlp_and_projection
    assert "the attention is causal, and the input decides which query is read" in {
        miss.reason for miss in checked.near_misses
    }


def test_weight_of_a_linear_is_cut_when_half_of_its_features_are_read() -> None:
    def head(g: Grower, x: Node) -> Node:
        return g.call(aten.slice.Tensor, g.call(aten.gelu.default, linear(g, x)), 2, 0, 1)

    program = with_head(seed_program((5, 4)), head)
    checked = check_pass(NarrowToDemand(), program, expect_changes=1)
    assert checked.changes[0].saved_parameters == 2 * 4 + 2
    assert checked.changes[0].saved_macs == 5 * 2 * 4


def test_convolution_is_narrower_when_some_of_its_channels_are_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.depthwise(self.norm(self.conv(x)).relu())[:, [1, 4]].mean((2, 3))

    torch.manual_seed(0)
    program = canonical(captured(randomize(Net()), example(1, 3, 6, 6)))
    checked = check_pass(NarrowToDemand(), program, expect_changes=1)
    assert checked.changes[0].saved_macs == 36 * 4 * (27 + 9)
    assert all(n.meta["val"].shape[1] == 2 for n in checked.after.calls("aten.conv2d.default"))


def test_shared_weight_stays_for_its_other_reader_when_one_use_is_narrowed() -> None:
    def head(g: Grower, x: Node) -> list[Node]:
        weight = g.tensor(4, 4)
        first, second = (g.call(aten.linear.default, value, weight) for value in (x, g.call(aten.relu.default, x)))
        return [g.call(aten.slice.Tensor, first, 2, 0, 1), g.call(aten.sum.dim_IntList, second, [1])]

    checked = check_pass(NarrowToDemand(), with_head(seed_program((5, 4)), head), expect_changes=1)
    assert checked.changes[0].saved_parameters == -4, "the row that is read is stored a second time"


# -- near misses -------------------------------------------------------------------------------------------------------

WHOLE = "its value is also read whole, by {}"
CHEAP = "computing only the part that it reads saves no multiplication above it"


def of_linear(then: Head) -> Head:
    """A head on a linear, which would be worth narrowing."""
    return lambda g, x: then(g, g.call(aten.linear.default, x, g.tensor(6, 4)))


def by_input(g: Grower, x: Node) -> Node:
    row = g.call(aten.argmax.default, g.call(aten.select.int, x, 2, 0), 1)
    return g.call(aten.index.Tensor, x, [None, row])


def merged(g: Grower, x: Node) -> Node:
    flat = g.call(aten.reshape.default, x, [-1, 6])
    return g.call(aten.select.int, g.call(aten.reshape.default, g.call(aten.relu.default, flat), [-1, 5, 6]), 1, 0)


def squeezed_conv(g: Grower, x: Node) -> Node:
    image = g.call(aten.unsqueeze.default, x, 1)
    conv = g.call(aten.conv2d.default, image, g.tensor(2, 1, 3, 3), None, [1, 1], [1, 1])
    return g.call(aten.select.int, conv, 2, 0)


def grouped_conv(g: Grower, x: Node) -> Node:
    image = g.call(aten.unsqueeze.default, g.call(aten.slice.Tensor, x, 1, 0, 4), 2)
    conv = g.call(aten.conv2d.default, image, g.tensor(4, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], 2)
    return g.call(aten.select.int, conv, 1, 0)


NEAR: dict[str, tuple[Head, list[tuple[str, str]]]] = {
    "another reader needs all": (
        of_linear(lambda g, x: [select(g, x, 0), g.call(aten.mean.dim, x, [1])]), [("linear", WHOLE.format("mean"))],
    ),
    "it is also returned": (of_linear(lambda g, x: [select(g, x, 0), x]), [("linear", WHOLE.format("output"))]),
    "a softmax runs along the axis": (
        of_linear(lambda g, x: select(g, g.call(aten.softmax.int, x, 1), 0)),
        [("softmax", "softmax mixes the axis of which a part is read")],
    ),
    "a norm runs along the axis": (
        of_linear(lambda g, x: select(g, g.call(aten.layer_norm.default, x, [6]), 0, 2)),
        [("layer_norm", "layer_norm mixes the axis of which a part is read")],
    ),
    "tokens are rolled": (
        of_linear(lambda g, x: select(g, g.call(aten.roll.default, x, [1], [1]), 0)),
        [("roll", "roll mixes the axis of which a part is read")],
    ),
    "a reshape merges tokens and batch": (
        of_linear(merged), [("reshape", "a reshape merges the axis of which a part is read with another")],
    ),
    "a convolution reads neighbours": (squeezed_conv, [("conv2d", "the convolution reads neighbours")]),
    "a convolution has groups of several channels": (grouped_conv, [("conv2d", "it has groups")]),
    "what is read is padding": (
        of_linear(lambda g, x: cut(g, g.call(aten.constant_pad_nd.default, x, [0, 0, 1, 0]), 0, 2)),
        [("constant_pad_nd", "part of what is read is padding")],
    ),
    "the input decides which tokens are read": (
        of_linear(by_input), [("index", "which part is read is decided by the input")],
    ),
    "nothing is known about an operator": (
        of_linear(lambda g, x: select(g, g.call(aten.renorm.default, x, 2.0, 0, 1.0), 0)),
        [("renorm", "nothing is known about what renorm reads")],
    ),
    "only cheap operators lie above": (
        lambda g, x: select(g, g.call(aten.gelu.default, g.call(aten.layer_norm.default, x, [4])), 0),
        [("select", CHEAP)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_value_is_computed_whole_and_says_why_when(case: str) -> None:
    head, expected = NEAR[case]
    program = with_head(seed_program((5, 4)), head)
    assert [miss for miss in near_misses(NarrowToDemand(), program) if miss in expected] == expected
    checked = check_pass(NarrowToDemand(), program, expect_changes=0)
    assert expected[0][1] in {miss.reason for miss in checked.record.near_misses}


UNTOUCHED: dict[str, Head] = {
    "the mean of all tokens": lambda g, x: linear(g, g.call(aten.mean.dim, x, [1])),
    "all tokens": lambda g, x: linear(g, x),
    "two halves that make the whole": lambda g, x: g.call(
        aten.cat.default, [g.call(aten.neg.default, cut(g, x, 1, TOKENS)), cut(g, x, 0, 1)], 1
    ),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_nothing_matches_nor_nearly_when_the_head_reads(case: str) -> None:
    program = with_head(block(), UNTOUCHED[case])
    assert list(NarrowToDemand().find(program)) == []


# -- wrong rules are caught --------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, Head]] = {
    "a softmax along the axis": ("softmax.int", lambda g, x: select(g, g.call(aten.softmax.int, x, 1), 0)),
    "a roll along the axis": ("roll.default", lambda g, x: select(g, g.call(aten.roll.default, x, [1], [1]), 0)),
    "a flip of the axis": ("flip.default", lambda g, x: select(g, g.call(aten.flip.default, x, [1]), 0)),
    "a sum along the axis": ("cumsum.default", lambda g, x: select(g, g.call(aten.cumsum.default, x, 1), 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_gate_refuses_the_pass_when_a_rule_takes_rows_apart_that_are_mixed(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, head = WRONG[case]
    relu = demand_rules.RULES["aten.relu.default"]
    monkeypatch.setitem(demand_rules.RULES, f"aten.{name}", relu)  # type: ignore[arg-type]
    program = with_head(seed_program((5, 4)), of_linear(head))
    with pytest.raises(GateError):
        check_pass(NarrowToDemand(), program)
