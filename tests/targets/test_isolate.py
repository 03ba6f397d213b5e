"""Sessions in a child process, with made-up runtimes that crash, print, hang and return odd arrays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlexport.core.artifact import Artifact, TensorSpec
from vlexport.core.errors import VlexportError
from vlexport.core.isolate import IsolatedSession, _peak_memory_bytes, reused_children

RUNTIME = """
import ctypes, os, signal, sys, time
import numpy
from vlexport.core.artifact import Session
from vlexport.core.errors import InputError

print("at import", flush=True)

class Echo(Session):
    timing = "real"

    def run(self, inputs):
        act = (folder / "act").read_text() if (folder / "act").exists() else ""
        if act == "abort": os.abort()
        if act == "exit": os._exit(7)
        if act == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if act == "say and exit":
            print("the driver is gone", file=sys.stderr, flush=True); os._exit(9)
        if act == "raise": raise RuntimeError("first line\\nsecond line")
        if act == "refuse": raise InputError("VLX0507", "not this", where="here", hint="other")
        if act == "hang": (folder / "hanging").touch(); time.sleep(100)
        if act == "fill":
            numpy.ones(60_000_000, numpy.uint8)
        if act == "close channel":
            os.closerange(3, 64); time.sleep(100)
        if act == "print":
            print("P" * 100000, flush=True); os.write(1, b"raw\\n")
            ctypes.CDLL(None).puts(b"from C"); ctypes.CDLL(None).fflush(None)
        return {name: value for name, value in inputs.items()}

    def close(self):
        (folder / "closed").touch()

class Emulated(Echo):
    timing = "emulated"

def open_session(where, artifact, threads):
    global folder
    folder = where
    kind = Emulated if artifact.path == "emulated" else Echo
    if artifact.path == "abort": os.abort()
    if artifact.path == "hang": time.sleep(100)
    if artifact.path == "raise": raise ValueError("junk in the file")
    return kind(artifact.inputs, artifact.outputs)
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_up_runtime.py").write_text(RUNTIME)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def opened(folder: Path, path: str = "main", timeout_s: float | None = None) -> IsolatedSession:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch",))
    artifact = Artifact(target="made-up", path=path, inputs=(spec,), outputs=(spec,))
    return IsolatedSession("made_up_runtime:open_session", folder, artifact, timeout_s=timeout_s)


def refused(code: str, exit_code: int, call: object) -> VlexportError:
    assert callable(call)
    with pytest.raises(VlexportError) as caught:
        call()
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    return caught.value


def gone(session: IsolatedSession, pid: int) -> bool:
    return session._child is None and not Path(f"/proc/{pid}").exists()


def pid_of(session: IsolatedSession) -> int:
    assert session._child is not None
    return session._child.pid


ONE = {"x": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("abort", f"signal {int(signal.SIGABRT)}"),
        ("kill", f"signal {int(signal.SIGKILL)}"),
        ("exit", "exit code 7"),
        ("say and exit", "(exit code 9): the driver is gone"),
    ],
)
def test_death_of_the_child_is_reported_with_its_reason_when_it_runs(act: str, said: str, runtime: Path) -> None:
    with opened(runtime) as session:
        pid = pid_of(session)
        (runtime / "act").write_text(act)
        error = refused("VLX0506", 4, lambda: session.run(ONE))
        assert said in error.message
        assert gone(session, pid)
        assert "closed" in refused("VLX0506", 4, lambda: session.run(ONE)).message
        session.close()


def test_death_of_the_child_is_reported_when_somebody_kills_it(runtime: Path) -> None:
    with opened(runtime) as session:
        os.kill(pid_of(session), signal.SIGKILL)
        assert "signal 9" in refused("VLX0506", 4, lambda: session.run(ONE)).message


