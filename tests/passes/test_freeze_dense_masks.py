"""freeze-tokens on models that multiply tokens by a mask and take none away: A-ViT, and masks that are made once."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.harness import captured, check_golden, one_thread
from tests.token_models import AViT, drawn, images
from vlexport.core.errors import CapabilityError
from vlexport.core.numerics import relative_error
from vlexport.ir import provenance
from vlexport.ir.cost import cost
from vlexport.ir.program import Program
from vlexport.ir.text import fingerprint, text
from vlexport.passes import pass_class
from vlexport.passes.base import Match, NearMiss
from vlexport.passes.freeze_tokens import TOLERANCE, FreezeTokens, FreezeTokensOptions
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pass
from vlexport.passes.probes import make_probes
from vlexport.passes.tokens.dense_masks import candidates
from vlexport.passes.tokens.left_out import LeftOut, token_axis
from vlexport.passes.tokens.narrowing import READ
from vlexport.targets.onnx.lower import onnx_from_program

TOKENS, WIDTH = 12, 8
OPSET = 20
RAISED = ("canonicalize", "raise-attention", "merge-duplicates")
"""Behind these an attention with a mask is one operator, and equal comparisons are one call."""
FORMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "as written": ("additive", "class", ()),
    "filled and averaged": ("fill", "mean", ()),
    "raised": ("additive", "mean", RAISED),
}
"""Name → how A-ViT hides tokens, what it classifies, and the passes in front."""


def halting(hide: str, pool: str, **given: float) -> nn.Module:
    model: Any = AViT(side=24, patch=4, width=16, heads=2, classes=5, depth=3, hide=hide, pool=pool, **given).eval()
    model.load_state_dict(drawn({k: v.shape for k, v in model.state_dict().items()}, "concentrated"))
    return model


IMAGES = images("concentrated", 16, 24, 4)
ROWS = [(IMAGES[i : i + 1],) for i in range(len(IMAGES))]


@functools.cache
def program_of(form: str) -> Program:
    """Captured once; freezing works on a copy."""
    hide, pool, passes = FORMS[form]
    with one_thread():
        program = captured(halting(hide, pool), IMAGES[:1], dynamic=False)
    for name in passes:
        pass_class(name)().run(program)
    return program


def frozen(program: Program, samples: Any = ROWS, **options: Any) -> Program:
    given = FreezeTokensOptions(**{"percentile": 100, "batch": "dynamic", **options})
    after = program.copy()
    with one_thread():
        FreezeTokens(given, samples=samples).run(after)
    return after


@functools.cache
def frozen_of(form: str) -> Program:
    return frozen(program_of(form))


def agree(after: Program, model: nn.Module, x: Tensor) -> bool:
    with torch.inference_mode():
        return relative_error(after.run(x)[0].numpy(), model(x).numpy()) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_frozen_a_vit_equals_eager_when_the_batch_varies(form: str) -> None:
    model = halting(*FORMS[form][:2])
    assert all(agree(frozen_of(form), model, IMAGES[:batch]) for batch in (1, 2, 8, 16))


@pytest.mark.parametrize("form", FORMS)
def test_each_mask_takes_more_away_and_macs_fall(form: str) -> None:
    program, after = program_of(form), frozen_of(form)
    found = list(FreezeTokens().find(program))
    assert [type(each) for each in found] == [Match, Match], "behind the first two of three blocks"
    kept = [int(node.args[1]) for node in after.calls("aten.topk.default")]
    assert 37 > kept[0] > kept[1] >= 2
    assert cost(after).macs < 0.8 * cost(program).macs


def test_samples_lose_tokens_of_the_highest_halting_score_when_there_are_too_many() -> None:
    after = frozen(program_of("as written"), percentile=50, overflow="output")
    found, truncated = after.run(IMAGES)
    assert found.isfinite().all()
    assert int(truncated.max()) > 0
    whole = (truncated == 0).nonzero().flatten()
    assert 2 <= len(whole) < len(IMAGES)
    with torch.inference_mode():
        wanted = halting("additive", "class")(IMAGES)
    assert relative_error(found[whole].numpy(), wanted[whole].numpy()) <= TOLERANCE


def test_a_sample_that_halts_altogether_is_computed_as_eager_does() -> None:
    model = halting("additive", "class", beta=60.0)
    program = captured(model, IMAGES[:1], dynamic=False)
    after = frozen(program)
    assert [node.args[1] for node in after.calls("aten.topk.default")] == [2, 2]
    assert agree(after, model, IMAGES[:8])


def test_gate_judges_a_freeze_of_dense_masks() -> None:
    program = program_of("raised")
    probes = make_probes(program, calibration=ROWS[1], seed=0)
    applied = FreezeTokens(FreezeTokensOptions(percentile=50), samples=ROWS)
    after, record = run_pass(applied, program, gate=NumericGate(program, probes))
    assert record.gate.proof == "statistic"
    assert record.gate.value is not None
    assert record.gate.value <= TOLERANCE
    again = after.copy()
    assert applied.run(again) == ([], [])
    assert fingerprint(again) == fingerprint(after)


def test_artifact_holds_nothing_hostile_when_the_runtime_has_loaded_it(tmp_path: Path) -> None:
    program = frozen_of("raised").copy()
    for name in ("canonicalize", "eliminate-dead"):
        pass_class(name)().run(program)
    onnx_ir.save(onnx_from_program(program, opset=OPSET), tmp_path / "main.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "main.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "loaded.onnx").graph
    counts = Counter(node.op_type for node in graph.node)
    assert not {"NonZero", "ScatterElements", "ScatterND", "GatherND", "Unique", "Compress", "If"} & counts.keys()
    assert counts["TopK"] == 2
    constants = {each.name for each in graph.initializer}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "TopK")
    for batch in (1, 8):
        (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:batch].numpy()})
        with torch.inference_mode():
            wanted = halting("additive", "mean")(IMAGES[:batch])
        assert relative_error(found, wanted.numpy()) <= TOLERANCE


def require_true_bounds(program: Program, samples: Any) -> int:
    """Every bound that is known of rows left out holds in a run; gives how many were looked at."""
    looked = 0
    for mask in candidates(program):
        left_out, axis = LeftOut(program, mask), token_axis(mask)
        for values in samples:
            seen: dict[Any, Any] = {}
            program.run(*values, observe=seen.__setitem__)
            gone = (seen[mask].reshape(-1) == 0).nonzero().flatten()
            for node, value in seen.items():
                for along, bounds in left_out.known(node).items() if isinstance(value, Tensor) else ():
                    rows = value if along is None else value.index_select(along, gone)
                    if rows.numel() and not bounds.drowned:
                        assert float(rows.min()) >= bounds.low - 1e-5, (mask, node, axis)
                        assert float(rows.max()) <= bounds.high + 1e-5, (mask, node, axis)
                        looked += bounds.constant is not None
    return looked


@pytest.mark.parametrize("form", FORMS)
def test_what_is_known_of_left_out_rows_is_so_in_a_run(form: str) -> None:
    assert require_true_bounds(program_of(form), ROWS[:3]) > 50


# -- one mask ---------------------------------------------------------------------------------------------------------

Keep = Callable[[Tensor], Tensor]
Read = Callable[[Tensor, Tensor], Tensor]


class Once(nn.Module):
    """A score a token, a mask of it, one attention under it, and something that reads the tokens."""

    def __init__(self, keep: Keep, read: Read, *, hide: bool = True, zero: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keep, self.read, self.hide, self.zero = keep, read, hide, zero
        self.score, self.qkv, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.keep(self.score(x)[..., 0])
        if self.zero:
            x = x * mask.unsqueeze(-1)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * WIDTH**-0.5
        if self.hide:
            scores = scores.masked_fill((mask == 0)[:, None], -math.inf)
        return self.head(self.read(x + scores.softmax(-1) @ v, mask))


def above(score: Tensor) -> Tensor:
    return (score > 0).to(score.dtype)


def class_stays(score: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(score[:, :1]), above(score[:, 1:])], 1)


def mean_of_live(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def class_token(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, 0]


def tokens(count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(1, TOKENS, WIDTH, generator=generator),) for _ in range(count)]


SAMPLES = tokens(12)
FROZEN: dict[str, tuple[Keep, Read]] = {
    "sum over live ones": (above, mean_of_live),
    "the class token stays": (class_stays, class_token),
    "low scores stay": (lambda s: (s <= 0.1).to(s.dtype), mean_of_live),
    "two masks as one": (lambda s: above(s + 0.4) * (s < 0.6).to(s.dtype), mean_of_live),
    "the largest": (above, lambda x, m: (x * m.unsqueeze(-1)).amax(1)),
    "all rows, zeros with them": (above, lambda x, m: (x * m.unsqueeze(-1)).mean(1)),
}


@pytest.mark.parametrize("name", FROZEN)
def test_mask_made_once_becomes_a_selection(name: str) -> None:
    model = Once(*FROZEN[name]).eval()
    program = captured(model, SAMPLES[0][0], dynamic=False)
    after = frozen(program, SAMPLES)
    assert cost(after).macs < cost(program).macs
    (top,) = after.calls("aten.topk.default")
    assert top.args[1] < TOKENS
    assert all(agree(after, model, torch.cat([x for (x,) in SAMPLES[:batch]])) for batch in (1, 2, 8))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_that_meet_one_stored_matrix_each_are_frozen(batch: int) -> None:
    model = OwnWeights().eval()
    program = captured(model, SAMPLES[0][0], dynamic=False)
    after = frozen(program, SAMPLES, batch=batch)
    assert cost(after).macs < batch * cost(program).macs
    assert agree(after, model, torch.cat([x for (x,) in SAMPLES[:batch]]))


def test_pooled_keys_become_a_selection_when_one_token_always_stays() -> None:
    model = Raw(key_live, pooled=True, keep=class_stays).eval()
    after = frozen(captured(model, SAMPLES[0][0], dynamic=False), SAMPLES)
    none_else = SAMPLES[0][0] - 9 * torch.nn.functional.normalize(model.score.weight, dim=-1)
    assert all(agree(after, model, x) for x in (SAMPLES[0][0], none_else))


def test_call_that_no_batch_can_take_is_refused_for_a_batch_alone() -> None:
    model = Once(above, lambda x, m: (x * m.unsqueeze(-1)).flip(1).cumsum(1).mean(1)).eval()
    program = captured(model, SAMPLES[0][0], dynamic=False)
    assert agree(frozen(program, SAMPLES, batch=1), model, SAMPLES[0][0])
    with pytest.raises(CapabilityError, match="no rule is known for flip"):
        frozen(program, SAMPLES, batch=2)


def test_text_is_golden() -> None:
    program = captured(Once(above, mean_of_live).eval(), SAMPLES[0][0], dynamic=False)
    check_golden("freeze_dense_masks", text(frozen(program, SAMPLES, batch=2)))


def test_nothing_is_known_of_rows_behind_a_reduction_over_everything() -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = (x[..., 0] > 0).to(x.dtype)
            return (x * mask.unsqueeze(-1)).amax((), keepdim=True)

    program = captured(Largest().eval(), SAMPLES[0][0], dynamic=False)
    (mask,) = program.calls("aten.gt.Scalar")
    assert LeftOut(program, mask).at(program.results[0], 1).constant is None


class Twice(Once):
    """A second mask that is not computed from the first."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (above(self.score(x)[..., 0] + shift) for shift in (0.1, -0.1))
        once = self.qkv(x * first.unsqueeze(-1)) * first.unsqueeze(-1)
        again = self.qkv(x * second.unsqueeze(-1)) * second.unsqueeze(-1)
        return self.head((once + again)[..., :WIDTH].sum(1))


