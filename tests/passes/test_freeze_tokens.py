"""freeze-tokens: what it freezes, what it refuses, and what the numeric gate makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, check_golden
from vlexport.core.errors import CapabilityError, DataError, UsageError, VlexportError
from vlexport.core.numerics import relative_error
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, text
from vlexport.passes.base import Match, NearMiss
from vlexport.passes.canonicalize import Canonicalize
from vlexport.passes.freeze_tokens import TOLERANCE, FreezeTokens, FreezeTokensOptions
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import make_probes
from vlexport.passes.tokens.counts import at_percentile

TOKENS, WIDTH = 12, 8
Choose = Callable[[Tensor, Tensor], Tensor]
DYNAMIC = ("aten.nonzero.default", "aten.masked_select.default", "aten.index.Tensor", "aten.where.default")


class Pruner(nn.Module):
    """A score a token, a selection by it, attention over what is left, and a mean."""

    def __init__(self, choose: Choose, *, pool: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choose, self.pool = choose, pool or (lambda x: x.mean(1))
        self.score, self.qkv, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.choose(x, self.score(x)[..., 0])
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH)
        return self.head(self.pool(x + mixed))


SPELLINGS: dict[str, Choose] = {
    "mask of a row": lambda x, s: x[:, s[0] > 0],
    "mask of the batch": lambda x, s: x[s > 0].unsqueeze(0),
    "nonzero": lambda x, s: x.index_select(1, (s[0] > 0).nonzero().flatten()),
    "nonzero as a tuple": lambda x, s: x[:, (s[0] > 0).nonzero(as_tuple=True)[0]],
    "where of one argument": lambda x, s: x[:, torch.where(s[0] > 0)[0]],
    "masked_select": lambda x, s: x.masked_select((s > 0).unsqueeze(-1)).reshape(1, -1, WIDTH),
    "gather": lambda x, s: x.gather(1, (s[0] > 0).nonzero().reshape(1, -1, 1).expand(-1, -1, WIDTH)),
    "behind a class token": lambda x, s: torch.cat([x[:, :1], x[:, 1:][:, s[0, 1:] > 0]], 1),
    "cumulated": lambda x, s: x[:, s[0].softmax(0).cumsum(0) < 0.9],
    "repeat_interleave": lambda x, s: x.repeat_interleave((s[0] > 0).long(), 1),
}


def sample(seed: int) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


SAMPLES = [(sample(seed),) for seed in range(20)]
ROW = SPELLINGS["mask of a row"]


@functools.cache
def program_of(name: str) -> Program:
    """Captured once; passes never change it."""
    return captured(Pruner(SPELLINGS[name]), sample(0), dynamic=False)


def refused(choose: Choose, **options: Any) -> tuple[str, Program]:
    program = captured(Pruner(choose, **options), sample(0), dynamic=False)
    found = list(FreezeTokens().find(program))
    assert len(found) == 1
    assert isinstance(found[0], NearMiss)
    return found[0].reason, program


def frozen(program: Program, *, samples: Any = SAMPLES, **options: Any) -> Program:
    options.setdefault("percentile", 100)
    if "macs" in options:
        del options["percentile"]
    return run_pass(FreezeTokens(FreezeTokensOptions(**options), samples=samples), program, gate=None)[0]


def counts(program: Program) -> list[int]:
    """Tokens that the dynamic model keeps of each sample."""
    found = []
    score = Pruner(ROW).score
    for (x,) in SAMPLES:
        with torch.no_grad():
            found.append(int((score(x)[0, :, 0] > 0).sum()))
    return found


@pytest.mark.parametrize("name", SPELLINGS)
def test_frozen_equals_the_dynamic_model_when_all_tokens_find_a_place(name: str) -> None:
    program, model = program_of(name), Pruner(SPELLINGS[name]).eval()
    after = frozen(program, batch=8)
    assert not after.calls(*DYNAMIC)
    assert "u0" not in text(after)
    with torch.no_grad():
        wanted = torch.cat([model(x) for (x,) in SAMPLES[:8]])
    found = after.run(torch.cat([x for (x,) in SAMPLES[:8]]))[0]
    assert relative_error(found.numpy(), wanted.numpy()) <= TOLERANCE


@pytest.mark.parametrize("batch", [8, "dynamic"])
def test_attention_keeps_rank_4_when_its_heads_were_split_with_the_one_sample_behind_them(batch: int | str) -> None:
    def pool(x: Tensor) -> Tensor:
        q = x.reshape(-1, 2, WIDTH // 2, 1).permute(3, 1, 0, 2)  # as merge-layout writes nn.MultiheadAttention
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(1, -1, WIDTH).mean(1)

    model = Pruner(ROW, pool=pool).eval()
    after = frozen(captured(model, sample(0), dynamic=False), batch=batch)
    attentions = after.calls("aten.scaled_dot_product_attention.default")
    assert [node.meta["val"].dim() for node in attentions] == [4, 4], "ONNX has no attention of rank 5"
    with torch.no_grad():
        wanted = torch.cat([model(x) for (x,) in SAMPLES[:8]])
    assert relative_error(after.run(torch.cat([x for (x,) in SAMPLES[:8]]))[0].numpy(), wanted.numpy()) <= TOLERANCE


def test_batch_is_dynamic_when_that_is_asked_for() -> None:
    after = frozen(program_of("mask of a row"), batch="dynamic")
    model = Pruner(ROW).eval()
    assert after.signature.inputs[0].shape == ("batch", TOKENS, WIDTH)
    for size in (1, 2, 8):
        rows = [x for (x,) in SAMPLES[:size]]
        with torch.no_grad():
            wanted = torch.cat([model(x) for x in rows])
        assert relative_error(after.run(torch.cat(rows))[0].numpy(), wanted.numpy()) <= TOLERANCE


def test_number_of_tokens_is_that_of_the_live_ones_when_it_is_computed_with() -> None:
    model = Pruner(ROW, pool=lambda x: x.sum(1) / x.shape[1] + x.shape[1]).eval()
    after = frozen(captured(model, sample(0), dynamic=False), batch=8)
    with torch.no_grad():
        wanted = torch.cat([model(x) for (x,) in SAMPLES[:8]])
    assert relative_error(after.run(torch.cat([x for (x,) in SAMPLES[:8]]))[0].numpy(), wanted.numpy()) <= TOLERANCE


def infinite_in_attention(x: Tensor) -> Tensor:
    far = x / x.softmax(1)
    return F.scaled_dot_product_attention(x, x, far).mean(1)


NOT_FINITE_AT_FREE_PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "log 0 in a product": lambda x: (x.softmax(1).transpose(1, 2) @ x.softmax(1).log()).mean(1),
    "x / 0 in a product": lambda x: ((x @ x.transpose(1, 2)).softmax(-1) @ (x / x.softmax(1))).mean(1),
    "x / 0 in an attention": infinite_in_attention,
}


@pytest.mark.parametrize("name", NOT_FINITE_AT_FREE_PLACES)
def test_infinity_at_free_places_is_left_out_by_more_than_a_weight_of_zero(name: str) -> None:
    model = Pruner(ROW, pool=NOT_FINITE_AT_FREE_PLACES[name]).eval()
    after = frozen(captured(model, sample(0), dynamic=False), batch=8)
    with torch.no_grad():
        wanted = torch.cat([model(x) for (x,) in SAMPLES[:8]])
    assert relative_error(after.run(torch.cat([x for (x,) in SAMPLES[:8]]))[0].numpy(), wanted.numpy()) <= TOLERANCE


def test_answer_is_finite_when_all_tokens_but_the_one_cut_off_are_gone() -> None:
    model = Pruner(lambda x, s: x[:, s[0] > 0][:, 1:]).eval()
    after = frozen(captured(model, aimed(3), dynamic=False), samples=[(aimed(4),)])
    assert after.run(aimed(1))[0].isfinite().all()
    with torch.no_grad():
        assert relative_error(after.run(aimed(3))[0].numpy(), model(aimed(3)).numpy()) <= TOLERANCE


class Indexed(nn.Module):
    """Tokens that an input names, of those that a mask left."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return x[:, x[0, :, 0] > 0][:, places[0]].sum(1)


