"""Rows of a ``.jsonl`` file, good and hostile: every error names the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlexport.core.artifact import TensorSpec
from vlexport.core.dataset import Dataset
from vlexport.core.errors import DataError
from vlexport.core.preprocess import Preprocess
from vlexport.core.samples import open_data

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens"))
X = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
LABELS = ["cat", "dog"]


def photo(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 12), (value, value, value)).save(path)


def opened(folder: Path, rows: list[Any], *inputs: TensorSpec, **options: Any) -> Dataset:
    """Rows that are text are written as they stand."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = {"preprocess": {"image": Preprocess(resize=(8, 8))}, "labels": LABELS, **options}
    return open_data(str(folder / "rows.jsonl"), inputs=inputs or (IMAGE,), **given)


def refused(code: str, *said: str, call: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        call()
    assert caught.value.code == code
    for part in said:
        assert part in f"{caught.value.message} | {caught.value.where} | {caught.value.hint}"
    return caught.value


def test_rows_yield_photos_numbers_and_labels_when_they_fit(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", 10)
    photo(tmp_path / "deep" / "b.png", 20)
    rows = [
        {"image": "a.png", "ids": [1, 2, 3], "text": "ignored", "label": "dog"},
        "",
        {"image": "deep/b.png", "ids": [4], "label": 0},
    ]
    data = opened(tmp_path, rows, IMAGE, IDS)
    assert (len(data), data.labelled, data.kind) == (2, True, "jsonl")
    for _ in range(2):
        first, second = list(data)
        assert (first.id, first.label, second.id, second.label) == ("rows.jsonl:1", 1, "rows.jsonl:3", 0)
        assert first.inputs["image"][0, 0, 0] == np.float32(10 / 255)
        assert (first.inputs["ids"].dtype, first.inputs["ids"].tolist()) == (np.int64, [1, 2, 3])


def test_rows_are_unlabelled_when_the_first_has_no_label(tmp_path: Path) -> None:
    data = opened(tmp_path, [{"x": [1, 2]}, {"x": [3.5, -4]}], X)
    assert not data.labelled
    assert [s.inputs["x"].tolist() for s in data] == [[1, 2], [3.5, -4]]
    mixed = opened(tmp_path, [{"x": [1, 2], "label": 1}, {"x": [1, 2]}], X)
    refused("VLX0210", "rows.jsonl:2", call=lambda: list(mixed))


def test_label_is_an_input_when_the_model_calls_one_so(tmp_path: Path) -> None:
    spec = TensorSpec(name="label", dtype="int64", shape=("batch",))
    data = opened(tmp_path, [{"label": 7}], spec)
    assert not data.labelled
    assert next(iter(data)).inputs["label"] == 7


@pytest.mark.parametrize("label", [[[0, 1], [1, 1]], {"boxes": [1, 2]}, 0.25])
def test_labels_stay_as_they_are_when_the_task_is_no_classification(tmp_path: Path, label: Any) -> None:
    found = next(iter(opened(tmp_path, [{"x": [1, 2], "label": label}], X))).label
    assert (found if isinstance(found, dict) else np.asarray(found).tolist()) == label


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "deep/../../secret.png", "link.png", "out/secret.png"]
)
def test_photo_is_refused_when_it_leaves_the_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    photo(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    data = opened(folder, [{"image": path}])
    data.skip_bad = True  # it is no bad sample, it is an attack or a mistake: never skipped
    error = refused("VLX0201", "rows.jsonl:1", "leaves the folder", call=lambda: list(data))
    assert str(tmp_path) not in error.message


@pytest.mark.parametrize(
    ("code", "row", "said"),
    [
        ("VLX0203", "{", "is no JSON"),
        ("VLX0203", "[1]", "is no JSON object"),
        ("VLX0203", "[" * 100_000, "is no JSON"),
        ("VLX0203", {"image": "none.png"}, "none.png"),
        ("VLX0203", {"image": "a\0.png"}, "is no path"),
        ("VLX0205", {"imag": "a.png"}, "did you mean 'imag'?"),
        ("VLX0205", {"image": None}, "null is given"),
        ("VLX0205", {"image": [[1], [1, 2]]}, "ragged"),
        ("VLX0205", {"image": [1.0]}, "3×8×8 is wanted"),
        ("VLX0208", {"image": "a.png", "label": "catt"}, "did you mean 'cat'?"),
        ("VLX0208", {"image": "a.png", "label": 2}, "2 labels"),
        ("VLX0208", {"image": "a.png", "label": [[1], [1, 2]]}, "no array"),
    ],
)
def test_error_names_file_and_line_when_a_row_is_wrong(tmp_path: Path, code: str, row: Any, said: str) -> None:
    photo(tmp_path / "a.png")
    data = opened(tmp_path, [{"image": "a.png"}, row])
    error = refused(code, "rows.jsonl:2", said, call=lambda: list(data))
    assert error.where.endswith("rows.jsonl:2")
    assert str(tmp_path) not in str(error)


@pytest.mark.parametrize(("value", "said"), [([1.5], "float64 is given"), ([2**70], "is given"), ([True], "bool")])
def test_numbers_are_refused_when_an_integer_input_would_round_them(tmp_path: Path, value: Any, said: str) -> None:
    refused("VLX0205", said, call=lambda: list(opened(tmp_path, [{"ids": value}], IDS)))
    small = TensorSpec(name="ids", dtype="uint8", shape=("batch", 1))
    refused("VLX0205", "does not fit uint8", call=lambda: list(opened(tmp_path, [{"ids": [300]}], small)))


def test_text_for_an_input_without_preprocessing_asks_for_it_when_it_is_no_photo(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    refused("VLX0206", "--preprocess", call=lambda: list(opened(tmp_path, [{"image": "a.png"}], IMAGE, preprocess={})))


def test_file_is_refused_when_it_holds_no_row(tmp_path: Path) -> None:
    refused("VLX0202", "no row", call=lambda: opened(tmp_path, ["", "  "]))
    refused("VLX0203", "rows.jsonl:1", call=lambda: opened(tmp_path, ["{"]))


def test_bad_rows_are_skipped_and_kept_in_mind_when_asked(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    rows = ["{", {"image": "a.png", "label": 1}, {"image": "broken.png", "label": 1}, {"image": "a.png", "label": 0}]
    data = opened(tmp_path, rows, skip_bad=True)
    assert [s.id for s in data] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert {name: error.code for name, error in data.skipped.items()} == dict.fromkeys(
        ("rows.jsonl:1", "rows.jsonl:3"), "VLX0203"
    )
    assert "broken.png" in data.skipped["rows.jsonl:3"].message


def test_not_a_number_is_a_bad_sample_when_json_spells_it(tmp_path: Path) -> None:
    rows = [{"x": [0, 1]}, '{"x": [NaN, 1]}']
    refused("VLX0204", "rows.jsonl:2", call=lambda: list(opened(tmp_path, rows, X)))
    data = opened(tmp_path, rows, X, skip_bad=True)
    assert len(list(data)) == 1
    assert data.skipped["rows.jsonl:2"].code == "VLX0204"
