"""reduce-tokens: equal to the authors' methods, true shapes behind every reduction, and what is refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import token_models
from tests.harness import captured, check_pass, near_misses, one_thread
from tests.token_models import PlainViT, drawn, images
from vlexport.core.errors import InputError, UsageError, VlexportError
from vlexport.core.numerics import relative_error
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.passes import pass_class
from vlexport.passes.pipeline import run_pipeline, verify
from vlexport.passes.reduce_tokens import ReduceTokens, ReduceTokensOptions
from vlexport.targets import open_target
from vlexport.targets.base import Brief

SIZES = {"side": 16, "patch": 4, "width": 16, "depth": 4, "heads": 2}
BEFORE = ("canonicalize", "fold-constants", "merge-duplicates", "raise-attention")
TOLERANCE = 1e-4
"""``max|a−b| / max|b|`` in float32, where a selection is the same; measured 7e-7."""


def raised(module: nn.Module, example: Tensor) -> Program:
    """What the pass meets in a build, as far as it matters here."""
    passes = [pass_class(name)() for name in BEFORE]
    program, _ = run_pipeline(captured(module, example), passes, gate=None)
    return program


def weighted(module: nn.Module, kind: str) -> nn.Module:
    module.load_state_dict(drawn({name: value.shape for name, value in module.state_dict().items()}, kind))
    return module.eval()


def reduced(program: Program, **options: Any) -> Program:
    """A reduced copy, checked to be well formed and to have saved what it says."""
    after = program.copy()
    changes, _ = ReduceTokens(ReduceTokensOptions(**options)).run(after)
    verify(after, made_by="reduce-tokens")
    assert sum(change.saved_macs for change in changes) == cost(program).macs - cost(after).macs
    return after


@pytest.fixture(scope="module")
def plain() -> dict[str, Program]:
    """Weights of every kind → a plain ViT of 64 patches, raised."""
    with one_thread():
        return {
            kind: raised(weighted(PlainViT(), kind), images(kind, 2, 32, 4))
            for kind in ("diffuse", "concentrated", "ties")
        }


@pytest.fixture(scope="module")
def small() -> Program:
    """A plain ViT of 16 patches, raised."""
    with one_thread():
        return raised(weighted(PlainViT(**SIZES), "concentrated"), torch.randn(2, 3, 16, 16))


REFERENCES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "evit": (lambda: token_models.EViT(fuse=True), {"method": "evit", "keep": 0.7, "layers": "2+3"}),
    "evit-dropping": (
        lambda: token_models.EViT(fuse=False),
        {"method": "evit", "keep": 0.7, "layers": "2+3", "fuse": False},
    ),
    "evit-counted": (
        lambda: Counted(layers=(1, 3)),
        {"method": "evit", "keep": 0.7, "layers": "1+3", "count": True},
    ),
    "evit-squeezed": (
        lambda: Squeezed(layers=(1, 3)),
        {"method": "evit", "keep": 0.7, "layers": "1+3", "squeeze": True},
    ),
    "tome": (token_models.ToMe, {"method": "tome", "r": "8"}),
    "tome-schedule": (lambda: token_models.ToMe(merged=(16, 4, 0, 2)), {"method": "tome", "r": "16+4+0+2"}),
    "tome-clamped": (lambda: token_models.ToMe(merged=(30, 30, 30, 30)), {"method": "tome", "r": "30"}),
    "mctf": (lambda: token_models.MCTF(merged=12), {"method": "mctf", "r": "12"}),
    "mctf-odd": (lambda: token_models.MCTF(merged=1), {"method": "mctf", "r": "1"}),
}
"""Name → what the authors' code computes, and the options for the same."""


@pytest.mark.parametrize("kind", ["diffuse", "concentrated"])
@pytest.mark.parametrize("name", REFERENCES)
def test_output_is_that_of_the_authors_model_when_weights_are_the_same(
    name: str, kind: str, plain: dict[str, Program]
) -> None:
    make, options = REFERENCES[name]
    reference = weighted(make(), kind)
    program = reduced(plain[kind], **options)
    for batch in (1, 2, 8):
        given_images = images(kind, batch, 32, 4, seed=batch)
        with torch.no_grad(), one_thread():
            wanted = reference(given_images)
            (found,) = program.run(given_images)
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE
        (dense,) = plain[kind].run(given_images)
        assert float((dense - wanted).abs().max() / wanted.abs().max()) > 10 * TOLERANCE, "the method does nothing"


