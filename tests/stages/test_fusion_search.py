"""``--autotune`` over fusions: each the other way round, kept where faster, replayed unmeasured. Times are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlexport
from tests.token_models import PlainViT, drawn
from vlexport.core.bundle_schema import LatencyResult
from vlexport.core.config import BuildConfig, read_recipe
from vlexport.stages import candidates, tune
from vlexport.stages.build import BuildResult, build
from vlexport.stages.plan import plan
from vlexport.stages.profile import Measurable, Plan
from vlexport.targets.onnxruntime import OnnxRuntimeTarget

FUSED, BIASED = "onnxruntime.fuse_attention", "onnxruntime.fuse_biased_attention"
SEVERAL = "onnxruntime.fuse_multi_head_attention"
Built = Callable[..., BuildResult]
ALONE = {"p50_ms": 1.0, "load_ms": 1.0, "runs": 5, "threads": 1}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pairs that were timed; an artifact with an operator of ONNX Runtime's own is 1.5 times as fast."""
    pairs: list[str] = []

    def measure(ours: Measurable, _: object, *, baseline: Measurable, plan: Plan, **__: object) -> LatencyResult:
        fused = [b"com.microsoft" in (each.folder / each.artifact.path).read_bytes() for each in (ours, baseline)]
        pairs.append("/".join("fused" if each else "plain" for each in fused))
        ratio = 1.5 ** (fused[0] - fused[1])
        return LatencyResult(**ALONE, ratio=ratio, ratio_low=ratio - 0.01, ratio_high=ratio + 0.01)

    def same(*_: object, **__: object) -> LatencyResult:
        return LatencyResult(**ALONE, ratio=1.0, ratio_low=0.99, ratio_high=1.01)

    monkeypatch.setattr(candidates, "measure_latency", measure)
    monkeypatch.setattr(tune, "measure_latency", same)
    return pairs


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """Builds a transformer of two blocks with a search of fusions and of one session option."""

    def open_here(self: OnnxRuntimeTarget, folder: Path, artifact: Any, *, threads: int = 0, **_: object) -> Any:
        return self.open_here(folder, artifact, threads=threads)

    monkeypatch.setattr(OnnxRuntimeTarget, "open", open_here)
    monkeypatch.setattr(OnnxRuntimeTarget, "tunables", lambda *_: {"graph_optimization": ("basic",)})
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vlexport.stages.build.plain_export", lambda *_, **__: None)
    monkeypatch.setattr("vlexport.stages.build.measure_latency", lambda *_, **__: LatencyResult(**ALONE))
    model = PlainViT(side=16, patch=4, width=16, depth=2, heads=2)
    model.load_state_dict(drawn({name: v.shape for name, v in model.state_dict().items()}, "concentrated"))
    vlexport.save(model.eval(), tmp_path / "model.pt", inputs={"image": torch.randn(2, 3, 16, 16)})

    def make(**given: Any) -> BuildResult:
        values = {"model": str(tmp_path / "model.pt"), "output": str(tmp_path / "bundle"), "threads": 1, "force": True}
        return build(BuildConfig(**{**values, "autotune": True, **given}))

    return make


def test_fusion_that_measured_faster_is_turned_on_and_replayed_without_measuring(
    built: Built, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlexport.targets.onnxruntime.is_worth_it", lambda *_: False)
    found = built(options={BIASED: "false", SEVERAL: "false"})
    (record,) = found.report.searches
    tried = {next(iter(each.options)).partition(".")[2]: (each.outcome, each.reason) for each in record.trials}
    same = ("not faster", "it changes nothing here")
    assert tried == {"fuse_qattention": same, "fuse_attention": ("faster", ""), "fuse_dynamic_linear": same}
    assert (record.about, record.adopted) == ("fusions", {FUSED: "true"})
    assert timed == ["fused/plain", "fused/plain"], "to choose and to confirm; the same files are not timed"
    assert "com.microsoft" in found.bundle.compatibility["domains"]
    recipe = read_recipe(found.output / "recipe.toml")
    assert (recipe["options"][FUSED], recipe.get("autotune", False)) == ("true", False)
    again = built(**{**recipe, "autotune": False})
    assert (again.bundle.digest, len(timed)) == (found.bundle.digest, 2)


def test_fusion_that_is_on_stays_when_it_measured_no_slower(
    built: Built, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlexport.targets.onnxruntime.is_worth_it", lambda *_: True)
    found = built(budget_minutes=10.0, options={SEVERAL: "false"})
    (record,) = found.report.searches
    tried = {key: each.outcome for each in record.trials for key in each.options}
    assert (tried[FUSED], record.adopted, timed) == ("not faster", {}, ["plain/fused"])
    assert "com.microsoft" in found.bundle.compatibility["domains"]


def test_plan_names_fusions_and_the_budget_is_one_for_all_searches(
    built: Built, timed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = built(budget_minutes=1e-9)
    (record,) = found.report.searches
    tuning = found.report.tuning
    assert tuning is not None
    assert (len(record.trials), record.finished, tuning.finished, timed) == (0, False, False, [])
    config = BuildConfig(model=str(tmp_path / "model.pt"), output=str(tmp_path / "other"), autotune=True)
    planned = plan(config).candidates
    assert {FUSED, BIASED, SEVERAL, "onnxruntime.graph_optimization"} <= planned.keys()
