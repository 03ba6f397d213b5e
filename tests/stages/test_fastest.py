"""``--precision auto`` and ``--tokens auto``: what is chosen, what never is, what is said. Latencies are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vlexport
from tests.stages.fragile import save_chain
from tests.token_models import PlainViT, drawn
from vlexport.core.bundle_schema import LatencyResult
from vlexport.core.config import BuildConfig
from vlexport.core.errors import VlexportError
from vlexport.core.trials import Trial
from vlexport.report.receipt import receipt
from vlexport.stages import candidates, fastest
from vlexport.stages.build import BuildResult, build
from vlexport.stages.candidates import Bench
from vlexport.stages.fastest import FastestOf, front
from vlexport.stages.profile import Measurable, Plan
from vlexport.targets.onnxruntime import OnnxRuntimeTarget


@pytest.fixture(scope="module", autouse=True)
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sessions without a child, a cache of this module's own, and a plain export that is not timed."""

    def open_here(self: OnnxRuntimeTarget, folder: Path, artifact: Any, *, threads: int = 0, **_: object) -> Any:
        return self.open_here(folder, artifact, threads=threads)

    alone = LatencyResult(p50_ms=1.0, load_ms=1.0, runs=5, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeTarget, "open", open_here)
        patch.setenv("VLEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("vlexport.stages.build.plain_export", lambda *_, **__: None)
        patch.setattr("vlexport.stages.build.measure_latency", lambda *_, **__: alone)
        yield


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chain(tmp_path_factory.mktemp("net"), 1, [], samples=200)


Clock = Callable[..., list[str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Makes latencies up, by the size of the artifact's weights: a half or a quarter of them are narrower numbers."""

    def set_to(fp16: float, int8: float, *, confirmed: float = 1.0) -> list[str]:
        asked: list[str] = []

        def speed(which: Measurable) -> tuple[str, float]:
            text = (which.folder / which.artifact.path).read_bytes()
            kind = "int8" if b"Quantize" in text else "fp16" if b"Cast" in text else "fp32"
            return kind, {"fp32": 1.0, "fp16": fp16, "int8": int8}[kind]

        def measure(ours: Measurable, _: object, *, baseline: Measurable, plan: Plan, **__: object) -> LatencyResult:
            (kind, mine), (other, theirs) = speed(ours), speed(baseline)
            asked.append(f"{kind}/{other}" + (" in full" if plan is fastest.CONFIRM else ""))
            ratio = mine / theirs * (confirmed if plan is fastest.CONFIRM else 1.0)
            figures = {"ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
            return LatencyResult(p50_ms=1.0, load_ms=1.0, runs=5, threads=1, **figures)

        monkeypatch.setattr(candidates, "measure_latency", measure)
        return asked

    return set_to


def made(net: Path, **given: Any) -> BuildResult:
    values = {"precision": "auto", "max_drop": 6.0, "threads": 1, "force": True, **given}
    places = {"model": "model.pt", "calib": "calib.npz", "data": "data.npz"}
    named = {name: str(net / file) for name, file in places.items() if values.get(name, "") is not None}
    return build(
        BuildConfig(**{**named, "output": str(net / "bundle"), **{k: v for k, v in values.items() if v is not None}})
    )


def test_integers_are_chosen_when_they_are_fastest_and_hold(net: Path, clock: Clock) -> None:
    asked = clock(fp16=0.9, int8=1.6)
    found = made(net)
    assert found.bundle.precision == "int8"
    assert asked == ["fp16/fp32", "int8/fp32", "int8/fp32 in full"]
    layers, precision = found.report.searches
    assert (layers.about, layers.adopted, precision.about) == ("layers", {}, "precision")
    assert precision.adopted == {"precision": "int8"}
    assert [trial.outcome for trial in precision.trials] == ["not faster", "faster"]
    assert found.report.samples == precision.confirming_samples > 0
    recipe = (found.output / "recipe.toml").read_text()
    assert 'precision = "int8"' in recipe
    assert "max_drop" not in recipe
    (line,) = (each for each in receipt(found.bundle, found.report, "b") if each.startswith("Tuned"))
    assert "precision: precision int8 of 2 candidates: faster, 1.60× (1.59 to 1.61), confirmed" in line


def test_ranges_of_each_run_are_tried_without_calibration_samples_and_made_as_a_build_makes_them(
    net: Path, clock: Clock
) -> None:
    clock(fp16=0.9, int8=1.6)
    found = made(net, calib=None, max_drop=9.0, options={"quantize.activations": "dynamic"})
    assert found.bundle.precision == "int8"
    assert found.report.searches[-1].adopted == {"precision": "int8"}
    assert "DynamicQuantizeMatMul" in found.bundle.compatibility["domains"], "fused, as without a search"


def test_option_that_measured_slower_is_not_chosen_and_is_said(net: Path, clock: Clock) -> None:
    clock(fp16=0.9, int8=0.8)
    found = made(net, options={"quantize.method": "min-max"}, max_drop=None, gate=("agreement>=90",))
    assert found.bundle.precision == "fp32"
    said = "none of 2 candidates is faster and holds the gates (precision fp16: not faster, 0.90×"
    assert said in found.report.searches[-1].said
    assert "quantize" not in (found.output / "recipe.toml").read_text()


class MadeUp:
    """Stands for a bench: candidates are 1.3 times as fast in quick rounds, and ``confirmed`` times in full ones."""

    def __init__(self, confirmed: float) -> None:
        self.confirmed = confirmed

    def make(self, options: object) -> Any:
        return None, SimpleNamespace(cost=SimpleNamespace(macs=10**9)), None

    def is_same(self, options: object, other: object) -> bool:
        return False

    def key(self, parts: object, what: str, names: object) -> dict[str, object]:
        return {"what": what, "confirmed": self.confirmed}

    def latency(self, options: object, against: object, plan: Plan) -> LatencyResult:
        ratio = self.confirmed if plan is fastest.CONFIRM else 1.3
        figures = {"ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
        return LatencyResult(p50_ms=1.0, load_ms=1.0, runs=5, threads=1, **figures)


@pytest.mark.parametrize(("confirmed", "kept", "said"), [
    (1.2, {"precision": "int8"}, "precision int8 of 1 candidate: faster, 1.20× (1.19 to 1.21), confirmed"),
    (0.9, {}, "the recipe stands: precision int8 was not confirmed: not faster, 0.90× (0.89 to 0.91)"),
])  # fmt: skip
def test_winner_is_kept_only_when_full_rounds_confirm_it(confirmed: float, kept: dict[str, str], said: str) -> None:
    bench: Any = MadeUp(confirmed)
    found = fastest.fastest(
        bench, "precision", [{"precision": "int8"}], None, time_all=False, budget_minutes=None, resume=False
    )
    assert (found.options, found.record.adopted, found.record.said) == (kept, kept, said)
    assert found.record.trials[0].figures == {"gmacs": 1.0}
    spent = fastest.fastest(
        bench, "precision", [{"precision": "fp16"}, {"precision": "int8"}], None, time_all=False, budget_minutes=1e-9,
        resume=False,
    )  # fmt: skip
    assert not spent.record.finished
    assert spent.record.said.endswith("; the budget ended the search, --resume goes on")


def test_precision_follows_the_profile_when_nothing_can_be_timed(net: Path, clock: Clock) -> None:
    asked = clock(fp16=9.0, int8=9.0)
    found = made(net, device_profile="cpu-x86-avx2", profile=False)
    assert (found.bundle.precision, asked, found.report.searches) == ("fp32", [], ())
    assert any("precision fp32 follows the device profile: " in note for note in found.report.notes)


def test_lossy_precisions_are_not_tried_when_no_gate_or_samples_say_what_they_may_cost(net: Path, clock: Clock) -> None:
    asked = clock(fp16=9.0, int8=9.0)
    found = made(net, max_drop=None, data=None)
    assert (found.bundle.precision, asked) == ("fp32", [])
    assert sum("no gate says how much accuracy it may cost" in note for note in found.report.notes) == 2
    found = made(net, calib=None)
    assert asked == ["fp16/fp32", "fp16/fp32 in full"]
    assert "int8 was not chosen: it needs calibration samples; add --calib DATA" in found.report.notes


@pytest.mark.parametrize(("given", "said"), [
    ({"max_drop": None, "data": None}, "takes the fastest that holds a gate on accuracy, and there is none"),
    ({"profile": False}, "--tokens auto chooses by latency: --no-profile forbids measuring"),
])  # fmt: skip
def test_search_for_tokens_is_refused_when_nothing_judges_it(given: dict[str, Any], said: str, net: Path) -> None:
    with pytest.raises(VlexportError) as error:
        made(net, precision=None, tokens="auto", **given)
    assert (error.value.code, error.value.exit_code, said in error.value.message) == ("VLX0805", 2, True)


def test_recipe_stands_when_a_model_has_no_tokens(net: Path, clock: Clock) -> None:
    asked = clock(fp16=1.0, int8=1.0)
    found = made(net, precision=None, tokens="auto")
    (record,) = found.report.searches
    assert {trial.outcome for trial in record.trials} == {"refused"}
    assert all(trial.reason.startswith("VLX0411: ") for trial in record.trials)
    assert (record.adopted, record.front, asked) == ({}, (), [])
    assert "tokens" not in (found.output / "recipe.toml").read_text()


def test_fastest_rate_that_holds_is_chosen_when_a_transformer_loses_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latencies follow the multiply-accumulates; a rate that the model is too small for is refused, and said."""
    model = PlainViT(side=16, patch=4, width=16, depth=2, heads=2)
    model.load_state_dict(drawn({name: v.shape for name, v in model.state_dict().items()}, "concentrated"))
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    vlexport.save(model.eval(), tmp_path / "model.pt", inputs={"image": images[:2]})
    np.savez(tmp_path / "data.npz", image=images.numpy())
    grid = ("evit:keep=0.3,layers=1", "tome:r=9")
    monkeypatch.setattr("vlexport.stages.searches.AUTO_GRID", grid)

    def latency(self: Bench, options: Any, against: Any, plan: Plan) -> LatencyResult:
        ratio = self.make(against)[1].cost.macs / self.make(options)[1].cost.macs
        figures = {"ratio": ratio, "ratio_low": ratio - 0.001, "ratio_high": ratio + 0.001}
        return LatencyResult(p50_ms=1.0, load_ms=1.0, runs=5, threads=1, **figures)

    monkeypatch.setattr(Bench, "latency", latency)
    found = made(
        tmp_path,
        precision=None,
        tokens="auto",
        max_drop=None,
        calib=None,
        gate=("agreement>=20",),
        numeric_gate=False,
    )
    (record,) = found.report.searches
    assert [trial.outcome for trial in record.trials] == ["faster", "refused"]
    assert "r=9 tokens cannot merge" in record.trials[1].reason
    assert record.adopted == {"tokens": grid[0]}
    assert record.front == (0,)
    assert f'tokens = "{grid[0]}"' in (found.output / "recipe.toml").read_text()
    assert "reduce-tokens" in [each.name for each in found.bundle.main.passes]
    assert "Search: tokens" in (found.output / "measured/local-1/report.html").read_text()


def trial(outcome: str, ratio: float | None, drop: float | None, name: str = "") -> Trial:
    figures = {} if drop is None else {"drop": drop}
    value = {"options": {"tokens": name}, "outcome": outcome, "ratio": ratio, "figures": figures}
    return Trial.model_validate({**value, "ratio_low": ratio, "ratio_high": ratio})


def test_front_holds_what_nothing_beats_in_both() -> None:
    found = [
        trial("faster", 1.2, 0.5), trial("fails", 1.5, 3.0), trial("faster", 1.1, 0.6), trial("refused", None, None),
        trial("not faster", 0.9, 0.2), trial("faster", 1.2, 0.5),
    ]  # fmt: skip
    assert front(found) == (1, 5, 0)


def test_fastest_that_holds_is_kept_when_others_fail() -> None:
    strategy = FastestOf(({"tokens": "a"}, {"tokens": "b"}, {"tokens": "c"}))
    trials = [trial("fails", 2.0, 9.0, "a"), trial("faster", 1.2, 0.1, "b")]
    assert strategy.propose(trials) == {"tokens": "c"}
    trials.append(trial("faster", 1.4, 0.2, "c"))
    assert strategy.propose(trials) is None
    assert strategy.best(trials) == {"tokens": "c"}
    assert strategy.best(trials[:1]) == {}