def test_negative_places_count_from_the_last_live_token() -> None:
    model, places = Indexed().eval(), torch.tensor([[-1, 0]])
    rows = [(x, places) for (x,) in SAMPLES]
    program = captured(model, rows[0], dynamic=False)
    after = frozen(program, samples=rows, batch=8)
    wanted = torch.cat([model(*row) for row in rows[:8]])
    found = after.run(torch.cat([x for (x,) in SAMPLES[:8]]), places.expand(8, 2))[0]
    assert relative_error(found.numpy(), wanted.numpy()) <= TOLERANCE


def test_text_is_golden() -> None:
    check_golden("freeze_tokens", text(frozen(program_of("mask of a row"), percentile=75)))


def test_selections_are_matches_and_a_second_run_changes_nothing() -> None:
    program = program_of("behind a class token")
    assert [type(each) for each in FreezeTokens().find(program)] == [Match]
    after = frozen(program)
    applied = FreezeTokens(samples=SAMPLES)
    again = after.copy()
    assert applied.run(again) == ([], [])
    assert fingerprint(again) == fingerprint(after)
    assert applied.run(program.copy(), limit=0) == ([], [])


def test_canonical_spellings_are_frozen_alike() -> None:
    program = run_pass(Canonicalize(), program_of("masked_select"), gate=None)[0]
    x = SAMPLES[3][0]
    assert relative_error(frozen(program).run(x)[0].numpy(), program.run(x)[0].numpy()) <= TOLERANCE


