"""The machinery of the raising zoo, and what is recorded of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests import zoo_raising
from tests.zoo_child import ROOT, run_alone
from tests.zoo_raising import Row, examine, failures, rendered, rows_of, run_child, summary, table, unexplained
from tests.zoo_raising_models import MODELS, SPELLINGS

RECORD = json.loads((ROOT / "docs/measured/zoo_raising.json").read_text(encoding="utf-8"))
ROWS = rows_of(RECORD)
ATTENTION = {"idea": "attention", "expected": 2, "found": 2, "fates": {}, "beyond": 0, "missing": []}
MISSING = {"of": "XCA", "reason": "softmax | over channels", "modules": ["a"]}
GOOD = Row(
    "m", "fused", "raised", accounts=(ATTENTION,), digest="1", calls=(9, 5), macs=(4_000_000, 3_000_000), error32=1e-6,
    error64=1e-15, seconds={"raise-attention": 0.25, "canonicalize": 0.05},
)  # fmt: skip
SHORT = replace(
    GOOD, spelling="eager", accounts=({**ATTENTION, "found": 1, "missing": [MISSING]},), digest="2", unmasked="2"
)


def test_page_is_that_of_the_record_when_it_is_committed() -> None:
    text = (ROOT / "docs/raising.md").read_text(encoding="utf-8")
    assert rendered(text, RECORD) == text, "python -m tests.zoo_raising --render --record … --docs docs/raising.md"


@pytest.mark.zoo
def test_record_holds_every_model_in_both_spellings_when_it_is_complete() -> None:
    assert [row.key for row in ROWS] == [(model, spelling) for model in MODELS for spelling in SPELLINGS]


@pytest.mark.zoo
def test_promise_is_kept_when_a_row_is_no_known_exception() -> None:
    assert failures(ROWS) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (replace(GOOD, outcome="crashed", reason="KeyError: x"), "crashed: KeyError: x"),
        (replace(GOOD, error32=2e-4), "differs from the captured graph by 0.0002"),
        (replace(GOOD, error32=float("nan")), "differs from the captured graph by nan"),
        (replace(GOOD, error64=1e-8), "differs from the captured graph by 1e-08"),
        (replace(GOOD, error32=None), "was not run"),
        (replace(GOOD, macs=(4, 5)), "1 MACs more than captured"),
        (replace(GOOD, accounts=({**ATTENTION, "found": 1},)), "1 attention modules without a reason"),
    ],
)
def test_failure_is_named_when_a_row_breaks_the_promise(row: Row, said: str) -> None:
    assert failures([GOOD, SHORT]) == []
    (found,) = failures([GOOD, row])
    assert said in found
    assert found.startswith("m/fused")


def test_modules_are_named_when_no_pass_said_why_they_are_missing() -> None:
    spelled = {**MISSING, "reason": "spelled with pow, in a way that no pass knows"}
    rows = [SHORT, replace(GOOD, accounts=({**ATTENTION, "missing": [spelled]},))]
    assert unexplained(rows) == ["m/fused: 1 XCA: spelled with pow, in a way that no pass knows"]


def test_row_says_why_when_its_process_takes_too_long() -> None:
    rows = run_child("bert", 0.01)
    assert [(row.spelling, row.outcome, row.reason) for row in rows] == [
        (spelling, "died", "stopped after 0 s") for spelling in SPELLINGS
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no such model')", "exit status 1: no such model"),
        ("import os; os.abort()", "exit status -6: "),
        ("x = bytearray(1 << 31)", "exit status 1: MemoryError"),
    ],
)
def test_child_says_how_it_ended_when_it_fails(code: str, said: str, tmp_path: Path) -> None:
    assert run_alone(["-c", code], tmp_path, timeout_s=60, memory_bytes=1 << 30).startswith(said)


def test_only_what_has_changed_is_run_when_the_record_holds_the_rest(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []

    def child(name: str, timeout_s: float, captured: Path | None) -> list[Row]:
        asked.append(name)
        return [replace(GOOD, model=name), replace(SHORT, model=name)]

    monkeypatch.setattr(zoo_raising, "run_child", child)
    words = ["zoo_raising", "--record", str(tmp_path / "r.json"), "--only", "bert"]
    monkeypatch.setattr("sys.argv", words)
    assert zoo_raising.main() == 0
    assert zoo_raising.main() == 0
    assert asked == ["bert"]
    monkeypatch.setattr(zoo_raising, "code", lambda: "another")
    zoo_raising.main()
    assert asked == ["bert", "bert"]
    kept = rows_of(json.loads((tmp_path / "r.json").read_text(encoding="utf-8")))
    assert [replace(row, versions="", code="") for row in kept] == [replace(r, model="bert") for r in (GOOD, SHORT)]
    assert {row.code for row in kept} == {"another"}


def test_reasons_are_numbered_remarks_when_the_table_is_rendered() -> None:
    refused = [replace(GOOD, model="n", outcome="refused", reason="VLX0301: x", spelling=s) for s in SPELLINGS]
    rows = [GOOD, SHORT, *refused, replace(GOOD, model="o"), replace(GOOD, model="o", spelling="eager")]
    rows += [replace(GOOD, model="p"), replace(GOOD, model="p", spelling="eager", digest="3")]
    text = table({"rows": [asdict(row) for row in rows]})
    assert "| m | 2 of 2, 1 of 2 [1] | - | - | no | 1e-06 | 1e-15 | 0.004 → 0.003 | 9 → 5 | 0.3 |" in text
    assert "| n | refused [2] |" in text
    assert "| o | 2 of 2 | - | - | yes |" in text
    assert "| p | 2 of 2 | - | - | but masks |" in text
    assert text.endswith("1. XCA: softmax \\| over channels\n2. VLX0301: x\n")
    assert summary(rows[:2]).startswith("1 models in two spellings: 3 of 4 attention modules, 0 of 0 norm modules")


@pytest.mark.zoo
def test_small_model_is_raised_in_both_spellings_when_it_is_examined(tmp_path: Path) -> None:
    rows = examine("clip_vision", tmp_path)
    assert failures(rows) == []
    assert [row.account("attention") for row in rows] == [
        {**ATTENTION, "fates": {"scaled_dot_product_attention": 2}} for _ in SPELLINGS
    ]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".pt", ".pt"]
    assert examine("clip_vision", tmp_path)[0].digest == rows[0].digest, "the captured models were kept"
