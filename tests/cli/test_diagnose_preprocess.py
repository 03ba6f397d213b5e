"""``validate --diagnose-preprocess`` on the command line, and where it is offered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.json_schema_check import problems
from vlexport.core.outputs import schema_named


def test_command_cannot_tell_when_all_is_right(cli: Any, bundle: Path, make: Any) -> None:
    for i in range(90):
        make.photo(Path("photos") / ("red", "green", "blue")[i % 3] / f"{i}.png", i % 3)
    code, out, err = cli("validate", "bundle", "--data", "photos", "--diagnose-preprocess", "--samples", "60")
    assert code == 5, err
    assert out.startswith("Cannot   cannot tell: 100.0 against 100.0 on ")
    code, out, _ = cli(
        "validate", "bundle", "--data", "photos", "--diagnose-preprocess", "--format", "github", "--samples", "20"
    )
    assert out.startswith("::warning title=vlexport validate%3A preprocessing::inconclusive")
    err = cli.refused(
        2, "VLX0703", "validate", "bundle", "--data", "photos", "--diagnose-preprocess", "--gate", "top1>=1"
    )
    assert "--gate" in err
    code, out, _ = cli("validate", "bundle", "--data", "photos", "--diagnose-preprocess", "--samples", "20", "--json")
    assert (code, json.loads(out)["diagnosis"]["verdict"]) == (5, "cannot tell")
    assert problems(json.loads(out), schema_named("validate")) == []


def test_doctor_is_offered_when_the_model_looks_wrong(cli: Any, bundle: Path, make: Any) -> None:
    labels = [0, 1, 2] * 20
    data = make.npz(Path("x.npz"), labels, labels=list(np.roll(labels, 1)))
    err = cli.refused(1, "VLX0211", "validate", "bundle", "--data", data)
    assert "--diagnose-preprocess" in err
    half = [label if i % 2 else (label + 1) % 3 for i, label in enumerate(labels[:12])]
    data = make.npz(Path("y.npz"), labels[:12], labels=half)
    code, out, _ = cli("validate", "bundle", "--data", data)
    assert code == 0
    assert "--diagnose-preprocess" in out
