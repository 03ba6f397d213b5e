"""The account: which modules are expected to become one operator, which did, and why the others did not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import vlexport
from tests.harness import captured, randomize
from vlexport.core.account import Account, Missing, whole_account
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import (
    ChangeSummary,
    Component,
    GateRecord,
    NearMissRecord,
    PassRecord,
    canonical_json,
    plain_json,
)
from vlexport.core.config import BuildConfig
from vlexport.frontends.sources import open_sources
from vlexport.ir import provenance
from vlexport.ir.program import Program
from vlexport.passes.base import Change, Match, NearMiss, Pass, Stage
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.merge_duplicates import MergeDuplicates
from vlexport.passes.pipeline import run_pipeline
from vlexport.passes.reparameterize import Reparameterize
from vlexport.report.figures import account_phrase, missing_phrase, shortfall_phrase
from vlexport.stages.account import Refusals, accounts, fusion_accounts
from vlexport.stages.plan import plan

WIDTH = 8


class SpelledAttention(nn.Module):
    """Softmax of a product, in a module of its own as many models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.softmax = nn.Linear(WIDTH, 3 * WIDTH), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.softmax(q @ k.transpose(1, 2)) @ v


class FusedAttention(SpelledAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class GatedAttention(nn.Module):
    """Called attention, and no attention over keys: there is nothing to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).softmax(1)


class AttentionBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class SpelledRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class FrozenBatchNorm(nn.Module):
    """A scale and a shift: nothing in it is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SpelledGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2


class GEGLU(nn.Module):
    """Named as an activation, and has layers: its gelu is called, and is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * nn.functional.gelu(self.gate(x))


class RaiseAttentionNot(Pass[Program]):
    """Says of every softmax, and of every layer, why not."""

    name: ClassVar[str] = "raise-attention"
    stage: ClassVar[Stage] = "raise"

    def find(self, ir: Program) -> Iterator[Match | NearMiss]:
        for node in ir.calls("aten.softmax.int"):
            yield NearMiss("attention", node, f"softmax of {provenance.module_path(node).split('.')[0]}")
        for node in ir.calls("aten.linear.default"):
            if "4" in provenance.module_path(node):
                yield NearMiss("attention", node, "it is a layer")

    def apply(self, ir: Program, match: Match) -> Change:
        raise NotImplementedError


def tokens() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def told(net: nn.Module, *passes: Pass[Program]) -> dict[str, Account]:
    source = captured(randomize(net), tokens())
    refusals = Refusals()
    after, _ = run_pipeline(source, [Canonicalize(), *passes], gate=None, listener=refusals)
    return {each.idea: each for each in accounts(source, after, refusals)}


def test_attention_is_found_when_one_operator_computes_it() -> None:
    net = nn.Sequential(AttentionBlock(FusedAttention()), AttentionBlock(SpelledAttention()))
    found = told(net)["attention"]
    assert (found.expected, found.found, found.fates) == (2, 1, {"scaled_dot_product_attention": 1})
    reason = "spelled with matmul, softmax, in a way that no pass knows"
    assert found.missing == (Missing(of="SpelledAttention", reason=reason, modules=("1.attn",)),)


def test_attention_is_expected_by_what_a_module_holds_when_its_name_says_nothing() -> None:
    class Mixer(SpelledAttention):
        pass

    assert told(nn.Sequential(Mixer()))["attention"].expected == 1
    assert told(Mixer())["attention"].missing[0].modules == ("",), "the root itself"
    assert "attention" not in told(nn.Sequential(GatedAttention()))


def test_attention_is_still_missing_when_a_second_one_beside_it_was_found() -> None:
    class Both(SpelledAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return super().forward(nn.functional.scaled_dot_product_attention(q, k, v))

    found = told(nn.Sequential(Both()))["attention"]
    assert (found.expected, found.found) == (1, 0)


def test_product_with_a_stored_table_is_no_attention_when_beside_a_softmax() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Parameter(torch.ones(WIDTH, 3)), nn.Parameter(torch.ones(3, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(torch.matmul(x, self.table).softmax(-1), self.other)

    assert "attention" not in told(nn.Sequential(Lookup()))


def test_every_module_has_its_own_reason_when_a_record_keeps_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlexport.passes.pipeline._MAX_NEAR_MISSES", 2)
    source = captured(randomize(nn.Sequential(*[AttentionBlock(SpelledAttention()) for _ in range(5)])), tokens())
    refusals = Refusals()
    after, (record,) = run_pipeline(source, [RaiseAttentionNot()], gate=None, listener=refusals)
    assert len(record.near_misses) == 2
    (found, *_) = accounts(source, after, refusals)
    said = {path: each.reason for each in found.missing for path in each.modules}
    assert said == {
        "0.attn": "softmax of 0", "1.attn": "softmax of 1", "2.attn": "softmax of 2", "3.attn": "softmax of 3",
        "4.attn": "softmax of 4; it is a layer",
    }  # fmt: skip


def test_norms_have_the_fate_of_what_they_became_when_counted() -> None:
    net = nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Unflatten(1, (5, 1)), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.BatchNorm2d(5), nn.Flatten(1, 2), SpelledRMSNorm(), FrozenBatchNorm(),
    )  # fmt: skip
    found = told(net, Reparameterize())["norm"]
    assert (found.expected, found.found) == (4, 3)
    assert found.fates == {"layer_norm": 1, "folded into conv2d": 1, "batch_norm": 1}
    assert found.missing[0].of == "SpelledRMSNorm"
    assert found.missing[0].reason.startswith("spelled with mul, pow, mean, add, rsqrt,")


def test_activations_count_as_modules_when_functions_lie_beyond() -> None:
    gelu = nn.GELU()
    found = told(nn.Sequential(gelu, nn.SiLU(), gelu, GEGLU(), QuickGELU(), SpelledGELU(), nn.ReLU()))["activation"]
    assert (found.expected, found.found, found.beyond) == (5, 4, 1)
    assert found.fates == {"gelu": 2, "silu": 1, "quick_gelu": 1}, "the last has no operator, and one spelling"
    reason = "spelled with div, erf, add, mul, in a way that no pass knows"
    assert found.missing == (Missing(of="SpelledGELU", reason=reason, modules=("5",)),)


def test_module_is_found_when_another_computes_the_same() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.GELU(), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    found = told(Twice(), MergeDuplicates())["activation"]
    assert (found.expected, found.fates, found.missing) == (2, {"gelu": 2}, ())


def test_module_is_found_when_no_output_needs_it_after_the_passes() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.GELU(), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.one(x), self.other(x)), 1)[:, :5]

    source = captured(Halves(), tokens())
    after = source.copy()
    after.replace(after.results[0], after.calls("aten.gelu.default")[0])
    (found,) = accounts(source, after, Refusals())
    assert (found.expected, found.fates, found.missing) == (2, {"gelu": 1, "unread": 1}, ())


def test_nothing_is_said_when_a_model_has_no_such_module() -> None:
    assert told(nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU())) == {}


# Where a node comes from


def test_modules_are_those_around_a_node_when_saved_and_opened(tmp_path: Path) -> None:
    net = nn.Sequential(AttentionBlock(FusedAttention()), nn.GELU()).eval()
    source = captured(net, tokens())
    vlexport.save(net, tmp_path / "m.pt", inputs=tokens())
    opened = open_sources(BuildConfig(model=str(tmp_path / "m.pt"))).components["main"].program
    for program in (source, opened):
        (linear,) = program.calls("aten.linear.default")
        assert [path for path, _ in provenance.modules(linear)] == ["", "0", "0.attn", "0.attn.qkv"]
        assert [kind.rpartition(".")[2] for _, kind in provenance.modules(linear)] == [
            "Sequential", "AttentionBlock", "FusedAttention", "Linear",
        ]  # fmt: skip
        assert [provenance.modules(node)[-1][0] for node in program.calls("aten.gelu.default")] == ["1"]
        assert all(provenance.modules(n)[-1][0] == provenance.module_path(n) for n in program.calls() if n.args)


# What is shown of it


COMPLETE = Account(idea="norm", expected=3, found=3, fates={"layer_norm": 2, "folded into conv2d": 1})
SHORT = Account(
    idea="attention", expected=4, found=1, fates={"scaled_dot_product_attention": 1}, beyond=2,
    missing=(
        Missing(of="XCA", reason="attention over channels", modules=("a", "b")),
        Missing(of="Mix", reason="spelled out", modules=("",)),
    ),
)  # fmt: skip


def test_receipt_has_a_phrase_only_when_something_is_missing() -> None:
    assert shortfall_phrase(()) == ""
    assert shortfall_phrase((COMPLETE,)) == ""
    assert shortfall_phrase((COMPLETE, SHORT)) == (
        "3 of 4 attention modules did not become one operator: XCA at a and 1 more: attention over channels "
        "(and 1 more reason in the report)"
    )
    assert account_phrase(COMPLETE) == "norm: 3 of 3 modules became one operator (layer_norm 2, folded into conv2d 1)"
    assert account_phrase(SHORT).endswith("(scaled_dot_product_attention 1); 2 more in no such module")
    assert missing_phrase(SHORT.missing[1]) == "Mix at the root: spelled out"


def test_whole_names_the_component_when_there_are_several() -> None:
    assert whole_account({"main": (SHORT,)}) == (SHORT,)
    norm, attention = whole_account({"text": (COMPLETE,), "image": (COMPLETE, SHORT)})
    assert (norm.expected, norm.found, norm.fates) == (6, 6, {"layer_norm": 4, "folded into conv2d": 2})
    assert [each.modules for each in attention.missing] == [("image.a", "image.b"), ("image.",)]
    assert attention.beyond == 2


def test_component_is_written_without_an_account_when_it_has_none(built: Path) -> None:
    component = read_bundle(built).main
    assert component.account == (Account(idea="norm", expected=1, found=1, fates={"folded into conv2d": 1}),)
    assert Component.model_validate(plain_json(component)) == component
    bare = component.model_copy(update={"account": ()})
    assert "account" not in canonical_json(plain_json(bare))
    assert Component.model_validate(plain_json(bare)) == bare


@pytest.fixture(scope="module")
def attention_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = randomize(nn.Sequential(AttentionBlock(SpelledAttention()), GEGLU(), SpelledGELU()))
    path = tmp_path_factory.mktemp("attention") / "m.pt"
    vlexport.save(net, path, inputs=tokens())
    return path


def test_plan_tells_of_modules_when_asked(attention_file: Path, monkeypatch: Any) -> None:
    passes = [Canonicalize(), RaiseAttentionNot()]
    monkeypatch.setattr("vlexport.stages.plan.component_passes", lambda *_: passes)
    found = plan(BuildConfig(model=str(attention_file), output=str(attention_file.parent / "b")))
    assert [(each.idea, each.expected, each.found) for each in found.account] == [
        ("attention", 1, 0), ("activation", 1, 0),
    ]  # fmt: skip
    assert found.account[0].missing[0].reason == "softmax of 0"


def lowered_record(name: str, count: int, *reasons: tuple[str, str]) -> PassRecord:
    what = ChangeSummary(
        what="attention as one operator", count=count, where=(), saved_nodes=0, saved_parameters=0, saved_macs=0
    )
    return PassRecord(
        name=name, stage="legalize", effect="exact", options={},
        changes=(what,) if count else (),
        near_misses=tuple(NearMissRecord(pattern="", node=node, reason=why) for node, why in reasons),
        gate=GateRecord(worst=0.0, proof="identical", probes=2),
    )  # fmt: skip


def test_attention_that_the_runtime_has_in_some_layers_only_is_told_with_the_reason() -> None:
    left = ("Softmax in blocks.2.attn (node_7)", "a mask or bias is added to the scores")
    first = lowered_record(
        "fuse-qattention", 2, left, ("Softmax in blocks.3.attn (n)", "its weight is not in integers")
    )
    (found,) = fusion_accounts([first, lowered_record("fuse-attention", 1, left), lowered_record("optimize-onnx", 9)])
    assert (found.expected, found.found, found.fates) == (4, 3, {"QAttention": 2, "Attention": 1})
    assert shortfall_phrase([found]) == (
        "1 of 4 fused attention modules did not become one operator: "
        "softmax at blocks.2.attn: a mask or bias is added to the scores"
    )


def test_nothing_is_told_of_fused_attention_when_there_is_none_or_nobody_looked() -> None:
    assert fusion_accounts([lowered_record("optimize-onnx", 9)]) == ()
    assert fusion_accounts([lowered_record("fuse-attention", 0)]) == ()
