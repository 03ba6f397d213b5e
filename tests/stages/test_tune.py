"""``build --autotune``: what is kept, what is never kept, what is written down, and what is refused.

Latencies are made up but for one test. Most tests search around a bundle that is built already, with sessions in this
process; what needs children has them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlexport.cli.main import main
from vlexport.core.bundle import read_bundle, recorded_files
from vlexport.core.bundle_schema import LatencyResult, Trial, Tuning
from vlexport.core.config import BuildConfig, config_from
from vlexport.core.dataset import Dataset
from vlexport.core.errors import VlexportError
from vlexport.core.progress import Silent
from vlexport.core.samples import open_data
from vlexport.core.verdict import gate_from_text
from vlexport.report.figures import tuning_phrase
from vlexport.report.receipt import MAX_LINES, receipt
from vlexport.stages import tune
from vlexport.stages.build import build
from vlexport.stages.golden import read_golden
from vlexport.stages.profile import Measurable, Plan
from vlexport.stages.search import chosen
from vlexport.stages.tune import Subject, Tuned, autotune, axes_of
from vlexport.targets.base import Brief
from vlexport.targets.onnxruntime import OnnxRuntimeOptions, OnnxRuntimeTarget

ROOT = Path(__file__).resolve().parents[2]
GIVEN = {f"onnxruntime.{name}": "true" for name in ("allow_spinning", "memory_pattern", "memory_arena")}
LEVELS_ONLY = {**GIVEN, "onnxruntime.dynamic_block_base": "0"}
"""What is given is not searched: three candidates are left, extended, basic and none."""
LEVEL = "onnxruntime.graph_optimization"
Measure = Callable[..., LatencyResult]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions without a child: ten times as fast to open."""

    def open_here(self: OnnxRuntimeTarget, folder: Path, artifact: Any, *, threads: int = 0, **_: object) -> Any:
        return self.open_here(folder, artifact, threads=threads)

    monkeypatch.setattr(OnnxRuntimeTarget, "open", open_here)


