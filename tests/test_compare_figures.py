"""The comparison's page, its tables and its figure are those of the record."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from tests.benchmarks.compare_cells import MODEL, Fused, Place, fused, headroom
from tests.benchmarks.compare_rows import ROWS
from tests.benchmarks.compare_tables import at_batch, comma_separated, machine, points, summary, table

ROOT = Path(__file__).resolve().parents[1]
RECORDS = {
    page: json.loads((ROOT / f"docs/measured/{page}.json").read_text(encoding="utf-8"))
    for page in ("compare", "compare_amx")
}
MANY = ROOT / "docs/measured/compare_models.json"
BATCH8 = ROOT / "docs/measured/compare_batch8.json"
BUILT = {"seconds": 12.34, "peak_bytes": 2_000_000_000, "size_bytes": 23_000_000, "versions": {}, "load": 1.0}
MACHINE = {"cpu": "a processor", "instruction_set": ["avx2"], "cores": 2}
TIMED = {
    "p50_ms": 20.0, "plain_ms": 40.0, "ratio": 2.0, "low": 1.9, "high": 2.1, "rounds": 7, "repeated": 1,
    "load_ms": 90.0, "peak_bytes": 300_000_000,
}  # fmt: skip


def cell(row: str, **more: Any) -> dict[str, Any]:
    judged = {
        "samples": 200, "sqnr_db": 25.04, "cosine": 0.999, "agreements": 196, "right": 170, "plain_only": 3,
        "this_only": 1,
    }  # fmt: skip
    held = {"built": BUILT, "judged": judged, "timed": TIMED, "failed": "", "date": ""}
    return {"model": "net", "row": row, **held, **more}


@pytest.mark.parametrize("name", RECORDS)
def test_page_holds_every_table_when_rendered_from_the_record(name: str) -> None:
    page, record = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8"), RECORDS[name]
    models = list(dict.fromkeys(each["model"] for each in record["cells"]))
    assert models
    assert f"<!-- machine -->\n{machine(record, f'{name}.json')}\n<!-- /machine -->" in page
    for model in models:
        held = page.partition(f"<!-- {model} -->\n")[2].partition(f"\n<!-- /{model} -->")[0]
        assert held == table(record, model), model


def test_page_holds_the_line_of_every_model_when_many_were_measured() -> None:
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    held = page.partition("<!-- many -->\n")[2].partition("\n<!-- /many -->")[0]
    record = json.loads(MANY.read_text(encoding="utf-8"))
    assert held == f"{machine(record, MANY.name)}\n\n{summary(record)}"


def test_page_holds_the_line_of_every_row_when_eight_samples_were_run_at_once() -> None:
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    held = page.partition("<!-- batch8 -->\n")[2].partition("\n<!-- /batch8 -->")[0]
    if not BATCH8.is_file():
        assert held == "Not measured yet."
        return
    record = json.loads(BATCH8.read_text(encoding="utf-8"))
    assert record["batch"] == 8
    assert held == f"{machine(record, BATCH8.name)}\n\n{at_batch(record)}"


@pytest.mark.parametrize("name", RECORDS)
def test_record_holds_no_path_and_every_row_by_its_name(name: str) -> None:
    assert "/tmp" not in json.dumps(RECORDS[name])
    assert {each["row"] for each in RECORDS[name]["cells"]} <= {row.name for row in ROWS}


def test_table_says_ratio_drop_and_interval_when_all_is_known() -> None:
    lines = table({"machine": MACHINE, "cells": [cell("vlexport-int8")]}, "net").splitlines()
    assert len(lines) == 3
    assert lines[2].startswith(
        "| **vlexport --precision int8** | int8 | 20.0 ms | 2.00× (1.90 to 2.10) | 85.0 % | 1.0 ("
    )
    assert lines[2].endswith("| 98.0 % (≥ 95.0) | 25.0 dB | 23.0 MB | 12.3 s | 300 MB |")


def test_table_leaves_columns_out_when_nothing_has_them() -> None:
    judged = {**cell("x")["judged"], "right": None, "plain_only": None, "this_only": None}
    text = table({"machine": MACHINE, "cells": [cell("plain", judged=judged, timed=None)]}, "net")
    assert text.splitlines()[0] == "| built by | precision | same answer | SQNR | size | build | memory |"
    assert "| reference | reference |" in text


def test_table_says_why_when_a_peer_failed_or_was_too_noisy() -> None:
    noisy = cell("openvino-fp32", timed={**TIMED, "ratio": None, "low": None, "high": None})
    broken = cell("litert-fp32", built=None, judged=None, timed=None, failed="RuntimeError: no such operator")
    text = table({"machine": MACHINE, "cells": [noisy, broken]}, "net")
    assert "too noisy to tell" in text
    assert text.endswith("Not there:\n\n- LiteRT: `RuntimeError: no such operator`")


def test_table_marks_builds_that_others_disturbed() -> None:
    disturbed = cell("ort-dynamic", built={**BUILT, "load": 9.0})
    text = table({"machine": MACHINE, "cells": [cell("plain"), disturbed]}, "net")
    assert text.count("12.3 s †") == 1
    assert text.endswith("the seconds are too many.")


def counted(idea: str, found: int) -> dict[str, Any]:
    return {"idea": idea, "expected": 25 if idea == "norm" else 12, "found": found, "reasons": []}


def test_every_module_that_promises_it_became_one_operator_in_every_recorded_model() -> None:
    cells = json.loads(MANY.read_text(encoding="utf-8"))["cells"]
    counted = [(cell["model"], each) for cell in cells for each in cell.get("fused", [])]
    assert counted
    for model, each in counted:
        told = each["idea"] == "fused attention" and each["reasons"]  # left by the runtime's own operators
        assert each["found"] == each["expected"] or told, (model, each)


def test_bundle_tells_what_became_one_operator(tmp_path: Path) -> None:
    row, source, place = next(row for row in ROWS if row.ours), tmp_path / "net", Place(tmp_path)
    missing = [{"of": "softmax", "reason": "too wide", "modules": ["a"]}]
    account = {"idea": "norm", "expected": 3, "found": 2, "missing": missing * 2, "fates": {}, "beyond": 0}
    folder = place.folder("net", row) / "artifact/bundle"
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text(json.dumps({"components": {"main": {"account": [account]}}}))
    assert fused(place, row, source) == (Fused("norm", 3, 2, ("too wide",)),)
    assert fused(place, ROWS[0], source) == ()


def test_summary_has_a_line_a_model_and_their_geometric_mean() -> None:
    cells = [
        cell("vlexport-fp32", fused=[counted("attention", 12), counted("fused attention", 11), counted("norm", 25)]),
        cell("vlexport-fp32", model="other", timed={**TIMED, "ratio": 0.5, "low": 0.4, "high": 0.6}),
        cell("vlexport-fp32", model="noisy", timed={**TIMED, "ratio": None}), cell("plain", outside=0.25),
        cell("vlexport-fp32", model="broken", built=None, judged=None, timed=None, failed="no"),
        cell("vlexport-fp32", model="rep", timed={**TIMED, "ratio": 3.0}),
        cell("vlexport-fp32", model="rep_merged"), cell("vlexport-fp32", model="two_merged"),
    ]  # fmt: skip
    assert summary({"machine": MACHINE, "cells": cells}).splitlines()[2:] == [
        "| net | 40.0 ms | 25 % | 20.0 ms | 2.00× (1.90 to 2.10) | 2.00× (1.90 to 2.10) | 25 dB | 23.0 MB "
        "| 12 of 12, 11 in operators of the runtime's own | 25 of 25 | – |",
        "| other | 40.0 ms | – | 20.0 ms | 0.50× (0.40 to 0.60) | – | 25 dB | 23.0 MB | – | – | – |",
        "| noisy | 40.0 ms | – | 20.0 ms | too noisy to tell | – | 25 dB | 23.0 MB | – | – | – |",
        "| broken | `no` | | | | | | | | | |",
        "| rep | 40.0 ms | – | 20.0 ms | 3.00× (1.90 to 2.10) | – | 25 dB | 23.0 MB | – | – | – |",
        "| rep_merged | 40.0 ms | – | 20.0 ms | 2.00× (1.90 to 2.10) | – | 25 dB | 23.0 MB | – | – | – |",
        "| two_merged | 40.0 ms | – | 20.0 ms | 2.00× (1.90 to 2.10) | – | 25 dB | 23.0 MB | – | – | – |",
        "",
        "Geometric mean of 2 models: 1.00×.",
        "Geometric mean of 2 models over the form that their authors merge them to: 2.00×.",
    ]


def test_batches_have_a_line_a_row_and_a_mean_only_of_several_models() -> None:
    int8 = cell("vlexport-int8", timed={**TIMED, "ratio": 2.5})
    alone = at_batch({"machine": MACHINE, "cells": [cell("plain"), cell("vlexport-fp32"), int8]}).splitlines()[2:]
    assert [line.count("|") for line in alone] == [8, 8]
    other = cell("vlexport-fp32", model="other", timed={**TIMED, "ratio": 0.5})
    both = at_batch({"machine": MACHINE, "cells": [cell("vlexport-fp32"), int8, other]}).splitlines()[2:]
    assert both[:2] == alone
    assert both[3:] == ["", "Geometric mean of 2 models: 1.00×."]


@pytest.mark.parametrize(("operator", "least", "most"), [("MatMul", 0.0, 0.999), ("Add", 1.0, 1.0)])
def test_headroom_is_the_share_of_time_outside_products(
    operator: str, least: float, most: float, tmp_path: Path
) -> None:
    row, source, place = ROWS[0], tmp_path / "models/net", Place(tmp_path)
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        main (float[64,64] x) => (float[64,64] z)
        {{
          y = {operator}(x, x)
          z = Exp(y)
        }}
    """
    for folder in (source, place.folder("net", row) / "artifact"):
        folder.mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(text), place.folder("net", row) / "artifact" / MODEL)
    np.savez(source / "samples.npz", x=np.ones((64, 64), np.float32))
    (source / "model.json").write_text(json.dumps({"batch": 64, "built_from": "", "judged_on": ""}))
    found = headroom(place, row, source, 1)
    assert least <= found.outside <= most
    assert headroom(place, row, source, 1) == found, "it is measured once"


def test_csv_and_figure_hold_every_timed_cell() -> None:
    record = {
        "machine": MACHINE,
        "cells": [cell("plain"), cell("vlexport-fp32"), cell("litert-fp32", timed=None, failed="x")],
    }
    read = list(csv.DictReader(io.StringIO(comma_separated(record))))
    assert [each["row"] for each in read] == ["plain", "vlexport-fp32", "litert-fp32"]
    assert (read[1]["ratio"], read[1]["run_peak_bytes"], read[2]["failed"]) == ("2.0", "300000000", "x")
    assert [(each["name"], each["ours"], each["value"]) for each in points(record)["net"]] == [
        ("plain", False, 85.0),
        ("vlexport-fp32", True, 85.0),
    ]
