"""The benchmark of ONNX Runtime's own operators: what it writes into the table of costs, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.benchmarks import onnxruntime_fusions as benchmark
from tests.benchmarks.onnxruntime_fusions import PLAIN, Row, costs_of, table, write_costs
from tests.figures import require_figures
from vlexport.core.bundle_schema import Machine
from vlexport.targets.onnxruntime.fusions import FusionCost

SOURCE = "a processor, 2 threads"
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "onnxruntime.md"
RECORDS = sorted((DOCS / "measured").glob("onnxruntime_fusions*.json"))
"""One a processor."""


def row(variant: str, against: str, ratio: float | None, *, spread: float = 0.01) -> Row:
    low, high = (None, None) if ratio is None else (ratio - spread, ratio + spread)
    return Row(variant, against, 20.0, 40.0, ratio, low, high, 7, 0, "faster", 22_500_000)


def machine(*flags: str, cpu: str = "a processor") -> Machine:
    return Machine(cpu=cpu, instruction_set=flags, cores=2, system="", python="")


ROWS = [
    row("fp32", PLAIN, 1.1),
    row("fp32-attention", PLAIN, 1.15),
    row("fp32-attention", "fp32", None),
    row("static-qattention", PLAIN, 2.6),
    row("static-qattention", "static", 1.15),
]


def test_costs_are_those_of_a_fusion_against_the_same_without_it_on_this_kind_of_processor() -> None:
    (found,) = costs_of(ROWS, SOURCE, machine("avx2", "avx512f", "avx512_vnni"))
    assert (found.fusion, found.precision, found.instruction_set) == ("fuse-qattention", "int8", "avx512_vnni")
    assert (found.ratio, found.low, found.high, found.source) == (1.15, 1.14, 1.16, SOURCE)
    assert found.processor == "a processor"
    assert costs_of(ROWS, SOURCE, machine("avx2"))[0].instruction_set == "avx2"
    (masked,) = costs_of([row("tome-biased-attention", "tome", 1.05)], SOURCE, machine("avx2"))
    assert (masked.fusion, masked.model) == (
        "fuse-biased-attention", "deit_small_patch16_224 with --tokens tome:r=13",
    )  # fmt: skip


def test_figures_replace_those_of_the_same_processor_and_keep_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def known(flag: str, low: float, cpu: str = "a processor") -> FusionCost:
        (found,) = costs_of([row("static-qattention", "static", low + 0.01)], SOURCE, machine(flag, cpu=cpu))
        return found

    old = (known("avx512_vnni", 0.9), known("avx512_vnni", 1.1, "another"), known("avx2", 1.05))
    monkeypatch.setattr(benchmark, "fusion_costs", lambda: old)
    write_costs(tmp_path / "costs.json", [known("avx512_vnni", 1.2)])
    written = [FusionCost.model_validate(each) for each in json.loads((tmp_path / "costs.json").read_text())]
    assert [(each.instruction_set, each.low) for each in written] == [
        ("avx512_vnni", 1.1), ("avx512_vnni", 1.2), ("avx2", 1.05),
    ]  # fmt: skip


def test_table_has_a_line_a_variant_with_what_its_fusion_gains() -> None:
    where = {"cpu": "a processor", "cores": 2}
    rows = [asdict(each) for each in (*ROWS, row("tome-biased-attention", "tome", 1.05))]
    record = {"date": "2026-01-01", "machine": where, "versions": "onnxruntime 1", "rows": rows}
    assert table(record).splitlines()[4:] == [
        "| fp32 | 20.0 ms | 1.10× (1.09 to 1.11) |  | 22.5 MB |",
        "| fp32-attention | 20.0 ms | 1.15× (1.14 to 1.16) | too noisy | 22.5 MB |",
        "| static-qattention | 20.0 ms | 2.60× (2.59 to 2.61) | 1.15× (1.14 to 1.16) | 22.5 MB |",
        "| tome-biased-attention | 20.0 ms |  | 1.05× (1.04 to 1.06) | 22.5 MB |",
    ]


@pytest.mark.parametrize("file", RECORDS, ids=lambda each: each.stem)
def test_page_holds_the_table_of_the_record(file: Path) -> None:
    require_figures(PAGE, file.stem, table(json.loads(file.read_text(encoding="utf-8"))))


def test_shipped_costs_are_those_of_the_records() -> None:
    made = []
    for file in RECORDS:
        record = json.loads(file.read_text(encoding="utf-8"))
        made += costs_of([Row(**each) for each in record["rows"]], "", Machine.model_validate(record["machine"]))
    shipped = [each.model_copy(update={"source": ""}) for each in benchmark.fusion_costs()]
    assert sorted(shipped, key=repr) == sorted(made, key=repr)


def test_a_fusion_is_measured_against_a_variant_that_differs_in_nothing_else() -> None:
    named = {each.name: each for each in benchmark.VARIANTS}
    for each in benchmark.VARIANTS:
        if each.fusion:
            option = f"onnxruntime.{each.fusion.replace('-', '_')}"
            other = named[each.without]
            assert (each.options[option], other.options[option]) == ("true", "false")
            assert {**each.options, option: ""} == {**other.options, option: ""}
            assert (each.precision, each.tokens) == (other.precision, other.tokens)
            assert each.against == ((other.name,) if each.tokens else (PLAIN, other.name))
