"""calibrate: a table is made once, and one that is given is used only where it holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch.fx import Node

from tests.calibration.planted import dataset, images, program
from vlexport.calibration.calibrate import calibrate, use_table
from vlexport.calibration.collect import Want
from vlexport.calibration.methods import Method
from vlexport.calibration.table import CalibrationTable, table_text
from vlexport.core.cache import Cache
from vlexport.core.errors import DataError
from vlexport.core.progress import Silent
from vlexport.ir import dialect
from vlexport.ir.program import Program

METHOD = Method(name="mse")


class Noted(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def net() -> Program:
    return program()


@pytest.fixture(scope="module")
def table(net: Program) -> CalibrationTable:
    return calibrate(net, dataset(images(5), net), wanted, METHOD)


def wanted(node: Node) -> Want | None:
    return Want() if dialect.op_name(node) in ("aten.conv2d.default", "aten.linear.default") else None


def test_table_is_found_again_only_while_nothing_that_decides_it_changed(net: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    other = net.copy()
    name = next(iter(other.used_tensors()))
    other.tensors[name] = other.tensors[name] * 2.0
    values = images(5)
    hits = []
    for of, data, want, method, batch in [
        (net, values, wanted, METHOD, 1),
        (net, values.copy(), wanted, METHOD, 1),
        (other, values, wanted, METHOD, 1),
        (net, values[:4], wanted, METHOD, 1),
        (net, values, lambda node: wanted(node) and Want(channel_axis=1), METHOD, 1),
        (net, values, wanted, Method(), 1),
        (net, values, wanted, METHOD, 2),
    ]:
        reporter = Noted()
        found = calibrate(of, dataset(data, of), want, method, batch=batch, cache=cache, reporter=reporter)
        hits.append(reporter.notes == ["the calibration table is from the cache"])
        anew = calibrate(of, dataset(data, of), want, method, batch=batch)
        assert table_text(found) == table_text(anew)
    assert hits == [False, True, False, False, False, False, False]


def test_samples_are_refused_without_a_run_when_too_few_of_them_differ(
    net: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, values = Cache(tmp_path / "cache"), images(6)
    values[4:] = values[3]
    calibrate(net, dataset(values, net), wanted, METHOD, cache=cache, at_least=4)
    monkeypatch.delattr(Program, "run")
    with pytest.raises(DataError, match="6 calibration samples, no more than 4 different ones") as error:
        calibrate(net, dataset(values, net), wanted, METHOD, cache=cache, at_least=5)
    assert error.value.code == "VLX0214"


def test_counts_are_not_kept_when_the_method_needs_none(net: Program) -> None:
    plain = calibrate(net, dataset(images(2), net), wanted, Method())
    assert [each.typical for each in plain.values] == [None] * 3


def test_given_table_is_used_with_its_edits_when_its_keys_match(
    net: Program, table: CalibrationTable, tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    values = json.loads(table_text(table))
    values["values"][0]["low"] = -0.25
    file.write_text(json.dumps(values), encoding="utf-8")
    found = use_table(file, net, dataset(images(5)[::-1].copy(), net), wanted, METHOD)
    assert (found.values[0].low, len(found.edits())) == (-0.25, 1)
    assert use_table(file, net, None, wanted, METHOD) == found


def test_given_table_is_refused_with_the_reason_when_it_does_not_hold(
    net: Program, table: CalibrationTable, tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(table_text(table), encoding="utf-8")
    other = net.copy()
    other.tensors = {name: tensor + 1.0 for name, tensor in net.tensors.items()}
    data = dataset(images(5), net)
    for of, samples, method, reason in [
        (other, data, METHOD, "another model"),
        (net, dataset(np.zeros((1, 3, 6, 6), np.float32), net), METHOD, "other samples (5 of them)"),
        (net, data, Method(), "made with method mse"),
    ]:
        with pytest.raises(DataError) as error:
            use_table(file, of, samples, wanted, method)
        assert (error.value.code, error.value.where) == ("VLX0215", str(file))
        assert reason in error.value.message


def test_given_table_is_refused_when_a_value_is_missing(net: Program, table: CalibrationTable, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(table_text(table.model_copy(update={"values": table.values[:1]})), encoding="utf-8")
    with pytest.raises(DataError) as error:
        use_table(file, net, None, wanted, METHOD)
    assert "linear.default in head.0" in error.value.message or "linear in head.0" in error.value.message
    assert error.value.message.endswith("and 1 more")
