"""The receipt, and how its figures are said."""

from __future__ import annotations

import pytest

from tests.report.example_reports import a_bundle, a_report
from vlexport.core.artifact import DimRange
from vlexport.core.bundle_schema import (
    LatencyResult,
    Tuning,
)
from vlexport.report.figures import latency_phrase, macs_phrase, parameters_phrase, size_phrase
from vlexport.report.receipt import MAX_LINES, receipt


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (1_000_000, "1.0 MB"),
        (97_660_000, "97.7 MB"),
        (10 << 30, "10.74 GB"),
    ],
)
def test_size_is_in_decimal_units_when_shown(size: int, shown: str) -> None:
    assert size_phrase(size) == shown


def test_macs_name_what_is_not_counted_when_an_op_is_opaque() -> None:
    assert macs_phrase(2_000_000, ()) == "2.00 MMACs"
    assert macs_phrase(2_304, ()) == "2.30 kMACs", "nothing that is there is shown as zero"
    assert [parameters_phrase(count) for count in (1, 24, 2400, 21_600_000)] == [
        "1 parameter", "24 parameters", "2.40 k parameters", "21.60 M parameters",
    ]  # fmt: skip
    assert macs_phrase(2_000_000_000, ("roi_align",)) == "2.00 GMACs without roi_align"


def test_latency_says_no_ratio_when_there_is_none() -> None:
    report = a_report(a_bundle())
    latency = report.latency
    assert latency is not None
    quick = latency.model_copy(update={"verdict": "quick", "rounds": 3})
    noisy = latency.model_copy(update={"ratio": None, "ratio_low": None, "ratio_high": None, "repeated": 8})
    alone = LatencyResult(p50_ms=4, load_ms=1, runs=5, threads=1)
    said = [latency_phrase(report.model_copy(update={"latency": each})) for each in (quick, noisy, alone, None)]
    assert said == [
        "p50 4.00 ms at 2 threads; 2.00× against image (1.90 to 2.10, range of 3 quick rounds, no verdict)",
        "p50 4.00 ms at 2 threads; against image: too noisy to tell (8 rounds drifted)",
        "p50 4.00 ms at 1 thread",
        "not measured here",
    ]


def test_receipt_has_twelve_lines_at_most_when_there_is_much_to_say() -> None:
    bundle = a_bundle()
    report = a_report(bundle)
    tuning = Tuning(trials=(), confirmation=None, adopted={}, finished=True)
    more = {"verdicts": report.verdicts * 9, "tuning": tuning}
    lines = receipt(bundle, report.model_copy(update=more), "out/my.bundle")
    assert len(lines) <= MAX_LINES == 12
    assert "25 more in the report" in "".join(lines)
    assert "2 notes in the report" in "".join(lines)
    assert lines[3].startswith("Missing  11 of 12 attention modules did not become one operator: image at image and 10")
    assert not [line for line in lines if "\n" in line]
    assert lines[-2] == "Use it:"


def test_gates_that_do_not_hold_come_first_in_the_receipt() -> None:
    bundle = a_bundle()
    report = a_report(bundle)
    passing, inconclusive, failing = sorted(report.verdicts, key=lambda each: each.outcome != "pass")
    assert (passing.outcome, inconclusive.outcome, failing.outcome) == ("pass", "inconclusive", "fail")
    verdicts = (passing, passing, inconclusive, passing, failing)
    lines = receipt(bundle, report.model_copy(update={"verdicts": verdicts, "searches": (), "notes": ()}), "my.bundle")
    said = [line.split(":")[1].split(",")[0].strip() for line in lines if line.startswith("Gate ")]
    assert said == ["fail", "inconclusive"]
    assert "(and 3 more in the report)" in "".join(lines)


def test_work_names_its_batch_when_that_is_more_than_one() -> None:
    bundle = a_bundle()
    main = bundle.main.model_copy(update={"dims": {"batch": DimRange(min=1, opt=8, max=16)}})
    several = bundle.model_copy(update={"components": {"main": main}})
    assert "1.20 GMACs at batch 8 without image" in receipt(several, a_report(several), "my.bundle")[0]
    assert "1.20 GMACs without image" in receipt(bundle, a_report(bundle), "my.bundle")[0]
