"""raise-attention: every spelling becomes one call of the same value, and what is no attention stays and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from tests.attention_grammar import Mutation, Spelling, spelled, spellings
from tests.harness import captured, check_pass, near_misses, worst_error
from vlexport.ir.program import Program
from vlexport.ir.text import text
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.fold_constants import FoldConstants
from vlexport.passes.pipeline import run_pipeline, verify
from vlexport.passes.raise_attention import RaiseAttention

ATTENTION = "aten.scaled_dot_product_attention.default"
SOFTMAXES = ("aten.softmax.int", "aten._softmax.default")
LEAST = torch.finfo(torch.float32).min
EXACT = 1e-12
"""Relative, in float64: sums in another order."""
MUTATIONS: tuple[Mutation, ...] = (
    "softmax over heads", "softmax over queries", "map returned", "map multiplied", "heads mixed before",
    "heads mixed after", "keys not transposed", "not normalised", "scores squashed", "product returned",
)  # fmt: skip
quickly = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


def normal(module: nn.Module, *inputs: Tensor, dynamic: Any = False) -> Program:
    """As the pass gets it: in canonical form, constants folded."""
    return run_pipeline(captured(module, inputs, dynamic=dynamic), [Canonicalize(), FoldConstants()], gate=None)[0]


def in_float64(program: Program) -> Program:
    """To run only: the shapes and dtypes that are recorded stay as they were."""
    twin = program.copy()
    twin.tensors = {name: t.double() if t.is_floating_point() else t for name, t in twin.tensors.items()}
    return twin


def raised(source: Program) -> Program:
    """After the pass, with one change; equal in float64."""
    made = source.copy()
    changes, misses = RaiseAttention().run(made)
    assert (len(changes), misses) == (1, [])
    twins = [each.double() for each in (made, source)]
    assert worst_error(twins[0].run(*twins[0].example), twins[1].run(*twins[1].example)) <= EXACT
    return made


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the grammar -------------------------------------------------------------------------------------------------------


@settings(quickly, max_examples=200)
@given(spellings())
def test_every_spelling_becomes_one_call_of_the_same_value(how: Spelling) -> None:
    source = spelled(how).double() if how.double else spelled(how)
    raised = source.copy()
    changes, misses = RaiseAttention().run(raised)
    assert not misses
    assert len(changes) == len(raised.calls(ATTENTION)) == 1
    assert not raised.calls(*SOFTMAXES)
    verify(raised, made_by="raise-attention")
    call = raised.calls(ATTENTION)[0]
    assert [n.meta["val"].ndim for n in call.args[:3]] == [4, 4, 4]  # type: ignore[union-attr]
    again = raised.copy()
    assert not RaiseAttention().run(again)[0], "applied twice, it changes more"
    made, wanted = (in_float64(each).run(source.example[0].double()) for each in (raised, source))
    assert worst_error(made, wanted) <= EXACT


@settings(quickly, max_examples=80)
@given(spellings(mutations=MUTATIONS))
def test_nothing_is_raised_when_it_is_no_attention(how: Spelling) -> None:
    source = spelled(how)
    before = text(source)
    changes, misses = RaiseAttention().run(source)
    assert not changes
    assert text(source) == before
    assert [m.reason for m in misses] or how.mutation == "not normalised", "it says why"


# -- modules -----------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """Self-attention as many models write it; ``attend`` makes the values of the heads."""

    def __init__(self, attend: Callable[..., Tensor], *, heads: int = 2, **stored: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj, self.heads, self.attend = nn.Linear(8, 24), nn.Linear(8, 8), heads, attend
        for name, value in stored.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        made = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = made.unbind(0)
        return self.proj(self.attend(self, x, q, k, v).transpose(1, 2).reshape(batch, count, width))


def eager(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q * 4**-0.5 @ k.transpose(-2, -1)).softmax(-1), 0.1, m.training) @ v


def fused(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def with_mask(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda m, x, q, k, v: make(m, x, q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def masked_and_biased(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.7 + m.bias
    hidden = torch.ones(6, 6, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
SEEN = (tokens(6, 6) > 0) | torch.eye(6, dtype=torch.bool)
NOTHING = SEEN & (torch.arange(6) != 2)[:, None]


@pytest.mark.parametrize(
    ("attend", "stored", "shown"),
    [
        (eager, {}, ""),
        (with_mask(lambda m, x, s: s + m.bias), {"bias": tokens(2, 6, 6)}, ""),
        (with_mask(lambda m, x, s: s.masked_fill(~m.seen, -torch.inf)), {"seen": CAUSAL}, "is_causal=True"),
        (with_mask(lambda m, x, s: torch.where(m.seen, s, -1e9)), {"seen": CAUSAL}, "is_causal=True"),
        (with_mask(lambda m, x, s: s + m.m), {"m": (~CAUSAL) * -1e9}, "is_causal=True"),
        (with_mask(lambda m, x, s: s + m.m), {"m": torch.zeros(6, 6)}, ""),
        (with_mask(lambda m, x, s: s + m.m), {"m": (~CAUSAL) * -100.0}, ""),
        (with_mask(lambda m, x, s: s.masked_fill(~m.seen, -torch.inf)), {"seen": SEEN}, "%7"),
        (with_mask(lambda m, x, s: s * 3 * m.t), {"t": tokens(2, 1, 1)}, "scale=1.5"),
        (with_mask(lambda m, x, s: s + torch.where(x[:, None, None, :, 0] > 0, 0.0, -3.4e38)), {}, ""),
        (with_mask(lambda m, x, s: s.masked_fill(x[:, None, None, :, 0] > 0, -3.4e38)), {}, ""),
        (lambda m, x, q, k, v: F.scaled_dot_product_attention(q * 2, k, v, m.s), {"s": CAUSAL}, "is_causal=True"),
    ],
)  # fmt: skip
def test_mask_and_scale_have_one_form(attend: Any, stored: dict[str, Tensor], shown: str) -> None:
    made = raised(normal(Attend(attend, **stored), tokens(2, 6, 8)))
    (line,) = (each for each in text(made).splitlines() if "scaled_dot" in each)
    assert shown in line
    assert ("is_causal" in shown) == ("is_causal" in line)


def test_program_is_as_drawn_when_masks_are_mixed() -> None:
    module = Attend(masked_and_biased, bias=tokens(2, 6, 6))
    program = normal(module, tokens(2, 6, 8), dynamic=True)
    checked = check_pass(RaiseAttention(), program, expect_changes=1, golden="raise_attention")
    assert checked.changes[0].saved_macs == 0


def test_fused_and_eager_are_the_same_text_when_both_are_raised() -> None:
    program = normal(Attend(fused), tokens(2, 6, 8), dynamic=True)
    assert not list(RaiseAttention().find(program))
    assert text(raised(normal(Attend(eager), tokens(2, 6, 8), dynamic=True))) == text(program)


def test_one_head_without_a_batch_is_raised_when_all_is_of_rank_two() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.mm((torch.mm(x, x.t()) / 3).softmax(-1), x)

    made = raised(normal(Plain(), tokens(6, 8)))
    assert made.calls(ATTENTION)[0].meta["val"].shape == (1, 1, 6, 8)


def test_two_layers_are_raised_when_one_reads_the_other() -> None:
    checked = check_pass(
        RaiseAttention(), normal(nn.Sequential(Attend(eager), Attend(eager)), tokens(1, 6, 8)), expect_changes=2
    )
    assert [c.where for c in checked.changes] == [("0",), ("1",)]


# -- near misses -------------------------------------------------------------------------------------------------------


def channels(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(-2, -1) for each in (q, k, v))
    return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v).transpose(-2, -1)


def talking(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.linear((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1), m.mix).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


def talking_after(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return F.linear(weights.permute(0, 2, 3, 1), m.mix).permute(0, 3, 1, 2) @ v


def sinks(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(-2, -1), m.sink.expand(x.shape[0], 2, 6, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def cut(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.transpose(-2, -1) / 50) * 50).softmax(-1) @ v


def efficient(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.softmax(-2).transpose(-2, -1) @ v)


def shared(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v + weights.sum((-1, -2), keepdim=True)


NEAR: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], str]] = {
    "channels": (channels, {}, "it is attention over channels: the product sums over tokens"),
    "talking": (
        talking, {"mix": tokens(2, 2)},
        "a linear mixes the heads between the product of queries and keys and the softmax",
    ),
    "talking after": (
        talking_after, {"mix": tokens(2, 2)},
        "a linear mixes the heads between the softmax and the product with the values",
    ),
    "sinks": (sinks, {"sink": tokens(2, 1, 1)}, "a cat stands between the product of queries and keys and the softmax"),
    "soft cap": (cut, {}, "a tanh stands between the product of queries and keys and the softmax"),
    "efficient": (efficient, {}, "the scores are made by getitem, not by a product of queries and keys"),
    "shared": (
        shared, {},
        "the attention map is used by 1 other(s); computing it beside attention would cost 576 multiply-accumulates "
        "more",
    ),
    "gate after": (
        lambda m, x, q, k, v: ((q @ k.transpose(-2, -1)).softmax(-1) * m.g) @ v, {"g": tokens(6, 6)},
        "a mul stands between the softmax and the product with the values",
    ),
    "other axis": (
        lambda m, x, q, k, v: (q @ k.transpose(-2, -1)).softmax(1) @ v, {},
        "the softmax's axis is not that of the keys",
    ),
    "hidden row": (
        with_mask(lambda m, x, s: s.masked_fill(~m.seen, -torch.inf)), {"seen": NOTHING},
        "a mask hides all keys of a query: softmax gives no number there, attention gives 0",
    ),
    "hidden row, added": (
        with_mask(lambda m, x, s: s + m.m), {"m": torch.zeros(6, 6).masked_fill(~NOTHING, -torch.inf)},
        "a mask hides all keys of a query: softmax gives no number there, attention gives 0",
    ),
    "computed −inf": (
        with_mask(lambda m, x, s: s.masked_fill(x[:, None, None, :, 0] > 0, -torch.inf)), {},
        "a computed mask overwrites scores by -inf: where it hides all keys of a query, attention would give another "
        "value",
    ),
    "computed −inf, added": (
        with_mask(lambda m, x, s: s + torch.where(x[:, None, None, :, 0] > 0, 0.0, -torch.inf)), {},
        "a computed mask adds −inf: where it hides all keys, attention would give another value",
    ),
    "computed −inf, cut and scaled": (
        with_mask(
            lambda m, x, s: s + (torch.where(x.repeat(1, 2, 1)[:, None, None, :, 0] > 0, 0.0, -torch.inf) * 2)[..., :6]
        ), {},
        "a computed mask adds −inf: where it hides all keys, attention would give another value",
    ),
    "small fill": (
        with_mask(lambda m, x, s: s.masked_fill(~m.seen, -50.0)), {"seen": CAUSAL},
        "scores are overwritten by -50, which hides nothing for certain",
    ),
    "two that hide": (
        with_mask(lambda m, x, s: s.masked_fill(~m.seen, -torch.inf) + m.m),
        {"seen": CAUSAL, "m": torch.zeros(6, 6).masked_fill(~SEEN, -torch.inf)},
        "several masks hide places: together they may hide all keys of a query",
    ),
    "computed padding beside a stored mask": (
        with_mask(
            lambda m, x, s: s.masked_fill(~m.seen, -1e9).masked_fill(x[:, None, None, :, 0] > 0, LEAST)
        ), {"seen": CAUSAL},
        "several masks hide places: together they may hide all keys of a query",
    ),
    "computed padding over −inf": (
        with_mask(
            lambda m, x, s: s.masked_fill(~m.seen, -torch.inf).masked_fill(x[:, None, None, :, 0] > 0, LEAST)
        ), {"seen": CAUSAL},
        "several masks hide places: together they may hide all keys of a query",
    ),
    "two computed masks": (
        with_mask(
            lambda m, x, s: s.masked_fill(x[:, None, None, :, 0] > 0, LEAST)
            .masked_fill(x[:, None, :, None, 1] > 0, LEAST)
        ), {},
        "several masks hide places: together they may hide all keys of a query",
    ),
    "a bias that hides beside a fill": (
        with_mask(lambda m, x, s: (s + m.m).masked_fill(~m.seen, -1e9)),
        {"seen": CAUSAL, "m": tokens(6, 6) - 1e9 * torch.eye(6)},
        "several masks hide places: together they may hide all keys of a query",
    ),
    "negative scale": (
        with_mask(lambda m, x, s: s * -1.0), {}, "the scores are scaled by -0.5, of which exporters take the root"
    ),
    "factor of both": (
        with_mask(lambda m, x, s: s * m.f), {"f": tokens(6, 6)},
        "the scores are multiplied by a tensor that differs over queries and over keys",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_it_stays_and_says_why_when_attention_is_something_else(case: str) -> None:
    attend, stored, reason = NEAR[case]
    found = near_misses(RaiseAttention(), normal(Attend(attend, **stored), tokens(2, 6, 8)))
    assert [why for _, why in found] == [reason]


def test_softmax_stays_when_a_half_model_computes_it_in_single() -> None:
    def attend(m: Attend, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.half() for each in (q, k, v))
        return ((q @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32).half() @ v).float()

    found = near_misses(RaiseAttention(), normal(Attend(attend), tokens(2, 6, 8)))
    assert [why for _, why in found] == ["the softmax is computed in another dtype than the product with the values"]


def test_nothing_is_said_when_a_softmax_is_no_attention() -> None:
    assert not near_misses(RaiseAttention(), normal(nn.Sequential(nn.Linear(8, 3), nn.Softmax(-1)), tokens(2, 8)))