@pytest.mark.parametrize("name", ["evit", "tome", "mctf"])
def test_output_is_finite_and_the_same_each_time_when_tokens_tie_exactly(name: str, plain: dict[str, Program]) -> None:
    program = reduced(plain["ties"], **REFERENCES[name][1])
    given_images = images("ties", 2, 32, 4)
    (first,), (second,) = program.run(given_images), program.run(given_images)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"method": "evit", "layers": "2+3"}, 2),
        ({"method": "evit", "layers": "1+4", "fuse": False}, 2),
        ({"method": "evit", "layers": "2", "squeeze": True}, 1),
        ({"method": "tome", "r": "3"}, 4),
        ({"method": "mctf", "r": "2"}, 3),
        ({"method": "random", "layers": "2", "keep": 0.5}, 1),
    ],
)
def test_pass_keeps_its_contract_when_a_method_runs(options: dict[str, Any], changes: int, small: Program) -> None:
    golden = "reduce_tokens" if options == {"method": "evit", "layers": "2+3"} else None
    loose = ReduceTokensOptions(**options, min_cosine=-1.0)
    check_pass(ReduceTokens(loose), small, expect_changes=changes, golden=golden, prefixes=2)


def test_random_choice_is_seeded_and_the_same_for_every_sample_when_asked(small: Program) -> None:
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    first, again, other = (reduced(small, method="random", layers="2", seed=seed).run(x)[0] for seed in (0, 0, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.allclose(first[0], first[1], atol=1e-6)


def test_importance_costs_less_than_three_percent_of_a_block_when_read_beside_attention(small: Program) -> None:
    """Of evit's own calls those that multiply are a single row of scores; the block multiplies 12·n·c² + 2·n²·c."""
    tokens, width = 17, SIZES["width"]
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    before = {node.name for node in small.calls("aten.matmul.default")}
    after = reduced(small, method="evit", layers="2")
    rows = [node for node in after.calls("aten.matmul.default") if node.name not in before]
    own = sum(
        node.meta["val"].shape[-1] * width * node.meta["val"].shape[-2] for node in rows if node.meta["val"].ndim > 3
    )
    assert 0 < own < 0.03 * block
    assert len(after.calls("aten.scaled_dot_product_attention.default")) == SIZES["depth"]


class Counted(token_models.EViT):
    """EViT whose fused token is the mean of what did not stay, and counts as many."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        size = torch.ones_like(x[..., :1])
        for layer, block in enumerate(self.blocks, 1):
            q, k, v = block.attn.parts(block.norm1(x))
            weights = block.attn.weights(q, k, size)
            x = x + block.attn.mix(weights, v)
            if layer in self.layers:
                score = weights[:, :, 0, 1:].mean(1) / size[:, 1:, 0]
                order = score.argsort(1, descending=True)[..., None] + 1
                kept = math.ceil(self.keep * score.shape[1])
                stay = torch.cat([torch.zeros_like(order[:, :1]), order[:, :kept]], 1)
                rest, counts = (each.gather(1, order[:, kept:].expand(-1, -1, each.shape[-1])) for each in (x, size))
                fused = (rest * counts).sum(1, True) / counts.sum(1, True)
                x = torch.cat([x.gather(1, stay.expand(-1, -1, x.shape[-1])), fused], 1)
                size = torch.cat([size.gather(1, stay), counts.sum(1, True)], 1)
            x = block.feed(x)
        return self.classify(x)


class Squeezed(token_models.EViT):
    """EViT whose patches that do not stay join, one after the other, the kept one that they are most like."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        size = torch.ones_like(x[..., :1])
        for layer, block in enumerate(self.blocks, 1):
            q, k, v = block.attn.parts(block.norm1(x))
            weights = block.attn.weights(q, k, size)
            x = x + block.attn.mix(weights, v)
            if layer in self.layers:
                pairs = [self.joined(*each) for each in zip(x, size, weights[:, :, 0].mean(1), strict=True)]
                x, size = (torch.stack(each) for each in zip(*pairs, strict=True))
            x = block.feed(x)
        return self.classify(x)

    def joined(self, x: Tensor, size: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of one sample: tokens ``[N, C]``, how many each stands for ``[N, 1]``, how much each is attended to."""
        order = (seen / size[:, 0])[1:].argsort(descending=True) + 1
        kept = order[: math.ceil(self.keep * len(order))].tolist()
        sums = {place: (x[place] * size[place], size[place]) for place in (0, *kept)}
        for place in order[len(kept) :].tolist():
            into = max(kept, key=lambda stays: float(torch.cosine_similarity(x[place], x[stays], 0)))
            sums[into] = sums[into][0] + x[place] * size[place], sums[into][1] + size[place]
        rows = [total / count for total, count in sums.values()]
        return torch.stack(rows), torch.stack([count for _, count in sums.values()])


HOSTILE = ("scatter", "nonzero", "sort", "index_put", "masked_select")


@pytest.mark.parametrize("method", ["evit", "tome", "mctf", "random"])
def test_no_hostile_operator_is_written_when_tokens_are_reduced(method: str, small: Program) -> None:
    rates = {"r": "2"} if method in ("tome", "mctf") else {"layers": "2+3"}
    after = reduced(small, method=method, **rates)
    assert [n for n in after.calls() if any(word in str(n.target) for word in HOSTILE)] == []


class Dense(PlainViT):
    """Every patch is given out, on its grid."""

    def classify(self, x: Tensor) -> Tensor:
        grid = self.head(self.norm(x)[:, 1:]).permute(0, 2, 1)
        return grid.reshape(-1, 10, 4, 4)


@pytest.fixture(scope="module")
def dense() -> Program:
    with one_thread():
        return raised(weighted(Dense(**SIZES), "concentrated"), torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    "options",
    [{"method": "evit", "layers": "2+3"}, {"method": "evit", "layers": "2+3", "squeeze": True},
     {"method": "tome", "r": "2"}, {"method": "mctf", "r": "2"}, {"method": "random", "layers": "2"}],
)  # fmt: skip
def test_every_patch_is_given_back_where_it_was_when_the_head_is_dense(options: dict[str, Any], dense: Program) -> None:
    after = reduced(dense, **options)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (found,), (wanted,) = after.run(x), dense.run(x)
    assert found.shape == wanted.shape
    near = nn.functional.cosine_similarity(found.flatten(2), wanted.flatten(2), dim=1)
    shuffled = nn.functional.cosine_similarity(found.flatten(2).roll(5, 2), wanted.flatten(2), dim=1)
    assert float(near.mean()) > float(shuffled.mean()) + 0.05, "patches are not where they were"


def test_merged_patches_share_their_value_when_given_back(dense: Program) -> None:
    """Two patches merge at the last layer: two of sixteen places hold the same values then, others their own."""
    (found,) = reduced(dense, method="tome", r="2", layers="4").run(torch.randn(1, 3, 16, 16))
    distinct = {tuple(row) for row in found.flatten(2)[0].T.tolist()}
    assert len(distinct) == 14


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "evit", "unmerge": False}, "it lays the tokens out as"),
        ({"method": "evit", "fuse": False}, "dropped tokens went nowhere"),
    ],
)
def test_dense_head_is_refused_in_words_when_tokens_cannot_be_given_back(
    options: dict[str, Any], said: str, dense: Program
) -> None:
    with pytest.raises(InputError) as caught:
        reduced(dense, layers="2", **options)
    assert caught.value.code == "VLX0411"
    assert said in caught.value.message


class Custom(nn.Module):
    """Blocks by hand, with what other models do differently."""

    def __init__(self, *, tokens: int = 16, stored: int = 1, rotary: bool = False, mask: bool = False) -> None:
        super().__init__()
        self.front = nn.Parameter(torch.randn(1, stored, 8)) if stored else None
        self.embed = nn.Linear(6, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.gamma = nn.Parameter(torch.randn(8))
        self.rotary = nn.Parameter(torch.randn(tokens + stored, 4)) if rotary else None
        self.mask = nn.Parameter(torch.randn(tokens + stored, tokens + stored)) if mask else None
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.front is not None:
            x = torch.cat([self.front.expand(x.shape[0], -1, -1), x], 1)
        for qkv in self.qkv:
            q, k, v = qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            if self.rotary is not None:
                q, k = q * self.rotary, k * self.rotary
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            x = x + self.gamma * mixed.permute(0, 2, 1, 3).flatten(2)
        return self.norm(x).mean(1)


class Windows(nn.Module):
    """Attention over windows of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 4, 8)
        q, k, v = self.qkv(windows).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).reshape(-1, 16, 8)
        return (x + mixed).mean(1)


def sequence(width: int = 6) -> Tensor:
    return torch.randn(2, 16, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("module", "example", "said"),
    [
        (Custom(rotary=True), sequence(), "it reads another value for each of the 17 tokens"),
        (Custom(mask=True), sequence(), "its attention has a mask"),
        (Windows(), sequence(8), "it lays the tokens out as"),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU()), sequence(), "the model has no attention over a residual stream"),
    ],
)
def test_model_is_refused_with_the_reason_when_it_has_no_tokens_to_reduce(
    module: nn.Module, example: Tensor, said: str
) -> None:
    program = raised(module.eval(), example)
    reasons = [reason for _, reason in near_misses(ReduceTokens(), program)]
    with pytest.raises(InputError) as caught:
        ReduceTokens().run(program)
    assert (caught.value.code, caught.value.exit_code) == ("VLX0411", 1)
    assert said in caught.value.message
    assert said in "; ".join(reasons) or not reasons


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "evit", "layers": "5"}, "there is no layer 5"),
        ({"method": "tome", "layers": "0"}, "there is no layer 0"),
        ({"method": "tome", "r": "9"}, "r=9 tokens cannot merge, there are 17"),
        ({"method": "mctf", "r": "8"}, "r=8 tokens cannot merge, there are 17"),
        ({"method": "tome", "r": "1+1+1+1+1"}, "r names 5 layers"),
        ({"method": "evit", "squeeze": True, "fuse": False}, "say two things"),
    ],
)
def test_rate_is_refused_in_words_when_the_model_does_not_have_it(
    options: dict[str, Any], said: str, small: Program
) -> None:
    with pytest.raises(UsageError) as caught:
        reduced(small, **options)
    assert (caught.value.code, caught.value.where) == ("VLX0703", "--tokens")
    assert said in caught.value.message


