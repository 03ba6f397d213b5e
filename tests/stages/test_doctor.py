"""The doctor on machines that are made up: what is missing, too old, broken, hidden or full, and what to type."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlexport.core import requirements, system_packages
from vlexport.core.health import Health, Symptom
from vlexport.core.import_check import import_failures
from vlexport.core.requirements import Requirement, requirements_of
from vlexport.core.system_packages import hidden_package
from vlexport.report.health import health_lines
from vlexport.stages import doctor as stage
from vlexport.stages.doctor import Surroundings, doctor

GOOD = (Requirement("torch", "<2.14,>=2.11", "build", "2.13.0+cpu"), Requirement("numpy", ">=1.26", "", "2.1.0"))


def around(
    *asked: Requirement, failures: dict[str, str] | None = None, folders: Sequence[Path] = (), free: int = 10**11
) -> Surroundings:
    return Surroundings(
        requirements=lambda: asked or GOOD, import_failures=lambda names: failures or {},
        system_folders=lambda: tuple(folders), free_bytes=lambda folder: free,
    )  # fmt: skip


def about(found: Health, name: str) -> Symptom:
    (symptom,) = (each for each in found.symptoms if each.about == name)
    return symptom


def test_everything_is_well_when_what_is_asked_for_is_there() -> None:
    found = doctor(wanted=("build", "onnxruntime"), around=around())
    assert found.works[:2] == ("build models", "run onnxruntime")
    assert (found.unmet, found.exit_code) == ((), 0)
    assert about(found, "torch").found == "2.13.0+cpu"
    assert about(found, "cache").state == "ok"
    lines = health_lines(found)
    assert lines[-1].startswith("Works    build models; run onnxruntime")


@pytest.mark.parametrize(
    ("asked", "failures", "state", "said", "do"),
    [
        (Requirement("torch", ">=2.11", "build", ""), {}, "absent", "not installed, for build",
         "pip install 'vlexport[build]'"),
        (Requirement("numpy", ">=1.26", "", ""), {}, "broken", "not installed", "pip install 'vlexport'"),
        (Requirement("torch", "<2.14,>=2.11", "build", "2.9.1"), {}, "broken", "2.9.1, and <2.14,>=2.11 is wanted",
         "pip install 'torch<2.14,>=2.11'"),
        (Requirement("torch", ">=2.11", "build", "2.13"), {"torch": "OSError: libgomp.so.1"}, "broken",
         "2.13 does not import: OSError: libgomp.so.1", "pip install --force-reinstall 'torch>=2.11'"),
    ],
    ids=["extra", "needed", "old", "broken"],
)  # fmt: skip
def test_package_is_named_with_the_line_to_type_when_it_does_not_fit(
    asked: Requirement, failures: dict[str, str], state: str, said: str, do: str
) -> None:
    found = doctor(wanted=("build",), around=around(asked, failures=failures))
    symptom = about(found, asked.name)
    assert (symptom.state, symptom.found, symptom.do) == (state, said, do)
    assert "build models" not in found.works
    assert found.unmet[0].startswith(f"build: {asked.name} ")
    assert found.exit_code == 4


def test_what_only_developers_need_is_not_missed() -> None:
    asked = Requirement("mypy", "", "dev", "")
    assert all(each.about != "mypy" for each in doctor(around=around(asked)).symptoms)


def test_target_is_unmet_when_it_does_not_run_here() -> None:
    found = doctor(wanted=("coreml",), around=around())
    if sys.platform != "darwin":
        assert (found.unmet, found.exit_code) == (("coreml",), 4)
        assert doctor(around=around()).exit_code == 0, "nobody asked for it"


def test_two_runtimes_over_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "installed_version", lambda name: "1" if name.startswith("onnxruntime") else "")
    symptoms = [each for each in doctor(around=around()).symptoms if each.about == "onnxruntime"]
    assert symptoms[-1].state == "warning"
    assert "onnxruntime and onnxruntime-gpu" in symptoms[-1].found


def _system(root: Path, python: str, *names: str) -> Path:
    folder = root / python / "dist-packages"
    for name in names:
        (folder / name).mkdir(parents=True)
    return folder


def test_tensorrt_of_the_system_is_told_when_the_virtualenv_hides_it(tmp_path: Path) -> None:
    here = ".".join(map(str, sys.version_info[:2]))
    folder = _system(tmp_path, f"python{here}", "tensorrt", "tensorrt-10.3.0.dist-info")
    symptom = about(doctor(around=around(folders=[folder])), "tensorrt")
    assert symptom.state == "warning"
    assert "the system has tensorrt 10.3.0" in symptom.found
    assert "--system-site-packages" in symptom.do
    other = _system(tmp_path, "python3.6", "tensorrt")
    symptom = about(doctor(around=around(folders=[other])), "tensorrt")
    assert "another version of Python" in symptom.found
    assert "/usr/bin/python3" in symptom.do


def test_package_is_not_hidden_when_this_python_sees_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _system(tmp_path, "python3", "tensorrt", "tensorrt-10.3.0-py3.10.egg-info")
    found = hidden_package("tensorrt", [folder])
    assert found is not None
    assert (found.version, found.fits) == ("10.3.0", True), "python3 says nothing of the version"
    monkeypatch.syspath_prepend(str(folder))
    assert hidden_package("tensorrt", [folder]) is None
    assert hidden_package("tensorr", [folder]) is None


def test_virtualenv_hides_nothing_when_it_sees_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    cfg = tmp_path / "pyvenv.cfg"
    cfg.write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    assert system_packages.in_virtualenv()
    cfg.write_text("home = /usr/bin\nInclude-System-Site-Packages = true\n")
    assert not system_packages.in_virtualenv()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert not system_packages.in_virtualenv()


def test_cache_and_room_are_told_when_they_are_wanting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor(around=around(free=10**8))
    assert about(found, "cache").state == "warning"
    assert found.exit_code == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLEXPORT_CACHE", str(tmp_path / "file" / "cache"))
    symptom = about(doctor(around=around()), "cache")
    assert symptom.state == "broken"
    assert "VLEXPORT_CACHE" in symptom.do
    monkeypatch.setenv("VLEXPORT_CACHE", "off")
    assert about(doctor(around=around()), "cache").found == "off: VLEXPORT_CACHE=off"


def test_threads_are_told_when_the_container_allows_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "available_cores", lambda: 8)
    monkeypatch.setattr(stage, "_quota", lambda: 1.5)
    symptom = about(doctor(around=around()), "threads")
    assert (symptom.state, symptom.do) == ("warning", "--threads 1")


def test_imports_are_tried_in_a_child_that_may_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aborts.py").write_text("import os; print('[not ours]'); os.abort()")
    (tmp_path / "raises.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = import_failures(["json", "aborts", "raises", "no_such_module", "csv"])
    assert set(failed) == {"aborts", "raises", "no_such_module"}
    assert failed["aborts"].startswith("the process ended with")
    assert failed["raises"] == "RuntimeError: two"


def test_requirements_of_this_package_are_read_with_extras_and_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=1.26", 'torch<2.14,>=2.11; extra == "build"', 'tomli>=2; python_version < "3.0"', "strange @ file:x",
        'onnxsim>=0.8; python_version >= "3.2" and extra == "build"', 'mine[a]; extra == "all"', "typer (>=0.1)",
    ]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(requirements, "installed_version", lambda name: "")
    found = [(each.name, each.bounds, each.extra) for each in requirements_of("mine")]
    assert found == [
        ("numpy", ">=1.26", ""), ("torch", "<2.14,>=2.11", "build"), ("strange", "@ file:x", ""),
        ("onnxsim", ">=0.8", "build"), ("typer", ">=0.1", ""),
    ]  # fmt: skip
    assert requirements_of("mine")[2].fits, "what is not understood excludes nothing"


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True), ("2.14", ">=2.11,<2.14", False), ("2.14.0", "<2.14", False),
        ("2.9", ">=2.11", False), ("1.10", ">=1.9", True), ("1.0", "==1", True), ("1.0.1", "==1", False),
        ("3", "!=3.0", False), ("3", "~=2", True), ("3", "==2.*", True), ("dev", ">=2", True),
    ],
)  # fmt: skip
def test_version_is_held_to_its_bounds(version: str, bounds: str, fits: bool) -> None:
    assert Requirement("x", bounds, "", version).fits is fits


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_exactly_one_of_below_equal_above_holds(a: list[int], b: list[int]) -> None:
    version, bound = (".".join(map(str, each)) for each in (a, b))
    assert sum(Requirement("x", f"{op}{bound}", "", version).fits for op in ("<", "==", ">")) == 1
