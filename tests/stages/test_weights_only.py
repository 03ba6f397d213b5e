"""--set quantize.weights_only=int8 without calibration samples: the bundle is small, verified, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlexport
from tests.targets.test_small_weights import Text, ids
from vlexport.core.bundle import DECISIONS_FILE, TABLE_FILE, read_bundle
from vlexport.core.config import BuildConfig
from vlexport.stages.build import BuildResult, build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vlexport.save(Text().eval(), folder / "model.pt", inputs={"ids": ids()})
    config = BuildConfig(
        model=str(folder / "model.pt"), output=str(folder / "o.bundle"), precision="int8", profile=False, threads=1,
        options={"quantize.weights_only": "int8"},
    )  # fmt: skip
    return build(config)


def test_bundle_is_verified_and_has_decisions_but_no_ranges(built: BuildResult) -> None:
    bundle = read_bundle(built.output)
    assert (bundle.precision, bundle.state) == ("int8", "verified")
    assert DECISIONS_FILE in bundle.files
    assert TABLE_FILE not in bundle.files
    record = next(each for each in bundle.main.passes if each.name == "quantize")
    assert {each.what: each.count for each in record.changes} == {
        "conv2d with int8 weights": 1, "embedding with int8 weights": 1, "linear with int8 weights": 2,
    }  # fmt: skip
    assert record.gate.value is not None
    assert record.gate.value >= 30
    floats = sum(each.numel() for each in Text().parameters()) * 4
    assert sum(f.stat().st_size for f in (Path(built.output) / "artifact").iterdir()) < 0.3 * floats


def test_receipt_says_that_nothing_becomes_faster(built: BuildResult) -> None:
    assert any("weights alone" in note for note in built.report.notes)
    assert any(note.startswith("only the files are smaller") for note in built.report.notes)
