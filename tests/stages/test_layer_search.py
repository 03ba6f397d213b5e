"""``--precision int8 --max-drop P``: three fragile nets, what is written down, interruption, and looking at layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stages.fragile import save_chain
from vlexport.cli.main import main
from vlexport.core.bundle import recorded_files
from vlexport.core.bundle_schema import Report
from vlexport.core.config import BuildConfig, config_from
from vlexport.core.errors import VlexportError
from vlexport.core.layer_record import LayerRecord, Layers, RangeRecord
from vlexport.report.layer_advice import suggestions
from vlexport.report.receipt import receipt
from vlexport.stages import candidates, make
from vlexport.stages.bisect import bisect
from vlexport.stages.build import BuildResult, build
from vlexport.stages.candidates import Bench, Judged
from vlexport.targets.onnxruntime import OnnxRuntimeTarget

PLAIN = {
    "quantize.method": "min-max", "quantize.smooth": "false", "quantize.equalize": "false", "quantize.tighten": "false",
    "quantize.correct_bias": "false",
}  # fmt: skip
"""The plainest ranges: nothing but the search is to save the net."""


@pytest.fixture(scope="module", autouse=True)
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sessions without a child, and a cache of this module's own."""

    def open_here(self: OnnxRuntimeTarget, folder: Path, artifact: Any, *, threads: int = 0, **_: object) -> Any:
        return self.open_here(folder, artifact, threads=threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeTarget, "open", open_here)
        patch.setenv("VLEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(folder: Path, output: str = "bundle", **given: Any) -> BuildConfig:
    values = {"precision": "int8", "max_drop": 8.0, "profile": False, "threads": 1, "options": PLAIN, "force": True}
    places = {"model": folder / "model.pt", "calib": folder / "calib.npz", "data": folder / "data.npz"}
    named = {name: str(place) for name, place in places.items()}
    return BuildConfig(**{**named, "output": str(folder / output), **values, **given})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chain(tmp_path_factory.mktemp("one"), 4, [3])


@pytest.fixture(scope="module")
def built(one: Path) -> BuildResult:
    return build(config(one))


def searched(report: Report) -> Any:
    (found,) = report.searches
    return found


def test_bad_layer_returns_to_float_when_one_is_bad(built: BuildResult) -> None:
    found = searched(built.report)
    assert (found.about, found.adopted, found.finished) == ("layers", {"quantize.keep": "layers.3"}, True)
    assert [trial.outcome for trial in found.trials] == ["wrong", "holds"]
    assert "costs more than it may" in found.trials[0].reason
    assert min(found.sensitivities, key=found.sensitivities.get) == "layers.3"
    assert found.sensitivities["layers.3"] < 5 < 25 < found.sensitivities["layers.0"]
    assert built.report.samples == found.confirming_samples
    assert built.report.verdicts[0].outcome == "pass"
    (line,) = (each for each in receipt(built.bundle, built.report, "b") if each.startswith("Tuned"))
    assert "layers: 4 of 5 layers in integers, layers.3 in float: drop " in line
    assert f"accuracy is that of the {found.confirming_samples} samples not chosen on" in line


def test_recipe_replays_the_same_bytes_and_searches_nothing(
    built: BuildResult, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = built.output / "recipe.toml"
    assert '"quantize.keep" = "layers.3"' in recipe.read_text()
    assert "drop<=8" in recipe.read_text()
    assert "max_drop" not in recipe.read_text()
    monkeypatch.setattr(Bench, "judge", None)
    monkeypatch.setattr("vlexport.stages.layer_search.ReturnLayers", None)
    given = {name: str(one / f"{name}.npz") for name in ("calib", "data")}
    again = config_from(
        {"model": str(one / "model.pt"), "output": str(one / "again"), "profile": False, **given}, recipe=recipe
    )
    made = build(again)
    assert made.report.searches == ()
    for name, _ in recorded_files(made.output):
        assert (made.output / name).read_bytes() == (built.output / name).read_bytes(), name


def test_a_tenth_returns_to_float_when_outliers_are_spread(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, 20, [4, 11], samples=160)
    found = searched(build(config(folder, max_drop=9.0)).report)
    assert found.adopted == {"quantize.keep": "layers.4,layers.11"}
    assert len(found.trials) <= 4


def test_build_is_refused_with_what_was_reached_when_every_layer_is_bad(tmp_path: Path) -> None:
    """The head, which alone would hold, is kept in float by hand."""
    folder = save_chain(tmp_path, 4, range(4))
    options = {**PLAIN, "quantize.keep": "head"}
    with pytest.raises(VlexportError) as error:
        build(config(folder, options=options))
    assert (error.value.code, error.value.exit_code) == ("VLX0811", 3)
    assert "drop<=8 holds with no share of the layers in integers: " in error.value.message
    assert "1 of 4 layers in integers" in error.value.message
    assert not (folder / "bundle").exists()


def test_layers_are_told_apart_by_draws_when_there_are_no_calibration_samples(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(bench: Bench, options: dict[str, str], samples: object) -> Judged:
        return Judged("holds" if "quantize.keep" in options else "fails", {}, ())

    monkeypatch.setattr(Bench, "judge", judge)
    found = searched(build(config(one, "drawn", calib=None, options={"quantize.activations": "dynamic"})).report)
    measured = found.sensitivities
    assert len(measured) == 5
    assert max(measured.values()) < 100, "each is heard at the outputs"
    assert found.adopted == {"quantize.keep": min(measured, key=measured.get)}


def test_graph_in_half_is_made_once_when_candidates_are_many(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    lowered: list[object] = []
    beside = make.with_fallback

    def counted(*given: Any, precision: str) -> Any:
        made.append(precision)
        return beside(*given, precision=precision)

    def judge(bench: Bench, options: dict[str, str], samples: object) -> Judged:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make, "lower_component", lambda *given, **_: lowered.append(given[3].fallback))
            bench.make(options)
        return Judged("holds" if options.get("quantize.keep", "").count(",") else "fails", {}, ())

    monkeypatch.setattr(Bench, "judge", judge)
    monkeypatch.setattr(make, "with_fallback", counted)
    options = {**PLAIN, "quantize.min_sqnr_db": "0", "tensorrt.engine": "off"}
    found = build(config(one, "beside", target="tensorrt", options=options))
    assert len(searched(found.report).trials) == len(lowered) == 3
    assert set(lowered) == {None}, "no candidate has one"
    assert made == ["fp16"]
    assert (found.output / "artifact" / "fallback.onnx").is_file()


def test_search_goes_on_where_it_was_when_interrupted(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = Bench.judge, list[dict[str, str]]()

    def stopping(self: Bench, options: Any, samples: Any) -> Any:
        asked.append(dict(options))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, options, samples)

    monkeypatch.setattr(Bench, "judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(config(one, seed=1))
    made = build(config(one, seed=1, resume=True))
    assert asked == [{}, {"quantize.keep": "layers.3"}, {"quantize.keep": "layers.3"}]  # the first one is not repeated
    assert searched(made.report).adopted == {"quantize.keep": "layers.3"}


def test_build_says_how_to_go_on_when_the_budget_is_spent(one: Path) -> None:
    with pytest.raises(VlexportError) as error:
        build(config(one, seed=2, budget_minutes=1e-9))
    assert (error.value.code, error.value.exit_code) == ("VLX0811", 3)
    assert "does not hold yet" in error.value.message
    assert "--resume" in error.value.hint


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"data": None}, "VLX0804", "gate drop<=8 needs a measurement that this build does not make"),
        (
            {"options": {"quantize.only": "layer.3"}},
            "VLX0703",
            "no module is called 'layer.3'; did you mean 'layers.3'?",
        ),
        ({"options": {"quantize.keep": "#999"}}, "VLX0703", "no call has the key '#999'"),
        (
            {"precision": "fp32", "resume": True, "options": {}},
            "VLX0805",
            "--resume without a search",
        ),
    ],
)
def test_build_is_refused_in_words_when_a_search_cannot_be_made(
    one: Path, given: dict[str, Any], code: str, said: str
) -> None:
    if given.get("data"):
        given = {**given, "data": str(one / given["data"])}
    with pytest.raises(VlexportError) as error:
        build(config(one, "refused", **given))
    assert (error.value.code, said in error.value.message) == (code, True), error.value.message


