"""The statistics of profile on scripted times, and its plumbing on a real bundle with times made up."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from vlexport.cli.main import main
from vlexport.core.bundle import read_bundle
from vlexport.core.bundle_schema import LatencyResult, Report
from vlexport.core.errors import VlexportError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.progress import Silent
from vlexport.stages.profile import (
    DRIFT,
    FULL,
    QUICK,
    REST_SECONDS,
    Measurable,
    Plan,
    ProfileConfig,
    measure_latency,
    median_interval,
    profile,
)

REST_BEFORE_A_BLOCK = REST_SECONDS
# Rank of the lower end of the exact interval for a median with at least 95 % (two-sided sign test, e.g. Conover,
# Practical Nonparametric Statistics, table A3); the upper end lies as far from the other side.
LOWER_RANK = {6: 1, 7: 1, 8: 1, 9: 2, 10: 2, 11: 2, 12: 3, 13: 3, 14: 3, 15: 4, 16: 4, 17: 5, 20: 6, 25: 8, 30: 10}


@pytest.mark.parametrize(("n", "rank"), LOWER_RANK.items())
def test_median_interval_equals_the_table_when_there_are_enough_values(n: int, rank: int) -> None:
    values = [float(v) for v in np.random.default_rng(n).permutation(n) + 1]  # the value is its rank
    assert median_interval(values) == (rank, n + 1 - rank)
    outside = 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n
    assert outside <= 0.05 < outside + 2 * math.comb(n, rank) / 2**n  # and it is the narrowest such


def test_median_interval_is_the_whole_range_when_values_are_few() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1, 3)
    assert median_interval([4.0]) == (4, 4)
    assert all(map(math.isnan, median_interval([])))
    seven_rounds = 1 - 2 / 2**7
    assert seven_rounds == pytest.approx(0.984, abs=5e-4)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up in most tests here, so that nothing has to come to rest."""
    monkeypatch.setattr("vlexport.stages.profile.REST_SECONDS", 0.0)
    monkeypatch.setattr("vlexport.stages.ceiling.SECONDS", 0.01)


class Scripted:
    """A session whose blocks of runs take the times of a script, one entry a block."""

    timing = "real"
    load_ms = 3.0
    cold_load_ms = 30.0

    def __init__(self, script: Sequence[float] | Iterator[float]) -> None:
        self.script = iter(script)
        self.asked: list[tuple[int, int]] = []

    def time_ms(self, inputs: object, *, warmup: int, runs: int) -> list[float]:
        self.asked.append((warmup, runs))
        return [next(self.script)] * runs

    def reload_ms(self) -> float:
        return 2.0

    def peak_memory_bytes(self) -> int | None:
        return 5_000_000


class ScriptedTarget:
    def __init__(self, session: Scripted) -> None:
        self.session = session

    @contextlib.contextmanager
    def open(self, *_: object, **__: object) -> Iterator[Scripted]:
        yield self.session


def measured(
    ours: Scripted, baseline: Scripted | None, tmp_path: Path, plan: Plan = FULL, **options: Any
) -> LatencyResult:
    def measurable(name: str, session: Scripted) -> Measurable:
        return Measurable(name, cast("Any", ScriptedTarget(session)), tmp_path, cast("Any", SimpleNamespace()))

    other = None if baseline is None else measurable("other", baseline)
    given = {"baseline": other, "plan": plan, "threads": 1, "reporter": Silent(), **options}
    return measure_latency(measurable("ours", ours), {}, **given)


def warm(first: float, *rest: float) -> list[float]:
    """The block that finds the number of runs comes first."""
    return [first, *rest]


def test_latency_is_a_median_without_ratio_when_measured_alone(tmp_path: Path) -> None:
    session = Scripted(warm(1.0, 2.0, 9.0, 3.0))
    found = measured(session, None, tmp_path, QUICK)
    assert (found.p50_ms, found.ratio, found.verdict, found.rounds) == (3.0, None, "alone", 3)
    assert session.asked == [(3, 3), (1, 200), (1, 200), (1, 200)]  # 0.7 s of 1 ms runs, at most 200


