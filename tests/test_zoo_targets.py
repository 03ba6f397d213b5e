"""The machinery of the zoo for all targets, and what is recorded of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import zoo_targets
from tests.zoo_child import ROOT
from tests.zoo_target_models import MODELS
from tests.zoo_targets import RANGE, RANGED, TARGETS, Row, examine, failures, page, run_child, table

RECORD = json.loads((ROOT / "docs/measured/zoo_targets.json").read_text(encoding="utf-8"))
ROWS = [Row(**values) for values in RECORD["rows"]]
GOOD = Row("m", "onnxruntime", "dynamic", "built", error=1e-6, variation=0.3)


def test_page_is_that_of_the_record_when_it_is_committed() -> None:
    text = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    assert page(text, RECORD, MODELS) == text, "python -m tests.zoo_targets --render --record … --docs docs/zoo.md"


def test_record_holds_every_target_when_it_names_a_model() -> None:
    models = {row.model for row in ROWS}
    assert models <= set(MODELS)
    wanted = {(model, target, "") for model in models for target in TARGETS}
    wanted |= {(model, "tensorrt", RANGE) for model in models & set(RANGED)}
    assert {row.key for row in ROWS} == wanted


def test_promise_is_kept_when_a_row_is_no_known_exception() -> None:
    assert failures(ROWS) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (replace(GOOD, outcome="refused", reason="VLX0503: x"), "refused: VLX0503: x"),
        (replace(GOOD, error=2e-4), "differs from eager"),
        (replace(GOOD, error=None), "differs from eager"),
        (replace(GOOD, error=float("nan")), "differs from eager"),
        (replace(GOOD, variation=1e-5), "do not vary"),
        (replace(GOOD, target="tensorrt"), "neither an engine nor a reason"),
        (replace(GOOD, target="coreml"), "not read back"),
    ],
)
def test_failure_is_named_when_a_row_breaks_the_promise(row: Row, said: str) -> None:
    assert failures([GOOD]) == []
    (found,) = failures([GOOD, row])
    assert said in found
    assert found.startswith("m/")


def test_row_says_why_when_its_process_dies_or_takes_too_long() -> None:
    (dead,) = run_child("no_such_model", ["onnxruntime"], "", 60)
    assert (dead.outcome, dead.target) == ("died", "onnxruntime")
    assert "no_such_model" in dead.reason
    (late,) = run_child("clip_text", ["coreml"], "", 0.01)
    assert (late.outcome, late.reason) == ("died", "stopped after 0 s")


def test_nothing_is_run_when_the_record_holds_the_same_versions(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def child(name: str, targets: Any, dims: str, timeout_s: float) -> list[Row]:
        asked.append((name, tuple(targets)))
        return [replace(GOOD, model=name, target=target) for target in targets]

    monkeypatch.setattr(zoo_targets, "run_child", child)
    words = ["zoo_targets", "--record", str(tmp_path / "r.json"), "--only", "clip_text", "--target", "onnxruntime"]
    monkeypatch.setattr("sys.argv", words)
    assert zoo_targets.main() == 0
    assert zoo_targets.main() == 0
    assert asked == [("clip_text", ("onnxruntime",))]
    monkeypatch.setattr("sys.argv", [*words, "--target", "coreml"])
    zoo_targets.main()
    assert asked[1:] == [("clip_text", ("coreml",))]
    monkeypatch.setattr(zoo_targets, "versions", lambda: "torch 99")
    zoo_targets.main()
    assert asked[2:] == [("clip_text", ("onnxruntime", "coreml"))]


def test_reasons_are_numbered_remarks_when_the_table_is_rendered() -> None:
    rows = [
        {**vars(GOOD)},
        {**vars(replace(GOOD, target="coreml", outcome="refused", reason="VLX0503: a|b"))},
        {**vars(replace(GOOD, model="n", target="coreml", outcome="refused", reason="VLX0503: a|b"))},
        {**vars(replace(GOOD, model="o", target="tensorrt", precision="fp32", reason="fp16: c", engine="yes"))},
    ]
    text = table({"rows": rows})
    assert "| m | built | dynamic | 1e-06 | - | - | - | refused [1] |" in text
    assert "| n | - | - | - | - | - | - | refused [1] |" in text
    assert "| o | - | - | - | built in fp32 [2] | yes | - | - |" in text
    assert text.endswith("1. VLX0503: a\\|b\n2. fp16: c\n")


@pytest.mark.zoo
def test_small_model_is_built_and_compared_when_it_is_examined() -> None:
    (row,) = examine("clip_text", ["onnxruntime"])
    assert failures([row]) == []
    assert row.batch == "dynamic"