def test_class_token_is_missed_when_there_is_none() -> None:
    program = raised(Custom(stored=0).eval(), sequence())
    with pytest.raises(VlexportError, match="there is none; tome and mctf work without"):
        reduced(program, method="evit")
    assert reduced(program, method="tome", r="2").run(sequence())[0].shape == (2, 8)


@pytest.mark.parametrize(
    ("keep", "said"),
    [(1.0, "all 16 patch tokens stay"), (0.9, "one of 16 patch tokens would go, and come back as fused")],
)
def test_layer_says_so_when_nothing_is_left_to_do(keep: float, said: str, small: Program) -> None:
    changes, misses = ReduceTokens(ReduceTokensOptions(keep=keep)).run(small.copy())
    assert (changes, {miss.reason for miss in misses}) == ([], {said})


def expected_refusal(tokens: int, stored: int, method: str, rate: int) -> str:
    """What a rate or model is refused with, or nothing."""
    if method == "evit" and not stored:
        return "there is none"
    most = {"tome": tokens // 2, "mctf": min(tokens // 2, tokens + stored - 10)}
    return "cannot merge" if rate > most.get(method, rate) else ""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([(10, 0), (11, 1), (10, 3)]),
    st.sampled_from(["evit", "evit", "random", "random", "tome", "mctf"]),  # merging takes several times as long
    st.sampled_from([0, 1, 3, 4, 5, 7]),
    st.sampled_from(["", "fuse", "count", "squeeze"]),
)
def test_shapes_and_savings_hold_when_encoders_and_rates_are_any(
    shape: tuple[int, int], method: str, rate: int, how: str
) -> None:
    """Of any small encoder the reduced Program runs, says true sizes, and saves what it says."""
    judge(*shape, method, rate, how if method == "evit" else "")