# Looking at layers


def test_layers_are_shown_with_suggestions_when_asked_for(
    built: BuildResult, one: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = build(config(one, "bare", max_drop=None, options={**PLAIN, "quantize.min_sqnr_db": "0"})).output
    assert main(["explain", str(bare), "--layers"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("Layers   5 compute with integers (scheme static-")
    assert "linear layers.3" in lines[1]
    advice = next(line for line in lines if line.startswith("Try "))
    assert "percentile instead of min-max on layers.3 input: outliers at " in advice
    assert main(["explain", str(bare), "--layers", "--json"]) == 0
    layers = json.loads(capfd.readouterr().out)["layers"]
    assert {sum(each["counts"]) > 0 for each in layers["ranges"]} == {True}
    assert main(["explain", str(built.output), "--layers"]) == 0
    assert "Try " not in capfd.readouterr().out


@pytest.mark.parametrize(("given", "said"), [
    ({"operands": ("7",), "weight": "int8"}, "compute with integers (scheme s, ranges by entropy)"),
    ({"operands": ("7",), "weight": "e4m3"}, "compute with float8 (scheme s, ranges by entropy)"),
    ({"dynamic": True, "weight": "int8"}, "compute with integers (scheme s, ranges found at each run)"),
    ({"weight": "int4"}, "have rounded weights and compute in float (scheme s)"),
])  # fmt: skip
def test_first_line_says_what_is_rounded(given: dict[str, Any], said: str) -> None:
    layer = LayerRecord.model_validate({"call": "8", "op": "linear", **given})
    assert Layers(scheme="s", method="entropy", layers=(layer,)).said == said


@pytest.mark.parametrize(("method", "typical", "weight_db", "said"), [
    ("min-max", 1.0, 50.0, "percentile instead of min-max on b.1.fc2 input: outliers at 40× the 99.9th percentile"),
    ("percentile", 1.0, 50.0, "b.1.fc2 in float: outliers at 40× the 99.9th percentile, and percentile keeps 9 dB"),
    ("min-max", 30.0, 10.0, "b.1.fc2 in float: its weights alone lose most of it, 9 dB are left (--set quantize.keep="),
    ("min-max", 30.0, 40.0, "b.1.fc2 in float: 9 dB are left of its result (--set quantize.keep=b.1.fc2)"),
])  # fmt: skip
def test_advice_follows_what_the_layer_suffers_from(method: str, typical: float, weight_db: float, said: str) -> None:
    wide = RangeRecord(value="7", op="gelu", low=-40.0, high=3.0, extremes=(-40.0, 3.0), typical=typical)
    bad = LayerRecord(call="8", op="linear", module="b.1.fc2", operands=("7",), own_db=9.0, weight_db=weight_db)
    good = LayerRecord(call="9", op="linear", module="b.2.fc2", operands=("7",), own_db=40.0, weight_db=45.0)
    (advice,) = suggestions(Layers(method=method, layers=(bad, good), ranges=(wide,)))
    assert advice.startswith(said)
    assert suggestions(Layers(method=method, layers=(good,), ranges=(wide,))) == ()


def test_bisect_names_the_layer_when_it_is_the_one_that_loses(one: Path) -> None:
    found = bisect(config(one, max_drop=None, data=None))
    assert (found.kind, found.culprit) == ("pass", "quantize")
    assert "layers.3" in found.node
    assert (
        bisect(config(one, max_drop=None, data=None, options={**PLAIN, "quantize.keep": "layers.3"})).kind == "nothing"
    )


def test_plan_says_what_would_be_in_integers(one: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--precision", "int8", "--calib", str(one / "calib.npz"), "--set", "quantize.keep=layers.3"]
    assert main(["build", str(one / "model.pt"), "-o", str(one / "planned"), "--plan", *given]) == 0
    out = capfd.readouterr().out
    assert "4 linear; 1 stay in float: it is kept in float" in out
    assert main(["build", str(one / "model.pt"), "-o", str(one / "planned"), "--plan", "--precision", "int8"]) == 2
    assert "VLX0218" in capfd.readouterr().out


def test_remembered_answers_are_computed_once() -> None:
    import numpy as np

    asked = []
    remembered = candidates.Remembered(lambda inputs: asked.append(1) or {"y": inputs["x"] + 1})
    for value in (1.0, 2.0, 1.0):
        assert remembered({"x": np.float32([value])})["y"][0] == value + 1
    assert len(asked) == 2
