"""A path that is not there is refused in an instant: nothing heavy is imported to find out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_loaded_modules import HEAVY, ROOT

LONG = "a" * 300
"""A name that no file system holds."""
MISSING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("VLX0101", ("inspect", "no.pt")),
    ("VLX0101", ("inspect", "no.pt", "--target", "all")),
    ("VLX0102", ("inspect", "empty")),
    ("VLX0102", ("build", "bundle")),
    ("VLX0114", ("inspect", "somebody/something")),
    ("VLX0110", ("inspect", "model.pt", "--arch", "no.py:make")),
    ("VLX0101", ("build", "no.pt")),
    ("VLX0101", ("build", "no.pt", "--target", "all", "--plan")),
    ("VLX0705", ("build", "model.pt", "--recipe", "no.toml")),
    ("VLX0201", ("build", "model.pt", "--data", "no")),
    ("VLX0201", ("build", "model.pt", "--calib", "no.npz")),
    ("VLX0201", ("build", "model.pt", "--data", "no.py:samples")),
    ("VLX0201", ("build", "model.pt", "--metric", "no.py:score")),
    ("VLX0607", ("build", "model.pt", "-o", "no/bundle")),
    ("VLX0604", ("build", "model.pt", "-o", "bundle")),
    ("VLX0607", ("build", "model.pt", "--dump", "model.pt")),
    ("VLX0101", ("bisect", "no.pt")),
    ("VLX0201", ("bisect", "model.pt", "--data", "no")),
    ("VLX0601", ("validate", "no", "--data", "data.npz")),
    ("VLX0201", ("validate", "bundle", "--data", "no")),
    ("VLX0101", ("validate", "bundle", "--data", "data.npz", "--reference", "no.pt")),
    ("VLX0601", ("validate", "bundle", "--data", "data.npz", "--baseline", "no")),
    ("VLX0101", ("validate", "bundle", "--data", "data.npz", "--reference", "no.pt", "--diagnose-preprocess")),
    ("VLX0601", ("profile", "no")),
    ("VLX0601", ("profile", "bundle", "--against", "no")),
    ("VLX0101", ("profile", "bundle", "--against", "naive", "--reference", "no.pt")),
    ("VLX0601", ("verify", "no")),
    ("VLX0601", ("run", "no", "data.npz")),
    ("VLX0201", ("run", "bundle", "no.png")),
    ("VLX0201", ("run", "bundle", LONG)),
    ("VLX0201", ("validate", "bundle", "--data", LONG)),
    ("VLX0101", ("validate", "bundle", "--data", "data.npz", "--reference", LONG)),
    ("VLX0607", ("run", "bundle", "data.npz", "-o", "no/out.npz")),
    ("VLX0601", ("compare", "no", "bundle")),
    ("VLX0601", ("compare", "bundle", "no")),
    ("VLX0703", ("explain", "no")),
    ("VLX0703", ("explain", LONG)),
    ("VLX0705", ("bisect", "model.pt", "--recipe", LONG)),
    ("VLX0110", ("inspect", "model.pt", "--arch", f"{LONG}.py:make")),
    ("VLX0201", ("build", "model.pt", "--metric", f"{LONG}.py:score")),
    ("VLX0601", ("profile", "bundle", "--against", LONG)),
)
_SCRIPT = """
import contextlib, io, json, sys
from vlexport.cli.main import main
found = []
for case in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(case)
    found.append((code, said.getvalue(), sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(
    model_file: Path, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], tuple[int, str, list[str]]]:
    """Command → exit code, what was said and the heavy modules that are loaded behind it; one new interpreter."""
    folder = tmp_path_factory.mktemp("paths")
    (folder / "empty").mkdir()
    shutil.copy(model_file, folder / "model.pt")
    shutil.copytree(built, folder / "bundle")
    np.savez(folder / "data.npz", image=np.zeros((2, 3, 8, 8), np.float32), label=np.array([0, 1]))
    cases = [arguments for _, arguments in MISSING]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(cases), json.dumps(HEAVY)], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("code", "arguments"), MISSING, ids=[" ".join(each)[:60] for _, each in MISSING])
def test_missing_path_is_refused_before_anything_heavy_is_imported(
    code: str, arguments: tuple[str, ...], answers: dict[tuple[str, ...], tuple[int, str, list[str]]]
) -> None:
    exit_code, said, heavy = answers[arguments]
    assert said.startswith(f"error {code}: "), said
    assert exit_code in (1, 2)
    assert heavy == []