@pytest.mark.parametrize(("once_ms", "runs"), [(1.0, 200), (10.0, 150), (400.0, 5), (1e-9, 200)])
def test_blocks_fill_their_seconds_when_a_run_is_long_or_short(once_ms: float, runs: int, tmp_path: Path) -> None:
    session = Scripted(itertools.repeat(once_ms))
    measured(session, None, tmp_path)
    assert session.asked[1:] == [(1, runs)] * FULL.rounds


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([5, 5, 5, 5, 5, 5, 5], "faster"),
        ([5, 9, 9.9, 5, 8, 7, 5], "faster"),
        ([5, 5, 5, 5, 5, 5, 10.1], "no difference shown"),  # seven rounds: the whole range counts
        ([9, 9, 9, 10, 9, 9, 9], "no difference shown"),
        ([11, 12, 13, 10.5, 11, 11, 20], "slower"),
    ],
)
def test_verdict_follows_the_interval_when_all_rounds_hold(ours: list[float], verdict: str, tmp_path: Path) -> None:
    found = measured(Scripted(warm(5, *ours)), Scripted(itertools.repeat(10.0)), tmp_path)
    ratios = sorted(10 / v for v in ours)
    assert (found.verdict, found.rounds, found.repeated) == (verdict, 7, 0)
    assert found.ratio == pytest.approx(ratios[3])
    assert (found.ratio_low, found.ratio_high) == pytest.approx((ratios[0], ratios[-1]))
    assert (found.baseline, found.baseline_p50_ms, found.p50_ms) == ("other", 10, pytest.approx(np.median(ours)))


def test_ratio_cancels_a_machine_that_slows_down_when_both_slow_alike(tmp_path: Path) -> None:
    pace = [1.0, 1.5, 2.0, 3.0, 3.0, 2.0, 1.0]
    baseline = [v for p in pace for v in (10 * p, 10 * p)]
    found = measured(Scripted(warm(5, *(5 * p for p in pace))), Scripted(warm(10, *baseline)), tmp_path)
    assert (found.ratio, found.ratio_low, found.ratio_high) == (2, 2, 2)


def test_verdict_is_quick_when_rounds_are_few(tmp_path: Path) -> None:
    found = measured(Scripted(itertools.repeat(5.0)), Scripted(itertools.repeat(10.0)), tmp_path, QUICK)
    assert (found.verdict, found.ratio, found.rounds) == ("quick", 2, 3)


def test_round_is_repeated_when_the_baseline_drifts(tmp_path: Path) -> None:
    steady, drifted = [10.0, 10.0], [10.0, 10 * (1 + 2 * DRIFT)]
    blocks = [steady, drifted, steady, drifted, *[steady] * 5]
    ours = [5, 1, 5, 1, 5, 5, 5, 5, 5]  # the 1s belong to rounds that are thrown away
    found = measured(Scripted(warm(5, *ours)), Scripted(warm(10, *itertools.chain(*blocks))), tmp_path)
    assert (found.rounds, found.repeated, found.verdict) == (7, 2, "faster")
    assert (found.ratio_low, found.ratio_high) == (2, 2)
    assert (found.p50_ms, found.p90_ms, found.runs) == (5, 5, 7 * 200)  # nor do their times count anywhere else


def test_percentiles_and_throughput_come_from_the_runs_when_there_are_enough(tmp_path: Path) -> None:
    found = measured(Scripted(warm(1, *range(1, 8))), None, tmp_path)  # 200 runs each of 1, 2, … 7 ms
    assert (found.p50_ms, found.p90_ms, found.p99_ms, found.runs) == (4, 7, 7, 1400)
    assert (found.batch, found.throughput) == (1, pytest.approx(1000 / 4))
    slow = measured(Scripted(itertools.repeat(700.0)), None, tmp_path, QUICK)  # 3 blocks of 5 runs
    assert (slow.p50_ms, slow.p90_ms, slow.p99_ms, slow.runs) == (700, None, None, 15)