def test_samples_beyond_the_places_lose_their_lowest_scores_and_say_how_many() -> None:
    program, kept = program_of("mask of a row"), counts(program_of("mask of a row"))
    places = at_percentile(kept, 50)
    after = frozen(program, percentile=50, overflow="output", batch=len(SAMPLES))
    found, truncated = after.run(torch.cat([x for (x,) in SAMPLES]))
    assert after.signature.outputs[-1].name == "truncated_tokens"
    assert truncated.tolist() == [max(count - places, 0) for count in kept]
    assert max(truncated.tolist()) > 0
    model = Pruner(ROW).eval()

    def best(x: Tensor, s: Tensor) -> Tensor:
        chosen = s[0].topk(min(places, int((s[0] > 0).sum()))).indices.sort().values
        return x[:, chosen]

    with torch.no_grad():
        pruned = Pruner(best).eval()
        wanted = torch.cat([(pruned if over else model)(x) for (x,), over in zip(SAMPLES, truncated, strict=True)])
    assert relative_error(found.numpy(), wanted.numpy()) <= TOLERANCE


def test_the_first_tokens_stay_when_the_key_is_their_order() -> None:
    program, kept = program_of("mask of a row"), counts(program_of("mask of a row"))
    row = kept.index(max(kept))
    after = frozen(program, percentile=50, key="order")
    places = max(2, at_percentile(kept, 50))
    pruned = Pruner(lambda x, s: x[:, (s[0] > 0).nonzero().flatten()[:places]]).eval()
    with torch.no_grad():
        wanted = pruned(SAMPLES[row][0])
    assert relative_error(after.run(SAMPLES[row][0])[0].numpy(), wanted.numpy()) <= TOLERANCE


def aimed(live: int) -> Tensor:
    """A sample of which so many tokens survive."""
    score = Pruner(ROW).score
    with torch.no_grad():
        x = sample(99)
        away = score.weight / score.weight.norm()
        x = x - (score(x) / score.weight.norm()) * away  # on the border
        return x + torch.where(torch.arange(TOKENS)[None, :, None] < live, 1.0, -1.0) * away


def test_one_survivor_is_exact_and_none_gives_a_finite_answer() -> None:
    after, model = frozen(program_of("mask of a row")), Pruner(ROW).eval()
    with torch.no_grad():
        assert relative_error(after.run(aimed(1))[0].numpy(), model(aimed(1)).numpy()) <= TOLERANCE
        with pytest.raises(RuntimeError, match="u0 >= 1"):
            program_of("mask of a row").run(aimed(0))
        first = model.head(model.pool(after_attention(model, aimed(0)[:, :1])))
    assert relative_error(after.run(aimed(0))[0].numpy(), first.numpy()) <= TOLERANCE


def after_attention(model: Pruner, x: Tensor) -> Tensor:
    """One token attends to itself."""
    return x + model.qkv(x)[..., 2 * WIDTH :]


def test_budget_of_macs_is_kept_to_and_used() -> None:
    program = program_of("mask of a row")
    full, least = cost(frozen(program)).macs, cost(frozen(program, percentile=1)).macs
    budget = (full + least) / 2
    assert least <= cost(frozen(program, macs=budget / 1e9)).macs <= budget
    with pytest.raises(UsageError, match="cannot be kept"):
        frozen(program, macs=1e-9)


def test_percentile_takes_counts_that_occur() -> None:
    assert [at_percentile([5, 1, 3, 2], p) for p in (1, 25, 26, 75, 100)] == [1, 1, 2, 3, 5]


def test_gate_sets_aside_samples_beyond_the_places_and_judges_the_others() -> None:
    program = program_of("mask of a row")
    probes = make_probes(program, calibration=SAMPLES[1], seed=0)
    applied = FreezeTokens(FreezeTokensOptions(percentile=10, overflow="output"), samples=SAMPLES)
    _, record = run_pass(applied, program, gate=NumericGate(program, probes))
    assert record.gate.proof == "statistic"
    assert 0 < record.gate.set_aside < record.gate.probes
    assert record.gate.value is not None
    assert record.gate.value <= TOLERANCE


def test_gate_judges_a_freeze_to_a_larger_batch_by_its_first_sample() -> None:
    program = program_of("mask of a row")
    probes = make_probes(program, calibration=SAMPLES[1], seed=0)
    applied = FreezeTokens(FreezeTokensOptions(percentile=100, batch=4), samples=SAMPLES)
    after, record = run_pass(applied, program, gate=NumericGate(program, probes))
    assert after.signature.inputs[0].shape[0] == 4
    assert record.gate.value is not None
    assert record.gate.value <= TOLERANCE


