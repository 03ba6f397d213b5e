"""Peers of the comparison: their environments, their processes, and what is kept of a cell. No real peer takes part."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.compare_cells import Place, build, compared, judge, time_cell
from tests.benchmarks.compare_rows import OURS, PLAIN, ROWS, Row, rows_of
from tests.benchmarks.peers import SCRIPTS, SHARED, Environment, Peer, PeerError, PeerSession, installed, last_line
from vlexport.core.progress import Silent
from vlexport.stages.profile import Plan

FAKE = """
import os, shutil, sys, time
import numpy as np
from child import calibration, serve

def build(recipe, source, output):
    print("a compiler talks on standard output")
    with open(output / "count", "w") as file:
        file.write(str(len(calibration(source))))
    if recipe == "raises":
        raise ValueError("this graph cannot be lowered, see /srv/somewhere/graph.txt")
    if recipe == "dies":
        os.abort()
    if recipe == "hangs":
        time.sleep(60)

def open_session(recipe, folder, threads):
    gain = 1.0 + (0.01 if recipe == "noisy" else 0.0)
    return lambda sample: gain * sample["x"].sum(axis=2) if recipe != "other-shape" else sample["x"]

if __name__ == "__main__":
    serve(build, open_session, ("numpy",))
"""
PLAIN_ROW = Row(PLAIN, "plain", "fake", "plain", "fp32")
RNG = np.random.default_rng(0)


def row(recipe: str) -> Row:
    return Row(recipe, recipe, "fake", recipe, "fp32")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "fake.py").write_text(FAKE, encoding="utf-8")
    for name in SHARED:
        (scripts / name).write_text((SCRIPTS / name).read_text(encoding="utf-8"), encoding="utf-8")
    return Place(tmp_path / "scratch", scripts=scripts)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A prepared model: six samples ``(2, 3)``, the output is ``(2,)``."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    np.savez(folder / "calibration.npz", x=RNG.normal(size=(4, 2, 3)))
    np.savez(folder / "samples.npz", x=RNG.normal(size=(6, 2, 3)))
    np.save(folder / "labels.npy", np.array([0, 1, 0, 1, 0, 1]))
    (folder / "model.json").write_text(json.dumps({"built_from": "a", "judged_on": "b"}), encoding="utf-8")
    return folder


@pytest.fixture
def peer(place: Place) -> Iterator[Peer]:
    with place.peer(PLAIN_ROW) as found:
        yield found


def test_cell_is_built_judged_and_timed_and_kept_when_a_peer_works(place: Place, source: Path) -> None:
    built = build(place, PLAIN_ROW, source)
    assert built.versions == {"numpy": np.__version__}
    assert built.size_bytes == 1  # the file `count`
    assert (place.folder("tiny", PLAIN_ROW) / "artifact/count").read_text() == "4"
    build(place, row("noisy"), source)
    judged = judge(place, row("noisy"), source, embedding=False, plain=PLAIN_ROW, threads=1)
    assert judged.samples == judged.agreements == 6
    assert judged.sqnr_db == pytest.approx(40.0)  # 1 % of the signal
    assert (judged.plain_only, judged.this_only) == (0, 0)
    plan = Plan(rounds=1, block_seconds=0.0)
    timed = time_cell(place, PLAIN_ROW, source, plain=PLAIN_ROW, plan=plan, threads=1, reporter=Silent())
    assert timed.p50_ms > 0
    assert timed.rounds + timed.repeated > 0

    (place.scripts / "child.py").touch()
    kept = (place.folder("tiny", PLAIN_ROW) / "artifact/count").stat().st_mtime_ns
    assert build(place, PLAIN_ROW, source) == built
    assert (place.folder("tiny", PLAIN_ROW) / "artifact/count").stat().st_mtime_ns == kept


def test_artifact_is_made_anew_when_script_or_samples_changed(place: Place, source: Path) -> None:
    build(place, PLAIN_ROW, source)
    file = place.folder("tiny", PLAIN_ROW) / "artifact/count"
    first = file.stat().st_mtime_ns
    (source / "model.json").write_text(json.dumps({"built_from": "c", "judged_on": "b"}), encoding="utf-8")
    build(place, PLAIN_ROW, source)
    second = file.stat().st_mtime_ns
    assert second > first
    with (place.scripts / "fake.py").open("a", encoding="utf-8") as script:
        script.write("# another version\n")
    build(place, PLAIN_ROW, source)
    assert file.stat().st_mtime_ns > second


def test_failure_is_kept_as_its_last_line_and_tried_again_when_asked(place: Place, source: Path) -> None:
    said = "ValueError: this graph cannot be lowered, see graph.txt"
    with pytest.raises(PeerError) as caught:
        build(place, row("raises"), source)
    assert str(caught.value) == said
    script = place.scripts / "fake.py"
    known = json.loads((place.folder("tiny", row("raises")) / "built.json").read_text())
    assert known["failed"] == said
    with pytest.raises(PeerError, match="cannot be lowered"):  # from memory: nothing could answer now
        build(Place(place.scratch, scripts=place.scripts), row("raises"), source)
    text = script.read_text().replace('recipe == "raises"', 'recipe == "never"')
    script.write_text(text)
    assert build(place, row("raises"), source).size_bytes == 1


def test_peer_that_aborts_is_named_when_it_says_nothing(place: Place, source: Path) -> None:
    with pytest.raises(PeerError, match="fake ended with -6 and said nothing"):
        build(place, row("dies"), source)


def test_peer_is_killed_when_it_takes_too_long(place: Place, source: Path, tmp_path: Path) -> None:
    with Peer(place.environment(row("hangs")), Path(sys.executable), timeout_s=2.0) as peer:
        with pytest.raises(PeerError, match="fake did not answer 'build' within 2 s"):
            peer.ask(do="build", recipe="hangs", source=str(source), output=str(tmp_path))
        assert peer._child.poll() is not None


def test_outputs_of_another_shape_are_refused(place: Place, source: Path) -> None:
    for each in (PLAIN_ROW, row("other-shape")):
        build(place, each, source)
    with pytest.raises(PeerError, match=r"its outputs are \(6, 6\), the plain export's \(6, 2\)"):
        judge(place, row("other-shape"), source, embedding=False, plain=PLAIN_ROW, threads=1)


def test_session_times_and_runs_what_was_opened(peer: Peer, source: Path, tmp_path: Path) -> None:
    session = PeerSession(peer, "plain", tmp_path, threads=1)
    with np.load(source / "samples.npz") as archive:
        samples = archive["x"]
    np.testing.assert_array_equal(session.run_all(source / "samples.npz"), samples.sum(axis=2))
    assert len(session.time_ms({"x": samples[:1]}, warmup=1, runs=3)) == 3
    assert session.load_ms > 0
    assert session.reload_ms() >= 0
    assert (session.peak_memory_bytes() or 1) > 0


def test_environment_is_refused_from_memory_when_it_could_not_be_installed(place: Place, tmp_path: Path) -> None:
    environment = Environment("fake", place.scripts)
    environment.requirements.write_text("/no/such/wheel-1.0-py3-none-any.whl\n", encoding="utf-8")
    with pytest.raises(PeerError) as first:
        installed(environment, tmp_path / "venvs")
    assert "wheel-1.0-py3-none-any.whl" in str(first.value)
    assert "/no/such" not in str(first.value)
    (tmp_path / "venvs/fake/bin/python").unlink()
    with pytest.raises(PeerError) as again:
        installed(environment, tmp_path / "venvs")
    assert str(again.value) == str(first.value)


def test_last_line_is_pips_error_without_folders() -> None:
    said = "ERROR: No matching distribution found for nothing==9\n[notice] a new release\nWARNING: x\n"
    assert last_line(said) == "ERROR: No matching distribution found for nothing==9"
    assert last_line("OSError: '/a/b.so' is missing") == "OSError: 'b.so' is missing"
    assert last_line("") == ""


def test_nearest_neighbours_count_when_the_output_is_an_embedding() -> None:
    reference = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    same = compared(reference * 3, reference, None, embedding=True)
    assert same.agreements == 4
    assert same.right is None
    turned = compared(reference[[0, 2, 1, 3]], reference, None, embedding=True)
    assert turned.agreements < 4


def test_every_row_has_a_script_and_exact_requirements() -> None:
    assert ROWS[0].name == PLAIN
    assert len({each.name for each in ROWS}) == len(ROWS)
    for each in ROWS:
        environment = Environment(each.environment)
        assert environment.script.is_file(), each.name
        assert environment.requirements.is_file() != (each.environment == OURS), each.name
        if environment.requirements.is_file():
            lines = environment.requirements.read_text(encoding="utf-8").split()
            assert all("==" in line for line in lines), each.name
    assert {each.environment for each in rows_of("net", False)} == {OURS, "onnx_runtime"}
    assert [each.name for each in rows_of("net", True, ("nncf",))] == [PLAIN, "openvino-nncf"]
    assert [each.name for each in rows_of("net", True, ("ort-dynamic",))] == [PLAIN, "ort-dynamic"]
    assert [each.name for each in rows_of("net", True, ("tokens",))] == [PLAIN]
    wanted = [PLAIN, "vlexport-int8-tokens", "vlexport-openvino-tokens"]
    assert [each.name for each in rows_of("solar_cells", True, ("tokens",))] == wanted