def test_death_of_the_child_is_reported_when_it_closes_its_channel(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlexport.core.child.CLOSE_SECONDS", 0.2)
    with opened(runtime) as session:
        (runtime / "act").write_text("close channel")
        assert "signal 9" in refused("VLX0506", 4, lambda: session.run(ONE)).message


def test_no_child_is_left_when_opening_fails(runtime: Path) -> None:
    def children() -> str:
        return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()

    before = children()
    assert "signal 6" in refused("VLX0506", 4, lambda: opened(runtime, "abort")).message
    assert "ValueError: junk in the file" in refused("VLX0505", 4, lambda: opened(runtime, "raise")).message
    assert children() == before


def test_entry_that_cannot_be_imported_is_an_error_when_opened(tmp_path: Path) -> None:
    artifact = Artifact(target="x", path="x", inputs=(), outputs=())
    error = refused("VLX0505", 4, lambda: IsolatedSession("no_such_runtime:open", tmp_path, artifact))
    assert "no_such_runtime" in error.message


def test_runtime_refuses_the_file_when_it_is_junk(tmp_path: Path) -> None:
    (tmp_path / "main.onnx").write_bytes(np.random.default_rng(0).bytes(999))
    spec = TensorSpec(name="x", dtype="float32", shape=(1,))
    artifact = Artifact(target="onnxruntime", path="main.onnx", inputs=(spec,), outputs=(spec,))
    entry = "vlexport.targets.onnxruntime.session:open_session"
    error = refused("VLX0505", 4, lambda: IsolatedSession(entry, tmp_path, artifact))
    assert "main.onnx is no ONNX model" in error.message
    assert "\n" not in error.message


def test_errors_keep_their_code_and_the_session_lives_when_a_run_raises(runtime: Path) -> None:
    with opened(runtime) as session:
        (runtime / "act").write_text("refuse")
        error = refused("VLX0507", 1, lambda: session.run(ONE))
        assert (error.message, error.where, error.hint) == ("not this", "here", "other")
        (runtime / "act").write_text("raise")
        error = refused("VLX0505", 4, lambda: session.run(ONE))
        assert "RuntimeError: first line" in error.message
        (runtime / "act").unlink()
        assert session.run(ONE)["x"].tolist() == [1]


def test_objects_are_refused_and_the_session_lives_when_they_are_no_arrays(runtime: Path) -> None:
    with opened(runtime) as session:
        for call in (session.run, lambda arrays: session.time_ms(arrays, warmup=1, runs=1)):
            error = refused("VLX0507", 1, lambda call=call: call({"x": np.array([None])}))
            assert error.where == "x"
        assert session.run(ONE)["x"].tolist() == [1]


def test_child_finds_the_runtime_when_only_this_process_knows_its_folder(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.syspath_prepend(str(runtime))
    with opened(runtime) as session:
        assert session.run(ONE)["x"].tolist() == [1]


def test_channel_holds_when_the_child_prints(runtime: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (runtime / "act").write_text("print")
    with opened(runtime) as session:
        for value in (1, 2):
            assert session.run({"x": np.full(1, value, np.float32)})["x"].tolist() == [value]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3)])