@cache
def judge(tokens: int, stored: int, method: str, rate: int, how: str) -> None:
    """What was found right is not looked at again."""
    program = program_of(tokens, stored)
    options: dict[str, Any] = {"method": method, "fuse": bool(how), "count": how == "count"}
    options["squeeze"] = how == "squeeze"
    options |= {"r": str(rate)} if method in ("tome", "mctf") else {"keep": 0.1 + rate / 8, "layers": "1+2"}
    said = expected_refusal(tokens, stored, method, rate)
    if said:
        with pytest.raises(VlexportError, match=said):
            reduced(program, **options)
        return
    after = reduced(program, **options)
    true: list[bool] = []

    def look(node: torch.fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            true.append(after.sizes(node.meta["val"].shape, {"batch": 3}) == tuple(value.shape))

    with one_thread():
        (found,) = after.run(torch.randn(3, tokens, 6, generator=torch.Generator().manual_seed(rate)), observe=look)
    assert all(true)
    assert torch.isfinite(found).all()


@lru_cache(maxsize=8)
def program_of(tokens: int, stored: int) -> Program:
    torch.manual_seed(tokens + stored)
    with one_thread():
        return raised(Custom(tokens=tokens, stored=stored).eval(), torch.randn(2, tokens, 6))


class Tower(PlainViT):
    """Gives out its tokens without the class token, for a language model to read."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(x[:, 1:])


def test_patches_attended_to_most_are_given_out_in_order_when_the_method_is_cls() -> None:
    tower = weighted(Tower(**SIZES), "concentrated")
    with one_thread():
        program = raised(tower, torch.randn(2, 3, 16, 16))
        x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        options = ReduceTokensOptions(method="cls", keep=0.3, layers="2+4")
        after = check_pass(ReduceTokens(options), program, expect_changes=1).after
        (found,), (every,) = after.run(x), program.run(x)
        tokens, rows = tower.embed(x), []
        for block in tower.blocks:
            q, k, _ = block.attn.parts(block.norm1(tokens))
            rows.append(block.attn.weights(q, k)[:, :, 0, 1:].mean(1))
            tokens = block(tokens)
    kept = (rows[1] + rows[3]).topk(5, 1).indices.sort(1).values
    assert after.signature.outputs[0].shape == ("batch", 5, 10)
    assert torch.allclose(found, every.gather(1, kept[..., None].expand(-1, -1, 10)), atol=1e-5)


class GridTower(Tower):
    """Its head lays the patches out again."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(x[:, 1:]).transpose(1, 2).reshape(-1, 10, 4, 4)


def test_cls_is_refused_in_words_when_the_head_needs_all_patches() -> None:
    program = raised(GridTower(**SIZES).eval(), torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match="nothing gives them back") as caught:
        reduced(program, method="cls", keep=0.3)
    assert caught.value.code == "VLX0411"


def test_cls_is_refused_when_nothing_behind_the_encoder_reads_patches(small: Program) -> None:
    with pytest.raises(InputError, match="no output holds patch tokens"):
        reduced(small, method="cls")


@pytest.mark.parametrize("options", [{"method": "tome", "r": "2", "layers": "1"}, {"method": "mctf", "r": "2"}])
def test_artifact_computes_the_same_when_lowered_to_onnx(options: dict[str, Any], tmp_path: Path) -> None:
    """With tokens given back as well, at a batch that capture did not see."""
    shallow = weighted(Dense(**(SIZES | {"depth": 2})), "concentrated")
    with one_thread():
        program = reduced(raised(shallow, torch.randn(2, 3, 16, 16)), **options)
    target = open_target("onnxruntime")
    artifact = target.lower(program, tmp_path, Brief(target.Options(), threads=1))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    with target.open(tmp_path, artifact, threads=1) as session:
        (found,) = session.run({program.signature.inputs[0].name: x.numpy()}).values()
    (wanted,) = program.run(x)
    assert relative_error(found, wanted.numpy()) <= TOLERANCE