class Raw(Once):
    """Keys of zeroed tokens, queries and values of all of them, under a bias made from the mask."""

    def __init__(self, bias: Callable[[Tensor], Tensor], *, pooled: bool = False, keep: Keep = above) -> None:
        super().__init__(keep, lambda x, m: x.mean(1))
        self.bias, self.pooled = bias, pooled
        self.wanted = nn.Parameter(torch.randn(1, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.keep(self.score(x)[..., 0])
        q, _, v = self.qkv(x).chunk(3, -1)
        k = self.qkv(x * mask.unsqueeze(-1))[..., WIDTH : 2 * WIDTH]
        scores = (self.wanted if self.pooled else q) @ k.transpose(1, 2) + self.bias(mask)
        return self.head((scores.softmax(-1) @ v).mean(1))


def both_live(mask: Tensor) -> Tensor:
    return (1 - mask[:, :, None] * mask[:, None]) * -1e4


def key_live(mask: Tensor) -> Tensor:
    return (1 - mask)[:, None] * -1e4


class OwnWeights(Once):
    """Every token has a matrix of its own."""

    def __init__(self) -> None:
        super().__init__(above, class_token)
        self.own = nn.Parameter(torch.randn(TOKENS, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.keep(self.score(x)[..., 0]).unsqueeze(-1)
        x = (self.qkv(x * mask)[..., None, :WIDTH] @ self.own)[:, :, 0]
        return self.head((x * mask).sum(1))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "no key is live for a left out query": (Raw(both_live), READ),
    "nor where the first token stays": (Raw(both_live, keep=class_stays), READ),
    "a sample may have no live key": (Raw(key_live, pooled=True), "attends to all of them"),
    "what hides is taken back": (Raw(lambda m: key_live(m) - key_live(m) + 0 * m[:, None]), "softmax gives weight"),
    "all rows are averaged": (Once(above, lambda x, m: x.mean(1)), READ),
    "attention is open": (Once(above, mean_of_live, hide=False), "its softmax gives weight to tokens"),
    "the first row is read": (Once(above, class_token), "reads token 0"),
    "rows are an output": (Once(above, lambda x, m: x), READ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_left_out_rows_is_a_near_miss_with_its_line(name: str) -> None:
    model, wanted = REFUSED[name]
    program = captured(model.eval(), SAMPLES[0][0], dynamic=False)
    before = fingerprint(program)
    (miss,) = FreezeTokens().find(program)
    assert isinstance(miss, NearMiss)
    assert wanted in miss.reason
    assert "test_freeze_dense_masks.py:" in provenance.describe(miss.node)
    with pytest.raises(CapabilityError, match="VLX0412"):
        FreezeTokens(samples=SAMPLES).run(program)
    assert fingerprint(program) == before


def test_mask_that_may_bring_tokens_back_is_refused_and_the_first_one_kept() -> None:
    model = Twice(above, class_token).eval()
    program = captured(model, SAMPLES[0][0], dynamic=False)
    first, second = FreezeTokens().find(program)
    assert isinstance(first, Match)
    assert isinstance(second, NearMiss)
    assert "may keep a token that an earlier one left out" in second.reason
    assert require_true_bounds(program, SAMPLES[:3]) > 10


def test_nothing_is_found_when_no_mask_silences_what_is_multiplied() -> None:
    relu = Once(lambda s: s, lambda x, m: (x * (x > 0).to(x.dtype)).sum(1), hide=False, zero=False)
    assert list(FreezeTokens().find(captured(relu.eval(), SAMPLES[0][0], dynamic=False))) == []