def test_gate_refuses_a_freeze_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("mask of a row")
    applied = FreezeTokens(FreezeTokensOptions(percentile=100), samples=SAMPLES)
    right = FreezeTokens.run

    def wrong(self: FreezeTokens, ir: Program, *, limit: int | None = None) -> Any:
        made = right(self, ir, limit=limit)
        attention = ir.calls("aten.scaled_dot_product_attention.default")[0]
        attention.args = attention.args[:3]  # padding takes part
        return made

    monkeypatch.setattr(FreezeTokens, "run", wrong)
    with pytest.raises(VlexportError, match="VLX0401"):
        run_pass(applied, program, gate=NumericGate(program, make_probes(program, calibration=SAMPLES[1], seed=0)))


def test_noise_that_the_model_itself_refuses_is_no_probe() -> None:
    program = captured(Pruner(lambda x, s: x[:, x[0, :, 0] > 2.5]), sample(0) + 5.0, dynamic=False)
    assert [probe.name for probe in make_probes(program, calibration=None, seed=0)] == ["example"]


REFUSED: dict[str, tuple[Choose, Callable[[Tensor], Tensor] | None, str]] = {
    "unique": (lambda x, s: x[:, torch.unique((s[0] * 3).long().clamp(0, 5))], None, "by more than a mask"),
    "last token": (ROW, lambda x: x[:, -1], "reads token -1"),
    "convolution": (ROW, lambda x: F.avg_pool1d(x.transpose(1, 2), 1).mean(2), "avg_pool1d mixes the tokens"),
    "variance": (ROW, lambda x: x.var(1), "no rule is known for var"),
    "root of the count": (ROW, lambda x: x.sum(1) * x.shape[1] ** -0.5, "computes with the number of tokens"),
    "filled with the count": (ROW, lambda x: x.mean(1) + torch.full((WIDTH,), x.shape[1]), "computes with the number"),
    "counted down": (
        ROW,
        lambda x: (x * torch.arange(x.shape[1], 0, -1)[None, :, None]).sum(1),
        "depend on the number of tokens",
    ),
    "sort": (ROW, lambda x: x.sort(1).values.mean(1), "no rule is known for sort over tokens"),
    "fixed mask": (lambda x, s: x[:, torch.arange(TOKENS).remainder(2).nonzero().flatten()], None, "does not depend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_a_near_miss_and_an_error_when_a_freeze_is_asked_for(name: str) -> None:
    choose, pool, wanted = REFUSED[name]
    reason, program = refused(choose, pool=pool)
    assert wanted in reason
    with pytest.raises(CapabilityError, match="VLX0412"):
        FreezeTokens(samples=SAMPLES).run(program.copy())


class Tokens(Pruner):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.choose(x, self.score(x)[..., 0]))


def test_output_of_one_row_a_token_is_refused() -> None:
    program = captured(Tokens(ROW), sample(0), dynamic=False)
    assert [m.reason for m in FreezeTokens().find(program)] == [  # type: ignore[union-attr]
        "an output holds one value a token, and how many there are is decided by the data"
    ]


def test_model_saved_with_a_dynamic_batch_is_refused_with_what_to_do() -> None:
    program = captured(Pruner(ROW), sample(0))
    (miss,) = FreezeTokens().find(program)
    assert isinstance(miss, NearMiss)
    assert "vlexport.save(…, dynamic=False)" in miss.reason


def test_bad_input_has_one_clear_message_each() -> None:
    program = program_of("mask of a row")
    with pytest.raises(DataError, match="VLX0216") as none:
        FreezeTokens().run(program.copy())
    assert "--calib" in none.value.hint
    broken = SAMPLES[1][0].clone()
    broken[0, 3, 3] = float("nan")
    with pytest.raises(DataError, match="calibration sample 2 holds NaN"):
        FreezeTokens(samples=[SAMPLES[0], (broken,)]).run(program.copy())
    with pytest.raises(DataError, match="loses all its tokens"):
        FreezeTokens(samples=[(aimed(0),)]).run(program.copy())
    with pytest.raises(DataError, match="sample 1 does not run"):
        FreezeTokens(samples=[(sample(0)[..., :5],)]).run(program.copy())
    plain = captured(nn.Linear(WIDTH, 2), sample(0))
    with pytest.raises(UsageError, match="VLX0413"):
        FreezeTokens(samples=SAMPLES).run(plain.copy())
    with pytest.raises(ValueError, match="leave one of the two out"):
        FreezeTokensOptions(percentile=90, macs=1.0)


def test_zero_survivors_are_counted_in_calibration() -> None:
    program = program_of("mask of a row")
    after = frozen(program, samples=[*SAMPLES, (aimed(0),)])
    assert fingerprint(after) == fingerprint(frozen(program))
