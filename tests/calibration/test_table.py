"""calibration.json: written for people, read with care, and refused where it does not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.planted import dataset, images, program
from vlexport.calibration.collect import Want, collect
from vlexport.calibration.methods import Method
from vlexport.calibration.seen import Collected
from vlexport.calibration.table import (
    TABLE_SCHEMA,
    CalibrationTable,
    TableKey,
    read_table,
    require_same,
    table_of,
    table_text,
    why_other,
    write_table,
)
from vlexport.core.errors import DataError


@pytest.fixture(scope="module")
def collected() -> Collected:
    net = program()
    return collect(net, dataset(images(6), net), lambda n: Want(channel_axis=1 if n.name.startswith("conv") else None))


@pytest.fixture(scope="module")
def table(collected: Collected) -> CalibrationTable:
    return table_of(collected, Method(name="percentile", percentile=99.0))


def test_table_comes_back_when_written(table: CalibrationTable, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    write_table(table, file)
    assert read_table(file) == table
    assert table.edits() == ()


def test_table_has_a_line_a_value_and_the_same_bytes_when_made_again(
    table: CalibrationTable, collected: Collected
) -> None:
    text = table_text(table)
    assert text == table_text(table_of(collected, table.method))
    lines = [line for line in text.splitlines() if line.startswith('  {"value"')]
    assert len(lines) == len(table.values) == len(collected.values)
    conv = json.loads(next(line for line in lines if '"conv2d"' in line).rstrip(","))
    assert {"value", "op", "module", "source", "low", "high", "measured", "extremes", "typical", "channels"} == set(
        conv
    )
    assert (conv["module"], len(conv["channels"]["low"])) == ("stem", 4)


def test_one_collection_serves_every_method(collected: Collected) -> None:
    ranges = {
        name: [(v.low, v.high) for v in table_of(collected, Method(name=name)).values]  # type: ignore[arg-type]
        for name in ("min-max", "moving-average", "percentile", "entropy", "mse")
    }
    assert all(len(found) == len(collected.values) for found in ranges.values())
    assert ranges["min-max"] != ranges["moving-average"]


def edited(table: CalibrationTable, change: dict[str, Any], entry: int = 1) -> str:
    values = json.loads(table_text(table))
    values["values"][entry].update(change)
    return json.dumps(values)


def test_edits_survive_and_are_said_when_somebody_made_them(table: CalibrationTable, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    entry = next(i for i, each in enumerate(table.values) if each.module == "stem")
    file.write_text(edited(table, {"high": 12.0}, entry), encoding="utf-8")
    found = read_table(file)
    assert found.values[entry].high == 12.0
    assert [each.edited for each in found.values].count(True) == 1
    (said,) = found.edits()
    assert said.startswith("conv2d in stem: ")
    assert said.endswith("…12")
    assert why_other(found, table.key) == "", "no edit changes a key"
    write_table(found, file)
    assert read_table(file).edits() == (said,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "0"}, "another model"),
        ({"data": "0"}, "other samples (6 of them)"),
        ({"method": "0"}, "made with method percentile"),
        ({"model": "0", "data": "0"}, "after other passes; it was made with other samples"),
    ],
)  # fmt: skip
def test_table_is_refused_with_the_reason_when_a_key_differs(
    table: CalibrationTable, change: dict[str, str], reason: str
) -> None:
    key = table.key.model_copy(update=change)
    with pytest.raises(DataError) as error:
        require_same(table, key, where="calibration.json")
    assert (error.value.code, error.value.where) == ("VLX0215", "calibration.json")
    assert reason in error.value.message
    require_same(table, TableKey.model_validate(table.key.model_dump()), where="calibration.json")


def test_order_of_samples_counts_only_when_the_method_follows_it(collected: Collected) -> None:
    assert table_of(collected, Method()).key.data == collected.data
    assert table_of(collected, Method(name="moving-average")).key.data == collected.order != collected.data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"low": 5.0, "high": 1.0}, "low 5 lies above high 1"),
        ({"high": float("inf")}, "Infinity is no number of strict JSON"),
        ({"high": "far"}, "values.1.high"),
        ({"high": None}, "values.1.high"),
        ({"upper": 1.0}, "values.1.upper"),
        ({"channels": {"axis": 1, "low": [2.0], "high": [1.0]}}, "none above its high"),
        ({"channels": {"axis": 1, "low": [0.0], "high": []}}, "as many lows as highs"),
        ({"value": "input:image"}, "one entry a value"),
    ],
)
def test_table_is_refused_in_words_when_an_edit_broke_it(
    table: CalibrationTable, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(edited(table, change), encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_table(file)
    assert (error.value.code, error.value.where) == ("VLX0215", str(file))
    assert reason in error.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1, column 1"),
        (b'{"values": [\n  {"low": 1,,}\n]}', "line 2, column 13"),
        (b"[]", "valid dictionary"),
        (b"\xff\xfe", "codec"),
        (b"[" * 100_000, "recursion"),
        (json.dumps({"schema_version": TABLE_SCHEMA + 1}).encode(), "update vlexport"),
    ],
)
def test_file_is_refused_in_words_when_it_is_no_table(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_table(file)
    assert error.value.code == "VLX0215"
    assert reason in error.value.message


def test_missing_file_is_refused_when_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "none.json")


def test_typical_magnitude_lies_far_below_the_extremes_when_there_are_outliers() -> None:
    net = program()
    values = images(20)
    values[3, 0, 0, 0] = 60.0
    found = table_of(collect(net, dataset(values, net), lambda n: Want() if n.op == "placeholder" else None), Method())
    (image,) = found.values
    assert image.typical is not None
    assert image.extremes[1] > 10 * image.typical
    assert image.typical <= np.abs(values).max() == 60.0