def speeds(table: dict[str, float], asked: list[str], *, confirmed: float = 1.0) -> Measure:
    """Made-up latencies by the level of graph optimisation; ``confirmed`` scales the ratio in full rounds."""

    def measure(ours: Measurable, inputs: object, *, baseline: Measurable, plan: Plan, **_: object) -> LatencyResult:
        level, other = (str(m.artifact.session_options["graph_optimization"]) for m in (ours, baseline))
        asked.append(f"{level}/{other}" + (" in full" if plan is tune.CONFIRM else ""))
        ratio = table.get(level, 1.0) / table.get(other, 1.0) * (confirmed if plan is tune.CONFIRM else 1.0)
        return LatencyResult(p50_ms=1.0, load_ms=1.0, runs=5, threads=1, ratio=ratio, ratio_low=ratio, ratio_high=ratio)

    return measure


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed; ``extended`` is the fastest."""
    found: list[str] = []
    monkeypatch.setattr(tune, "measure_latency", speeds({"extended": 1.3, "basic": 1.2, "none": 0.5}, found))
    return found


def searched(
    bundle: Path,
    data: Path | None = None,
    *,
    gates: tuple[str, ...] = (),
    reporter: Silent | None = None,
    **values: Any,
) -> Tuned:
    """A search around a bundle, as ``build`` makes it before it writes one."""
    config = BuildConfig(**{"model": "m.pt", "options": LEVELS_ONLY, "threads": 1, "autotune": True, **values})
    component = read_bundle(bundle).main
    target = OnnxRuntimeTarget()
    artifact = target.retuned(component.artifact, target.check_options(config.scoped_options(target.id)))
    with target.open_here(bundle / "artifact", artifact) as source:
        subject = Subject(
            config=config,
            target=target,
            folder=bundle,
            component=component.model_copy(update={"artifact": artifact}),
            source_hash="0",
            source=source.run,
            inputs=read_golden(bundle, component)[0],
            gates=tuple(map(gate_from_text, gates)),
            metrics=(),
            tools={},
            threads=1,
        )
        axes = axes_of(config, target, target.check_options(config.scoped_options(target.id)))
        return autotune(subject, axes, _samples(bundle, data), reporter=reporter)


def _samples(bundle: Path, data: Path | None) -> Dataset | None:
    if data is None:
        return None
    main_ = read_bundle(bundle).main
    return open_data(str(data), inputs=main_.artifact.inputs, preprocess=main_.preprocess, labels=main_.labels)


def journals(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("search-*"))


def content(bundle: Path) -> dict[str, bytes]:
    names = ["bundle.json", *(name for name, _ in recorded_files(bundle))]
    return {name: (bundle / name).read_bytes() for name in names}


def photos(folder: Path, count: int = 30) -> Path:
    for name, colour in (("red", (220, 20, 30)), ("green", (20, 210, 30)), ("blue", (30, 20, 215))):
        (folder / name).mkdir(parents=True)
        for number in range(count // 3):
            Image.new("RGB", (8, 8), tuple(c + number for c in colour)).save(folder / name / f"{number}.png")
    return folder


# What is kept


def test_recipe_replays_the_same_bytes_when_a_search_adopted_options(
    model_file: Path, tmp_path: Path, in_process: None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And accuracy is that of the samples which the search did not choose on."""
    profiled: list[str] = []
    monkeypatch.setattr("vlexport.stages.build.measure_latency", speeds({}, profiled))
    monkeypatch.setattr(OnnxRuntimeTarget, "lower_naive", lambda self, program, folder: self.lower(
        program, folder, Brief(OnnxRuntimeOptions(), threads=1)))  # fmt: skip
    values = {"model": str(model_file), "options": LEVELS_ONLY, "threads": 1}
    gates = ("top1>=20", "drop<=80", "size_mb<=9")
    searching = {**values, "output": str(tmp_path / "tuned"), "autotune": True, "budget_minutes": 9.0}
    found = build(BuildConfig(**searching, data=str(photos(tmp_path / "photos")), gate=gates))
    assert asked == ["extended/all", "basic/extended", "none/extended", "extended/all in full"]
    tuning = found.report.tuning
    assert tuning is not None
    assert tuning.adopted == {LEVEL: "extended"}
    assert [trial.outcome for trial in tuning.trials] == ["faster", "not faster", "not faster"]
    assert found.bundle.main.artifact.session_options["graph_optimization"] == "extended"
    assert journals(tmp_path) == []
    names = [f"{name}/{number}.png" for name in ("red", "green", "blue") for number in range(10)]
    others = sum(not chosen(name) for name in names)
    assert (tuning.choosing_samples, tuning.confirming_samples) == (30 - others, others)
    assert found.report.accuracy is not None
    assert (found.report.samples, found.report.accuracy.samples) == (others, others)
    lines = receipt(found.bundle, found.report.model_copy(update={"notes": ("one", "two")}), "b")
    assert len(lines) == MAX_LINES
    assert f"accuracy is that of the {others} samples not chosen on" in "\n".join(lines)
    recipe = (tmp_path / "tuned/recipe.toml").read_text()
    assert '"onnxruntime.graph_optimization" = "extended"' in recipe
    assert not {"autotune", "budget_minutes", "resume"} & set(recipe.split())

    monkeypatch.setattr("vlexport.stages.build.autotune", None)
    again = {"model": str(model_file), "output": str(tmp_path / "again"), "data": str(tmp_path / "photos")}
    build(config_from(again, recipe=tmp_path / "tuned/recipe.toml"))
    assert len(asked) == 4
    assert profiled == ["extended/all"] * 2  # the naive export is opened as the runtime does by default
    assert content(tmp_path / "again") == content(tmp_path / "tuned")


def test_recipe_stands_when_full_rounds_do_not_confirm_the_winner(
    built: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tune, "measure_latency", speeds({"basic": 1.2}, asked, confirmed=0.8))
    found = searched(built)
    assert asked[-1] == "basic/all in full"
    assert found.tuning.confirmation is not None
    assert found.tuning.confirmation.outcome == "not faster"
    assert found.tuning.adopted == {}
    assert found.config.options == LEVELS_ONLY
    assert found.component.artifact.session_options["graph_optimization"] == "all"
    assert "the recipe stands: of 3 candidates, " in tuning_phrase(found.tuning)
    assert "graph_optimization=basic was not confirmed: 0.960× (0.960 to 0.960)" in tuning_phrase(found.tuning)