def test_loads_and_memory_are_told_apart_when_measured(tmp_path: Path) -> None:
    found = measured(Scripted(itertools.repeat(5.0)), None, tmp_path, QUICK)
    assert (found.cold_load_ms, found.load_ms, found.warm_load_ms) == (30, 3, 2)
    assert found.peak_memory_bytes == 5_000_000


def test_large_batch_is_measured_apart_when_asked_for(tmp_path: Path) -> None:
    session = Scripted([1.0, 1.0, 1.0, 1.0, 16.0, 16.0])
    large = {"x": np.zeros((8, 2), np.float32)}
    found = measured(session, None, tmp_path, QUICK, large=large)
    assert (found.p50_ms, found.throughput) == (1, 1000)
    assert (found.large_batch, found.large_batch_p50_ms, found.large_batch_throughput) == (8, 16, 500)


@pytest.mark.parametrize(("share", "repeated"), [(0.9, 0), (1.1, FULL.repeats + 1)])
def test_drift_bound_is_five_percent_when_compared(share: float, repeated: int, tmp_path: Path) -> None:
    script = itertools.cycle([10.0 * (1 + share * DRIFT), 10.0])
    baseline = Scripted(itertools.chain([10.0], script))
    found = measured(Scripted(itertools.repeat(5.0)), baseline, tmp_path)
    assert found.repeated == repeated


def test_verdict_is_too_noisy_when_the_control_never_holds(tmp_path: Path) -> None:
    growing = (10 * 1.2**i for i in itertools.count())
    found = measured(Scripted(itertools.repeat(5.0)), Scripted(growing), tmp_path)
    assert (found.verdict, found.rounds, found.repeated) == ("too noisy to tell", 0, FULL.repeats + 1)
    assert (found.ratio, found.ratio_low, found.ratio_high) == (None, None, None)


# On a real bundle


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """Sessions really run once a block; the times reported are made up, one a block."""

    def install(time_of: Callable[[int], float]) -> None:
        count = itertools.count()

        def time_ms(self: IsolatedSession, inputs: Any, *, warmup: int, runs: int) -> list[float]:
            self.run(inputs)
            return [time_of(next(count))] * runs

        monkeypatch.setattr(IsolatedSession, "time_ms", time_ms)

    return install


def test_profile_writes_a_report_when_alone(bundle: Path, capfd: Any) -> None:
    assert main(["profile", "bundle", "--quick", "--threads", "1", "--gate", "p50_ms<=10000"]) == 0
    out = capfd.readouterr().out
    assert "at 1 thread" in out
    assert "gate p50_ms<=10000: pass" in out
    report = Report.model_validate_json((bundle / "measured/local-2/report.json").read_text())
    assert report.latency is not None
    assert report.latency.p50_ms > 0
    assert report.latency.load_ms > 0
    assert (report.latency.verdict, report.latency.threads, report.latency.baseline) == ("alone", 1, "")
    assert report.accuracy is None
    assert "GFLOP/s, " in out
    ((ceiling),) = report.latency.ceilings
    assert ceiling.kind == "fp32"
    assert report.latency.gops == pytest.approx(2 * report.cost.macs / report.latency.p50_ms / 1e6)
    assert report.latency.gops < ceiling.gops
    assert json.loads((bundle / "measured/index.json").read_text())["reports"] == ["local-1", "local-2"]


def test_profile_exits_3_when_a_latency_gate_fails(bundle: Path) -> None:
    assert main(["profile", "bundle", "--quick", "--gate", "p50_ms<=0.0000001"]) == 3