def test_arrays_come_back_equal_when_shapes_and_dtypes_are_odd(
    dtype: str, shape: tuple[int, ...], shared: IsolatedSession
) -> None:
    value = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    found = shared.run({"x": value, "ü/x y": value})
    assert list(found) == ["x", "ü/x y"]
    for each in found.values():
        assert (each.dtype, each.shape) == (value.dtype, value.shape)
        assert np.array_equal(each, value)
        assert each.flags.writeable


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "made_up_runtime.py").write_text(RUNTIME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        session = opened(folder)
    yield session
    session.close()


def test_arrays_come_back_equal_when_they_are_large_or_strided(shared: IsolatedSession) -> None:
    large = np.random.default_rng(0).standard_normal((40, 1000, 250), np.float32)  # 40 MB, far above any pipe
    special = np.array([np.nan, -np.inf, np.inf, -0.0], np.float32)
    found = shared.run({"large": large, "turned": large[::7, ::-3, 1].T, "special": special})
    assert np.array_equal(found["large"], large)
    assert np.array_equal(found["turned"], large[::7, ::-3, 1].T)
    assert found["special"].tobytes() == special.tobytes()


def test_close_is_harmless_when_called_twice(runtime: Path) -> None:
    session = opened(runtime)
    pid = pid_of(session)
    session.close()
    session.close()
    assert gone(session, pid)
    assert (runtime / "closed").exists()  # the child ended in good order
    refused("VLX0506", 4, lambda: session.run(ONE))


def test_close_kills_the_child_when_it_hangs(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlexport.core.child.CLOSE_SECONDS", 0.2)
    session = opened(runtime)
    pid = pid_of(session)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    session.close()
    assert time.monotonic() - started < 5
    assert gone(session, pid)


def test_times_are_measured_in_the_child_when_timing_is_real(shared: IsolatedSession) -> None:
    times = shared.time_ms(ONE, warmup=2, runs=6)
    assert len(times) == 6
    assert all(0 < t < 1000 for t in times)
    assert shared.load_ms > 0


def test_child_is_killed_when_it_gives_no_answer_in_time(runtime: Path) -> None:
    with opened(runtime, timeout_s=20) as session:  # the interpreter's start counts, too
        pid = pid_of(session)
        assert session.run(ONE)["x"].tolist() == [1]
        session._timeout_s = 0.3
        (runtime / "act").write_text("hang")
        started = time.monotonic()
        assert "no answer within 0.3 s and was killed" in refused("VLX0506", 4, lambda: session.run(ONE)).message
        assert time.monotonic() - started < 10
        assert gone(session, pid)
        refused("VLX0506", 4, lambda: session.run(ONE))


def test_child_is_killed_when_opening_takes_too_long(runtime: Path) -> None:
    before = len(list(Path("/proc/self/task").iterdir()))
    error = refused("VLX0506", 4, lambda: opened(runtime, "hang", timeout_s=2))
    assert "no answer within 2 s" in error.message
    patience = time.monotonic() + 10.0  # a thread that has ended leaves its entry a little later
    while len(list(Path("/proc/self/task").iterdir())) > before and time.monotonic() < patience:
        time.sleep(0.05)
    assert len(list(Path("/proc/self/task").iterdir())) <= before  # no timer is left


def test_child_is_killed_when_it_does_not_read_in_time(runtime: Path) -> None:
    with opened(runtime, timeout_s=20) as session:
        os.kill(pid_of(session), signal.SIGSTOP)
        session._timeout_s = 0.3
        large = {"x": np.zeros(5_000_000, np.float32)}  # above any pipe: the parent waits in a write
        assert "no answer within" in refused("VLX0506", 4, lambda: session.run(large)).message


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_peak_memory_is_the_childs_when_asked_for(runtime: Path) -> None:
    with opened(runtime) as session:
        before = session.peak_memory_bytes()
        (runtime / "act").write_text("fill")
        session.run(ONE)
        after = session.peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert 10e6 < before < 500e6  # an interpreter with numpy
    assert 55e6 < after - before < 80e6  # 60 MB were held and let go again


def test_peak_memory_is_none_when_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert _peak_memory_bytes() is None


def test_loads_are_timed_apart_when_cold_and_warm(shared: IsolatedSession) -> None:
    assert 0 < shared.load_ms < shared.cold_load_ms
    assert 0 < shared.reload_ms() < shared.cold_load_ms
    assert shared.run(ONE)["x"].tolist() == [1]  # the first session lives on


def test_times_are_refused_when_timing_is_not_real(runtime: Path) -> None:
    with opened(runtime, "emulated") as session:
        assert session.timing == "emulated"
        error = refused("VLX0803", 4, lambda: session.time_ms(ONE, warmup=1, runs=1))
        assert "not measured here" in error.message


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_isolate as t
try:
    t.opened(Path({folder!r})).run(t.ONE)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interrupt_ends_parent_and_child_when_the_whole_group_gets_it(runtime: Path) -> None:
    """As a terminal sends it: the parent must see Ctrl-C, not a child that died."""
    (runtime / "act").write_text("hang")
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(runtime))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not (runtime / "hanging").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def reusing(folder: Path, path: str = "main") -> IsolatedSession:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch",))
    artifact = Artifact(target="made-up", path=path, inputs=(spec,), outputs=(spec,))
    return IsolatedSession("made_up_runtime:open_session", folder, artifact, reuse=True)


def test_sessions_share_a_process_when_they_may(runtime: Path) -> None:
    with reused_children("made_up_runtime:open_session"):
        with reusing(runtime) as first:
            pid = pid_of(first)
            assert first.run(ONE)["x"] == 1
        with reusing(runtime) as second, reusing(runtime) as beside:
            assert pid_of(second) == pid
            assert pid_of(beside) != pid
            assert second.run(ONE)["x"] == 1
        with opened(runtime) as alone:
            assert pid_of(alone) != pid
    assert not Path(f"/proc/{pid}").exists()


def test_sessions_share_no_process_when_nobody_asked(runtime: Path) -> None:
    with reusing(runtime) as first:
        pid = pid_of(first)
    assert not Path(f"/proc/{pid}").exists()
    with reused_children(), opened(runtime) as second:
        pid = pid_of(second)
    assert not Path(f"/proc/{pid}").exists()


def test_next_session_has_another_process_when_the_last_one_died(runtime: Path) -> None:
    with reused_children():
        with reusing(runtime) as first:
            pid = pid_of(first)
            (runtime / "act").write_text("abort")
            refused("VLX0506", 4, lambda: first.run(ONE))
        (runtime / "act").unlink()
        with reusing(runtime) as second:
            assert pid_of(second) != pid
            assert second.run(ONE)["x"] == 1


def test_process_serves_on_when_a_file_is_refused(runtime: Path) -> None:
    with reused_children("made_up_runtime:open_session"):
        with reusing(runtime) as first:
            pid = pid_of(first)
        refused("VLX0505", 4, lambda: reusing(runtime, "raise"))
        with reusing(runtime) as second:
            assert pid_of(second) == pid


def test_no_process_is_left_when_a_session_outlives_those_it_shares_with(runtime: Path) -> None:
    with reused_children():
        session = reusing(runtime)
        pid = pid_of(session)
    session.close()
    assert not Path(f"/proc/{pid}").exists()