@pytest.mark.parametrize(("ratio", "low", "outcome"), [(1.1, 0.99, "not faster"), (None, None, "too noisy")])
def test_candidate_is_not_faster_when_one_round_was_not(
    ratio: float | None, low: float | None, outcome: str, built: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = LatencyResult(p50_ms=1, load_ms=1, runs=5, threads=1, ratio=ratio, ratio_low=low, ratio_high=ratio)
    monkeypatch.setattr(tune, "measure_latency", lambda *_, **__: found)
    tuning = searched(built).tuning
    assert [trial.outcome for trial in tuning.trials] == [outcome] * 3
    assert (tuning.adopted, tuning.confirmation) == ({}, None)


def test_search_runs_on_the_real_runtime_when_asked_for_on_the_command_line(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real children and clocks; which of two is faster is left open."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "CHOOSE", Plan(rounds=1, block_seconds=0.001))
    monkeypatch.setattr(tune, "CONFIRM", Plan(rounds=2, block_seconds=0.001))
    monkeypatch.setattr("vlexport.stages.build.QUICK", Plan(rounds=1, block_seconds=0.001))
    options = [f"--set={k}={v}" for k, v in {**LEVELS_ONLY, LEVEL: "basic"}.items() if "spinning" not in k]
    assert main(["build", str(model_file), "-o", "b", "--autotune", "--threads", "1", "--json", *options]) == 0
    answer = json.loads(capfd.readouterr().out)
    tuning = Tuning.model_validate(answer["report"]["tuning"])
    (trial,) = tuning.trials
    assert trial.options == {"onnxruntime.allow_spinning": "false"}
    assert trial.outcome in ("faster", "not faster", "too noisy")
    assert (trial.ratio is None) is (trial.outcome == "too noisy")
    assert (tuning.confirmation is not None) is (trial.outcome == "faster")
    assert "<h2>Search</h2>" in (tmp_path / "b/measured/local-1/report.html").read_text()


# What is never kept

LIAR = """
import os
from vlexport.targets.onnxruntime.session import OnnxRuntimeSession

class Liar(OnnxRuntimeSession):
    def __init__(self, folder, artifact, threads):
        super().__init__(folder, artifact, threads)
        self.level = artifact.session_options.get("graph_optimization")
        if self.level == "none":
            os._exit(3)

    def run(self, inputs):
        found = super().run(inputs)
        photo = min(float(value.max()) - float(value.min()) for value in inputs["image"][0]) == 0
        wrong = self.level == "basic" or (self.level == "extended" and photo)
        return {name: value * 1.01 for name, value in found.items()} if wrong else found

class Emulated(OnnxRuntimeSession):
    timing = "emulated"

def liar(*arguments): return Liar(*arguments)
def emulated(*arguments): return Emulated(*arguments)
"""


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Opens the artifacts of this test with a session that lies or is emulated."""
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up/made_up_sessions.py").write_text(LIAR)
    monkeypatch.syspath_prepend(str(tmp_path / "made_up"))
    return lambda name: monkeypatch.setattr(OnnxRuntimeTarget, "session_entry", f"made_up_sessions:{name}")


def test_candidate_is_never_kept_when_it_is_wrong_or_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions: Callable[[str], None]
) -> None:
    """One breaks the golden vectors, one only real photos, one ends the process; each would be fastest by far."""
    sessions("liar")
    monkeypatch.setattr(tune, "measure_latency", speeds({"extended": 9.0, "basic": 9.0, "none": 9.0}, []))
    found = searched(built, photos(tmp_path / "photos"))
    assert (found.tuning.adopted, found.tuning.confirmation) == ({}, None)
    said = {trial.options[LEVEL]: (trial.outcome, trial.reason) for trial in found.tuning.trials}
    assert said["extended"][0] == "wrong"
    assert "differs from the recipe as it stands by 1.0e-02" in said["extended"][1]
    assert said["basic"][0] == "wrong"
    assert "differs from the source program by 1.0e-02" in said["basic"][1]
    assert said["none"] == ("refused", "VLX0506: the runtime's process ended unexpectedly")
    assert found.component.artifact.session_options["graph_optimization"] == "all"


def test_winner_is_dropped_when_only_the_other_samples_show_that_it_is_wrong(
    built: Path, tmp_path: Path, in_process: None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is looked at through its own samples: the second is wrong, the first is right."""
    whole = tune.measure_accuracy

    def measured(session: Any, dataset: Dataset, *rest: Any, **named: Any) -> dict[str, Any]:
        found = whole(session, dataset, *rest, **named)
        if not any(chosen(sample.id) for sample in dataset):
            each = next(iter(found["fidelity"].values())).model_copy(update={"relative_error": 0.5})
            found["fidelity"] = {"output": each}
        return found

    monkeypatch.setattr(tune, "measure_accuracy", measured)
    tuning = searched(built, photos(tmp_path / "photos")).tuning
    assert tuning.trials[0].outcome == "faster"
    assert tuning.confirmation is not None
    assert (tuning.confirmation.outcome, tuning.adopted) == ("wrong", {})
    assert "was not confirmed: wrong (output output differs" in tuning_phrase(tuning)


@pytest.mark.parametrize(("gate", "outcome"), [("top1>=90", "wrong"), ("top1>=10", "faster"), ("p50_ms<=0", "faster")])
def test_candidate_is_judged_by_the_gates_on_accuracy_when_there_are_samples(
    gate: str, outcome: str, built: Path, tmp_path: Path, in_process: None, asked: list[str]
) -> None:
    """Red and green are swapped on every third photo, so that two thirds are right."""
    data = photos(tmp_path / "photos", 60)
    for number in range(0, 20, 3):
        for name, other in (("red", "green"), ("green", "blue"), ("blue", "red")):
            (data / name / f"{number}.png").rename(data / other / f"from-{name}-{number}.png")
    tuning = searched(built, data, gates=(gate,)).tuning
    assert tuning.trials[0].outcome == outcome
    assert tuning.trials[0].reason.partition(",")[0] == (f"gate {gate}: fail" if outcome == "wrong" else "")


# Interrupted

_SEARCH = """
import sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import LatencyResult
from vlexport.core.config import BuildConfig
from vlexport.stages import tune
from vlexport.stages.golden import read_golden
from vlexport.targets.onnxruntime import OnnxRuntimeTarget

def slow(*_, **__):
    print("begin", flush=True)
    time.sleep(0.2 if slow.first else 60)
    slow.first = False
    return LatencyResult(p50_ms=1, load_ms=1, runs=5, threads=1, ratio=1.2, ratio_low=1.2, ratio_high=1.2)

slow.first = True
tune.measure_latency = slow
bundle = Path(sys.argv[1])
config, target, component = BuildConfig.model_validate_json(sys.argv[2]), OnnxRuntimeTarget(), read_bundle(bundle).main
options = target.check_options(config.scoped_options("onnxruntime"))
subject = tune.Subject(config=config, target=target, folder=bundle, component=component, source_hash="0", source=None,
    inputs=read_golden(bundle, component)[0], gates=(), metrics=(), tools={}, threads=1)
tune.autotune(subject, tune.axes_of(config, target, options), None)
"""


def test_search_goes_on_where_it_was_when_killed(
    built: Path, tmp_path: Path, in_process: None, asked: list[str]
) -> None:
    config = BuildConfig(model="m.pt", options=LEVELS_ONLY, threads=1, autotune=True)
    arguments = [str(built), config.model_dump_json(), str(ROOT)]
    child = subprocess.Popen([sys.executable, "-c", _SEARCH, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(2)] == ["begin\n"] * 2  # the second is being examined
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (journal,) = journals(tmp_path)
    assert len(journal.read_text().splitlines()) == 1

    found = searched(built, resume=True)
    assert asked == ["basic/extended", "none/extended", "extended/all in full"]
    assert found.tuning.trials[0].ratio == 1.2  # measured by the process that was killed
    assert found.tuning.adopted == {LEVEL: "extended"}
    assert journals(tmp_path) == [journal]
    found.finish()
    assert journals(tmp_path) == []


def test_search_can_be_resumed_when_its_budget_was_spent(
    built: Path, tmp_path: Path, in_process: None, asked: list[str]
) -> None:
    notes: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    found = searched(built, budget_minutes=1e-12)
    assert asked == []
    assert not found.tuning.finished
    assert tuning_phrase(found.tuning).endswith("the budget ended the search, --resume goes on")
    found.finish()
    assert len(journals(tmp_path)) == 1
    searched(built, resume=True, reporter=Listening())
    assert len(asked) == 4
    searched(built, resume=True, reporter=Listening())
    assert asked[4:] == ["extended/all in full"]
    searched(built, reporter=Listening())
    assert len(asked) == 9
    assert notes == ["nothing to resume: the search starts anew", "3 trials are known already"]


def test_search_starts_anew_when_what_it_depends_on_has_changed(
    built: Path, tmp_path: Path, in_process: None, asked: list[str]
) -> None:
    searched(built)
    searched(built, resume=True, seed=1)
    searched(built, photos(tmp_path / "photos"), resume=True)
    assert len(asked) == 12
    assert len(journals(tmp_path)) == 3


# Refusals


@pytest.mark.parametrize(
    ("values", "where", "said"),
    [
        ({"autotune": True, "profile": False}, "--autotune", "--no-profile forbids it"),
        ({"autotune": True, "device_profile": "cpu-x86-vnni"}, "--autotune", "no cpu-x86-vnni"),
        ({"autotune": True, "options": {**LEVELS_ONLY, LEVEL: "all"}}, "--autotune", "every option"),
        ({"resume": True}, "--resume", "without a search"),
        ({"budget_minutes": 2.0}, "--budget-minutes", "without a search"),
    ],
)
def test_search_is_refused_in_words_when_it_cannot_be_made(
    values: dict[str, Any], where: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tune.this_machine().model_copy(update={"instruction_set": ()})
    monkeypatch.setattr(tune, "this_machine", lambda: bare)
    config = BuildConfig(model="m.pt", **values)
    options = OnnxRuntimeTarget().check_options(config.scoped_options("onnxruntime"))
    with pytest.raises(VlexportError) as caught:
        axes_of(config, OnnxRuntimeTarget(), options)
    assert (caught.value.code, caught.value.exit_code, caught.value.where) == ("VLX0805", 2, where)
    assert said in caught.value.message
    assert caught.value.hint


def test_search_is_refused_when_the_target_has_nothing_to_search(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OnnxRuntimeTarget, "tunables", lambda *_: {})
    monkeypatch.chdir(tmp_path)
    assert main(["build", str(model_file), "-o", "b", "--autotune", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["message"] == "onnxruntime has no options to search"
    assert not (tmp_path / "b").exists()


def test_search_is_refused_when_times_on_the_session_mean_nothing(
    built: Path, tmp_path: Path, asked: list[str], sessions: Callable[[str], None]
) -> None:
    sessions("emulated")
    with pytest.raises(VlexportError) as caught:
        searched(built)
    assert caught.value.code == "VLX0803"
    assert asked == []
    assert journals(tmp_path) == []


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_budget_is_refused_when_it_is_no_time(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "m.pt", "--autotune", "--budget-minutes", value, "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["code"], error["where"]) == ("VLX0703", "--budget-minutes")


def test_axes_are_empty_when_no_search_is_asked_for() -> None:
    assert axes_of(BuildConfig(model="m.pt"), OnnxRuntimeTarget(), OnnxRuntimeOptions()) == {}


def test_plan_says_what_would_be_tried_when_a_search_is_asked_for(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--set", "onnxruntime.memory_arena=false"]
    assert main(["build", str(model_file), "--plan", "--autotune", *given]) == 0
    out = capfd.readouterr().out
    assert "Try      onnxruntime.graph_optimization = extended, basic, none\n" in out
    assert "Try      onnxruntime.allow_spinning = false\n" in out
    assert "memory_arena" not in out
    assert main(["build", str(model_file), "--plan", "--autotune", "--no-profile"]) == 2
    assert "VLX0805" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


# In words


def test_report_holds_what_was_searched_when_read_back() -> None:
    trial = Trial(options={"t.a": "1"}, outcome="faster", ratio=1.1, ratio_low=1.05, ratio_high=1.2)
    tuning = Tuning(trials=(trial,), confirmation=trial, adopted={"t.a": "1"}, finished=True)
    assert tuning_phrase(tuning) == "t.a=1 of 1 candidate: 1.100× (1.050 to 1.200) the recipe as it was, confirmed"
    assert Tuning.model_validate_json(tuning.model_dump_json()) == tuning


def test_candidate_is_wrong_when_a_later_gate_fails(
    built: Path, tmp_path: Path, in_process: None, asked: list[str]
) -> None:
    data = photos(tmp_path / "photos", 60)
    for number in range(0, 20, 3):
        for name, other in (("red", "green"), ("green", "blue"), ("blue", "red")):
            (data / name / f"{number}.png").rename(data / other / f"from-{name}-{number}.png")
    tuning = searched(built, data, gates=("top1>=10", "top1>=90")).tuning
    assert (tuning.trials[0].outcome, tuning.trials[0].reason.partition(",")[0]) == ("wrong", "gate top1>=90: fail")