def test_profile_names_the_other_bundle_when_against_one(
    bundle: Path, other_bundle: Path, paced: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(lambda block: 2.0)
    assert main(["profile", "bundle", "--against", "other"]) == 0
    out = capfd.readouterr().out
    digest = read_bundle(other_bundle).digest[:12]
    assert f"1.00× against bundle {digest} (95 %: 1.00 to 1.00, no difference shown)" in out
    monkeypatch.chdir(other_bundle)
    assert main(["profile", str(bundle), "--against", "."]) == 0
    assert f"against bundle {digest}" in capfd.readouterr().out


def test_profile_exits_5_without_a_ratio_when_it_is_too_noisy(
    bundle: Path, other_bundle: Path, paced: Any, capfd: Any
) -> None:
    paced(lambda block: 1.2**block)
    assert main(["profile", "bundle", "--against", "other"]) == 5
    out = capfd.readouterr().out
    assert f"too noisy to tell ({FULL.repeats + 1} rounds drifted)" in out
    assert "×" not in out


def test_profile_makes_the_plain_export_when_against_naive(
    bundle: Path, other_model: Path, model_file: Path, paced: Any, capfd: Any
) -> None:
    paced(lambda block: 2.0)
    assert main(["profile", "bundle", "--against", "naive", "--reference", str(model_file)]) == 0
    assert "against naive" in capfd.readouterr().out
    for reference, said in (("", "add --reference MODEL"), (str(other_model), "not the model that")):
        assert main(["profile", "bundle", "--against", "naive", "--reference", reference]) == 2
        err = capfd.readouterr().err
        assert "error VLX0804" in err
        assert said in err


def test_profile_refuses_a_session_when_its_timing_is_not_real(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "emulator.py").write_text(
        "from vlexport.targets.onnxruntime.session import OnnxRuntimeSession\n"
        "class Emulated(OnnxRuntimeSession):\n    timing = 'emulated'\n"
        "def open_session(folder, artifact, threads):\n    return Emulated(folder, artifact, threads)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("vlexport.targets.onnxruntime.OnnxRuntimeTarget.session_entry", "emulator:open_session")
    before = sorted(str(p) for p in bundle.rglob("*"))
    assert main(["verify", "bundle"]) == 0  # its numbers are right
    assert main(["profile", "bundle"]) == 4
    assert "timing is emulated: not measured here" in capfd.readouterr().err
    assert sorted(str(p) for p in bundle.rglob("*")) == before


def test_profile_refuses_baseline_when_it_takes_other_inputs(bundle: Path, tmp_path: Path) -> None:
    from torch import Tensor, nn, rand

    import vlexport
    from vlexport.core.config import BuildConfig

    class Net(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return picture.mean(dim=(2, 3))

    vlexport.save(Net().eval(), tmp_path / "n.pt", inputs=rand(1, 3, 8, 8))
    vlexport.build(BuildConfig(model=str(tmp_path / "n.pt"), output=str(tmp_path / "n"), profile=False))
    with pytest.raises(VlexportError) as caught:
        profile(ProfileConfig(bundle, against=str(tmp_path / "n"), quick=True))
    assert caught.value.code == "VLX0507"


def test_profile_measures_a_larger_batch_when_it_is_dynamic(bundle: Path, capfd: Any) -> None:
    assert main(["profile", "bundle", "--quick", "--batch", "4", "--threads", "1"]) == 0
    out = capfd.readouterr().out
    assert "samples/s at batch 1," in out
    assert "at batch 4" in out
    assert "with the runtime's import" in out
    report = Report.model_validate_json((bundle / "measured/local-2/report.json").read_text())
    found = report.latency
    assert found is not None
    assert (found.batch, found.large_batch) == (1, 4)
    assert found.p50_ms <= (found.p90_ms or 0) <= (found.p99_ms or 0)
    assert found.cold_load_ms is not None
    assert found.cold_load_ms > found.load_ms
    page = (bundle / "measured/local-2/report.html").read_text()
    assert "at batch 4" in page
    assert "peak memory" in page


def test_profile_refuses_a_batch_when_it_is_fixed_or_out_of_range(bundle: Path, tmp_path: Path, capfd: Any) -> None:
    from vlexport.core.artifact import DimRange
    from vlexport.core.bundle import read_bundle
    from vlexport.stages.profile import _large_sizes

    component = read_bundle(bundle).main
    (dim,) = component.dims
    ranged = component.model_copy(update={"dims": {dim: DimRange(min=2, max=8, opt=2)}})
    assert _large_sizes(8, ranged) == {dim: 8}
    spec = component.artifact.inputs[0].model_copy(update={"shape": (1, 3, 8, 8)})
    fixed = component.model_copy(update={"artifact": component.artifact.model_copy(update={"inputs": (spec,)})})
    for changed, said in ((ranged, "from 2 to 8"), (fixed, "fixed to 1")):
        with pytest.raises(VlexportError, match="VLX0703") as caught:
            _large_sizes(9, changed)
        assert said in caught.value.message


@pytest.mark.parametrize(
    ("ours_ms", "bound", "exit_code", "said"),
    [
        (2.0, "5", 0, "regress<=5: pass, regress is 0 %"),
        (2.2, "5", 3, "regress<=5: fail, regress is 10 %"),
        (1.0, "0", 0, "regress<=0: pass, regress is -50 %"),
    ],
)
def test_regression_is_judged_against_the_baseline_when_given(
    ours_ms: float, bound: str, exit_code: int, said: str, bundle: Path, other_bundle: Path, paced: Any, capfd: Any
) -> None:
    # Two blocks find the numbers of runs; then each round is baseline, ours, baseline.
    paced(lambda block: ours_ms if block == 0 or (block >= 2 and block % 3 == 0) else 2.0)
    assert main(["profile", "bundle", "--baseline", "other", "--max-regress", bound]) == exit_code
    assert said in capfd.readouterr().out


def test_regression_is_inconclusive_when_the_interval_crosses_or_is_missing(
    bundle: Path, other_bundle: Path, paced: Any, capfd: Any
) -> None:
    paced(lambda block: 2.0 + 0.1 * (block % 9 == 3))  # some rounds of ours are 5 % slower
    assert main(["profile", "bundle", "--baseline", "other", "--max-regress", "2"]) == 5
    assert "a quieter machine may decide" in capfd.readouterr().out
    paced(lambda block: 1.2**block)
    assert main(["profile", "bundle", "--baseline", "other", "--max-regress", "2"]) == 5
    assert "without an interval: too noisy" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-regress", "2"], "--baseline BUNDLE"),
        (["--baseline", "other", "--against", "other"], "both given"),
        (["--baseline", "other", "--max-regress", "2", "--quick"], "leave --quick out"),
        (["--gate", "regress<=2"], "add --against"),
        (["--gate", "cosine>=0.9"], "vlexport validate"),
    ],
)
def test_regression_is_a_usage_error_when_it_cannot_be_judged(
    arguments: list[str], said: str, bundle: Path, other_bundle: Path, capfd: Any
) -> None:
    assert main(["profile", "bundle", *arguments]) == 2
    assert said in capfd.readouterr().err


def test_baseline_named_naive_is_a_folder_when_given(bundle: Path, capfd: Any) -> None:
    assert main(["profile", "bundle", "--baseline", "naive", "--max-regress", "2"]) == 1
    assert "VLX0601" in capfd.readouterr().err


def _cpu_ms(session: IsolatedSession) -> float:
    """Milliseconds of processor time of a child, all threads."""
    child = session._child
    assert child is not None
    threads = Path(f"/proc/{child.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="reads Linux' scheduler statistics")
def test_idle_child_does_not_spin_when_the_rest_is_over(bundle: Path) -> None:
    """ONNX Runtime's threads spin on for 35 to 40 ms after a run; the rest before a block must be longer."""
    opened = bundle_session(bundle, threads=2)
    with opened as session:
        session.time_ms({"image": np.zeros((64, 3, 8, 8), np.float32)}, warmup=1, runs=50)
        time.sleep(REST_BEFORE_A_BLOCK)
        before = _cpu_ms(session)
        time.sleep(0.2)
        assert _cpu_ms(session) - before < 20  # a spinning thread would have used 200


def bundle_session(bundle: Path, *, threads: int) -> IsolatedSession:
    from vlexport.core.bundle import ARTIFACT_FOLDER, read_bundle
    from vlexport.targets import open_target

    found = read_bundle(bundle)
    return open_target(found.target).open(bundle / ARTIFACT_FOLDER, found.main.artifact, threads=threads)


def test_profile_ends_the_child_when_an_answer_takes_too_long(bundle: Path, capfd: Any) -> None:
    assert main(["profile", "bundle", "--quick", "--timeout", "0.001"]) == 4
    assert "no answer within 0.001 s" in capfd.readouterr().err
